"""The shape of the package: imports run downwards, heavy libraries stay at the edges, public names are complete."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import brainenc

ROOT = Path(__file__).parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(folder)}
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", "pyproject.toml"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, whose contract can be broken."""
    shutil.copytree(ROOT / "brainenc", tmp_path / "brainenc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_keep_the_contract():
    result = lint_imports(ROOT)

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("featurestore/layout.py", "import brainenc.extract"),
        ("featurestore/layout.py", "import torch"),
        ("guard/policy.py", "import ray"),
        ("datasets/__init__.py", "import brainenc.featurestore"),
        ("errors.py", "import brainenc.units"),
    ],
)
def test_a_forbidden_import_is_noticed(copy: Path, module: str, forbidden: str):
    """The test of the test: each kind of breach makes the contract fail."""
    with open(copy / "brainenc" / module, "a") as file:
        file.write(f"\n{forbidden}\n")

    assert lint_imports(copy).returncode != 0


@pytest.mark.parametrize("module", ["brainenc", "brainenc.cli.main", "brainenc.featurestore", "brainenc.guard"])
def test_import_is_light(module: str):
    """Neither torch nor Ray is imported before it is needed."""
    program = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"


def test_public_names_exist_and_are_sorted():
    assert brainenc.__all__ == sorted(brainenc.__all__)
    assert all(getattr(brainenc, name) is not None for name in brainenc.__all__)
