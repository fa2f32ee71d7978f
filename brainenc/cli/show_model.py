"""``brainenc show-model``: what a backbone has, before anything is extracted."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from brainenc.errors import UsageError
from brainenc.units import format_bytes

_STORED_ITEM_BYTES = 2  # float16, what is stored unless somebody asks otherwise


EXAMPLE = """
\b
Example:
  brainenc show-model facebook/dinov2-base
"""


@click.command("show-model", epilog=EXAMPLE, short_help="layers, facets, token grid and bytes of a backbone")
@click.argument("backbone")
@click.option("--images", "image_size", default="425x425", metavar="HxW", help="Size of your images.  [425x425]")
@click.option("--size-policy", type=click.Choice(["pad", "resize", "crop"]), help="Instead of the model's own.")
@click.option("--image-size", "input_size", type=int, help="Instead of the model's own input size.")
@click.option("--modules", is_flag=True, help="List every module whose output can be taken, by dotted name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    backbone: str, image_size: str, size_policy: str | None, input_size: int | None, modules: bool, as_json: bool
) -> None:
    """List layers, facets, token grid, preprocessing, and the bytes that one image takes.

    BACKBONE is a hub id or a folder of transformers, open_clip:MODEL/TAG, timm:MODEL, torchvision:MODEL, or a preset
    (dinov2_q, dinov2, clip, resnet50, ...).
    """
    from brainenc.extract.backbone import load_backbone  # torch and transformers take seconds to import
    from brainenc.extract.presets import find_preset, names_preset

    size = _parse_size(image_size)
    report = describe(load_backbone(backbone, size_policy=size_policy, image_size=input_size), size, modules=modules)
    if names_preset(backbone):
        preset = find_preset(backbone)
        report["preset"] = {"name": backbone, "feature": preset.feature, "warning": preset.warning}
    click.echo(json.dumps(report, indent=2) if as_json else _page(report))


def describe(backbone: Any, image_size: tuple[int, int], *, modules: bool = False) -> dict[str, Any]:
    """Everything that ``show-model`` prints, JSON-able.

    Args:
        backbone: a :class:`brainenc.extract.backbone.Backbone`.
        image_size: height and width of the images that it is asked about.
        modules: with the modules by dotted name.
    """
    info = backbone.info
    height, width = backbone.input_shape(image_size)
    numbered = [layer for layer in info.layer_facets if layer.isdecimal()] or list(info.blocks)
    shown = [*numbered, *info.stations]
    report = {
        "backbone": info.name,
        "slug": info.slug,
        "source": info.source,
        "architecture": info.config,
        "weights": info.weights_hash,
        "image_size": list(image_size),
        "input_size": [height, width],
        "patch": info.patch,
        "grid": list(info.grid((height, width))) if info.patch > 1 else None,
        "n_prefix": info.n_prefix,
        "n_registers": info.n_registers,
        "width": info.width,
        "n_layers": info.n_layers,
        "facets": list(info.facets),
        "preprocessing": info.preprocessing,
        "preprocessing_text": info.preprocessing_text,
        "layers": {layer: _facets(backbone, layer, image_size) for layer in shown},
        "blocks": list(info.blocks),
    }
    if modules:
        others = [name for name in info.layer_facets if name not in shown]
        report["modules"] = {name: _facets(backbone, name, image_size) for name in others}
    return report


def _facets(backbone: Any, layer: str, image_size: tuple[int, int]) -> dict[str, Any]:
    from brainenc.extract.features import Feature

    found = {}
    for facet in backbone.info.layer_facets[layer]:
        shape = backbone.row_shape(Feature(layer, facet), image_size)
        found[facet] = {"shape": list(shape), "bytes": math.prod(shape) * _STORED_ITEM_BYTES}
    return found


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not height.isdecimal() or not (width or height).isdecimal():
        raise UsageError(f"{text!r} is not an image size: write HEIGHTxWIDTH, for example 425x425.")
    return int(height), int(width or height)


def _page(report: dict[str, Any]) -> str:
    lines = [
        f"{report['backbone']} ({report['source']}), filed as {report['slug']}",
        f"  weights     {report['weights']}",
        f"  input       {_input(report)}",
        f"              {report['preprocessing_text']}",
        f"  tokens      {_tokens(report)}",
        f"  layers      {_layers(report)}",
        "",
        f"  {'layer':<24} {'facet':<10} {'row':<14} an image (float16)",
    ]
    for first, last, facets in _grouped(report["layers"]):
        name = first if first == last else f"{first}-{last}"
        for facet, row in facets.items():
            lines.append(f"  {name:<24} {facet:<10} {_shape(row['shape']):<14} {format_bytes(row['bytes'])}")
            name = ""
    lines += _modules(report)
    if "preset" in report and report["preset"]["warning"]:
        lines += ["", f"  {report['preset']['warning']}"]
    lines += ["", f"  Ask for LAYER.FACET: {_example(report)}"]
    return "\n".join(lines)


def _input(report: dict[str, Any]) -> str:
    (h, w), (ih, iw) = report["image_size"], report["input_size"]
    return f"{h} x {w} image -> {ih} x {iw}"


def _tokens(report: dict[str, Any]) -> str:
    if report["grid"] is None:
        return "maps: rows are their positions, line by line"
    rows, columns = report["grid"]
    extra = report["n_prefix"] - report["n_registers"]
    parts = [f"{extra} class" if extra else "", f"{report['n_registers']} registers" if report["n_registers"] else ""]
    before = " + ".join(part for part in parts if part)
    patches = f"{rows} x {columns} patches of {report['patch']} px"
    return f"{before} + {patches}, {report['width']} wide" if before else f"{patches}, {report['width']} wide"


def _layers(report: dict[str, Any]) -> str:
    count = report["n_layers"]
    if not count:
        return "no numbered layers; take modules by dotted name (--modules)"
    return f"0 to {count - 1}, or -{count} to -1 ({report['blocks'][0]} to {report['blocks'][-1]})"


def _grouped(layers: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Runs of numbered layers that offer the same rows, as one line each."""
    groups: list[tuple[str, str, dict[str, Any]]] = []
    for name, facets in layers.items():
        if groups and name.isdecimal() and groups[-1][1].isdecimal() and groups[-1][2] == facets:
            groups[-1] = (groups[-1][0], name, facets)
        else:
            groups.append((name, name, facets))
    return groups


def _modules(report: dict[str, Any]) -> list[str]:
    if "modules" not in report:
        return []
    rows = [
        f"  {name:<44} {_shape(facets['token']['shape'])}"
        for name, facets in report["modules"].items()
        if "token" in facets
    ]
    return ["", "  modules (facet `token`)", *rows]


def _example(report: dict[str, Any]) -> str:
    if "preset" in report:
        return f"brainenc extract ... --backbone {report['preset']['name']} --feature={report['preset']['feature']}"
    layers = report["layers"]
    if not layers:
        return f"brainenc extract ... --backbone {report['backbone']} --feature MODULE.token"
    last = list(layers)[max(report["n_layers"] - 1, 0)]
    facet = "q" if "q" in layers[last] else next(iter(layers[last]))
    return f"brainenc extract ... --backbone {report['backbone']} --feature {last}.{facet}"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
