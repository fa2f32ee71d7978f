"""The figures of a run as Prometheus sees them, through whatever makes a gauge (Ray's metrics, or a fake in tests).

With ``ray[default]`` installed they appear on Ray's metrics port as ``ray_brainenc_<name>``; without it nobody listens,
and the same figures are in the run's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from brainenc.redact import redact

GAUGES = {
    "images_per_s": "Images that went through the model per second, over all actors.",
    "images_done": "Images done in this run.",
    "seconds_left": "Time until this run is done, at the rate of the last half minute.",
    "shards_sealed": "Shards sealed in this run, over all collections.",
    "retries": "Shards that were given to another worker.",
    "memory_bytes": "Anonymous memory of the workers that extract.",
    "gpu_fraction": "Share of GPU memory in use.",
    "memory_fraction": "Used memory over its limit, of the worker that is worst off.",
    "guard_level": "Memory guard: 0 ok, 1 warn, 2 critical, of the worker that is worst off.",
    "step_s": "Duration of the last training step.",
    "samples_per_s": "Samples trained on per second, over all workers.",
    "data_wait_share": "Share of the training time spent waiting for data.",
    "loss": "Training loss of the last step.",
    "val_perf": "Validation correlation, mean over vertices and hemispheres.",
}
"""Name -> what it is. Few and without labels of their own but the run: each label multiplies what Prometheus keeps."""

PREFIX = "brainenc_"


class Gauge(Protocol):
    """What is needed of a gauge; ``ray.util.metrics.Gauge`` is one."""

    def set(self, value: int | float | None, tags: dict[str, str] = ...) -> Any: ...


class Gauges:
    """Sets gauges by name; one that was never set never appears.

    Args:
        make: (name, description, tag keys) -> a gauge.
        run: told apart by this label: the store or the run folder, shown without credentials.
    """

    def __init__(self, make: Callable[[str, str, tuple[str, ...]], Gauge], *, run: str) -> None:
        self._make, self._tags = make, {"run": redact(run)}
        self._made: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, Any]) -> None:
        """Set what is known of :data:`GAUGES` and a number; other fields of a record are passed over."""
        for name, value in values.items():
            if name in GAUGES and isinstance(value, int | float) and value == value:
                if name not in self._made:
                    self._made[name] = self._make(PREFIX + name, GAUGES[name], tuple(self._tags))
                self._made[name].set(float(value), self._tags)
