"""What listening to a forward pass costs beside the bare model, and what preparing its input costs.

Compute time of one thread (``time.process_time``), in turns with the reference, so that a busy machine slows both
alike; the figure is the median of the ratios.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.figures import Figure
from brainenc.extract.backbone import Backbone, load_backbone, parse_features
from brainenc.extract.images import open_image
from brainenc.extract.miniature import save_miniature

TITLE = "Backbones: any feature from one forward pass"
NOTES = """
The model is a seeded DINOv2 of DINOv2-S's size (384 wide, 12 blocks) at 224 px: four images a pass, float16 results,
one thread.
"""
ROUNDS = 7


def run() -> list[Figure]:
    """All figures of this area, in under two minutes on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            backbone = load_backbone(str(_small_dino(Path(scratch))))
            return [*_forward(backbone), *_input(backbone)]
    finally:
        torch.set_num_threads(threads)


def _small_dino(folder: Path) -> Path:
    return save_miniature(
        "dinov2", folder / "dinov2-small-like", hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
        mlp_ratio=4, image_size=518,
    )  # fmt: skip


def _forward(backbone: Backbone) -> list[Figure]:
    batch = torch.randn(4, 3, 224, 224)
    one, many, early = (
        parse_features(names, backbone.info) for names in (["norm.token"], ["*.token", "*.q"], ["2.token"])
    )

    def bare() -> None:
        with torch.no_grad():
            backbone.network.model(pixel_values=batch)

    def taking(features: list) -> Callable[[], object]:
        return lambda: backbone.forward(batch, features, dtype=torch.float16)

    speed, _ = _ratio(bare, taking(one))
    cost, one_s = _ratio(taking(many), taking(one))
    part, bare_s = _ratio(taking(early), bare)
    return [
        Figure(
            name="speed with the last layer's tokens taken, of the bare forward pass",
            value=speed, target=0.97, reference=f"bare pass {bare_s * 1e3:.0f} ms",
        ),
        Figure(
            name="24 features of one pass, of the cost of one feature",
            value=cost, target=1.1, at_most=True, reference=f"one feature {one_s * 1e3:.0f} ms",
            note="tokens and q of all twelve blocks",
        ),
        Figure(
            name="a pass that needs blocks 0 to 2 only, of the whole pass",
            value=part, target=0.35, at_most=True, reference=f"bare pass {bare_s * 1e3:.0f} ms", note="3 of 12 blocks",
        ),
    ]  # fmt: skip


def _input(backbone: Backbone) -> list[Figure]:
    pixels = torch.randint(0, 256, (107, 107, 3), dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((425, 425), Image.Resampling.BICUBIC).save(buffer, "PNG")
    data = buffer.getvalue()
    image = open_image(data)
    decode = min(_timed(lambda: open_image(data)) for _ in range(20))
    prepare = min(_timed(lambda: backbone.preprocess(image)) for _ in range(20))
    return [
        Figure(name="decode a 425 x 425 PNG", value=decode * 1e3, unit="ms"),
        Figure(name="normalise and pad it to 434 x 434", value=prepare * 1e3, unit="ms"),
    ]


def _ratio(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Median over rounds of time(one) / time(other), run in turns; and the median time of the denominator's round."""
    one()
    other()
    rounds = [(_timed(one), _timed(other)) for _ in range(ROUNDS)]
    return statistics.median(a / b for a, b in rounds), statistics.median(b for _, b in rounds)


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
