"""``--out`` of the commands that write to this machine: an address is refused before anything is made.

A plain path would take ``gs://lab/x`` for the folder ``./gs:/lab/x``, and nobody would find what was written there.
"""

from __future__ import annotations

from typing import Any

import click

from brainenc.errors import UsageError


class LocalOut(click.Path):
    """``click.Path`` for something to write, which is no URL; ``file:///data/x`` is the path that it names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from brainenc.featurestore.places import local_path  # late: pyarrow, which `--help` need not wait for

        if not isinstance(value, str):  # a default
            return super().convert(value, param, ctx)
        path = local_path(value)
        if path is None:
            option = param.opts[0] if param is not None else "--out"
            raise UsageError(
                f"{option} {value} is an address, and this command writes to folders of this machine only. Give a "
                "local folder or one of a mounted drive, and copy from there afterwards (`gcloud storage cp -r`, `aws "
                "s3 cp --recursive`, `rclone copy`). Nothing was written. Addresses are for --store, for `train --out` "
                "and for RUN."
            )
        return super().convert(str(path) if value.startswith("file:") else value, param, ctx)
