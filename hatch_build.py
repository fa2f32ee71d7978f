"""Builds the one extension in C. Where that fails the package works without: see brainenc/guard/glances.py."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "brainenc/guard/_glances.c"
TARGET = "brainenc/guard/_glances.abi3.so"


class ExtensionHook(BuildHookInterface):
    """Into a wheel, or beside the source for an editable install. Nothing else is written into the checkout."""

    _scratch = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is no Linux."""
        if self.target_name != "wheel":  # sources are sources
            return
        root, editable = Path(self.root), version == "editable"
        if editable:  # one that can no longer be built must not stay
            (root / TARGET).unlink(missing_ok=True)
        if sys.platform != "linux" or sys.implementation.name != "cpython":
            return
        self._scratch = tempfile.mkdtemp(prefix="brainenc-build-")
        built = self._compile(root)
        if built is None:
            return
        if editable:
            shutil.copy(built, root / TARGET)
            return
        build_data["force_include"][str(built)] = TARGET
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled on the way."""
        if self._scratch:
            shutil.rmtree(self._scratch)

    def _compile(self, root: Path) -> Path | None:
        from setuptools import Distribution, Extension

        # Optional: what fails is told by setuptools, and leaves nothing.
        extension = Extension("_glances", [str(root / SOURCE)], py_limited_api=True, optional=True)
        command = Distribution({"name": "brainenc", "ext_modules": [extension]}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = self._scratch
        command.ensure_finalized()
        command.run()
        built = next(Path(self._scratch).glob("_glances*.so"), None)
        if built is None:
            self.app.display_warning(f"{SOURCE} could not be built: Python will do what it does")
        return built
