"""What a training run is made from; the defaults are the published ones. Kept in ``RUN/config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

import yaml

from brainenc.errors import DataError, UsageError
from brainenc.redact import redacted
from brainenc.train.drills import Planned
from brainenc.train.encoders.base import EncoderConfig

VERSION = 1

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many workers: 0 is this process without Ray; a range is Ray's elastic one."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``"2"``, ``"1:4"`` or ``"0"``.

        Raises:
            UsageError: neither.
        """
        low, colon, high = text.partition(":")
        try:
            made = cls(low=int(low), high=int(high) if colon else int(low))
        except ValueError:
            raise UsageError(f"--workers {text!r} is neither a number nor a range; write 2, 1:4 or 0.") from None
        if made.low < 0 or made.high < made.low or (colon and made.low == 0):
            raise UsageError(f"--workers {text!r}: a range goes up from 1 at least, as in 1:4; 0 means without Ray.")
        return made

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that determines a run. Paths are absolute, because Ray's workers start elsewhere."""

    # What is trained on
    subject_dir: str
    out: str
    """The run folder."""
    id: str = ""
    """Drawn when the run is made: checkpoints of another run that lay in the same place are told apart by it."""
    store: str | None = None
    """None: features are computed on the fly by a callable."""
    features: tuple[str, ...] = ()
    """``dinov2-base/11.q``; ``:cls`` or ``:mean`` chooses a part of the rows. Several are joined along channels."""
    stimuli: str | None = None
    """Stimulus set in the store; ``<subject>-train`` when None."""
    test_stimuli: str | None = None
    """Stimulus set to predict; ``<subject>-test`` when None."""
    split: str | None = None
    """A published ``idxs.npy`` to reproduce its split."""
    shuffle_responses: bool = False
    """A control: responses are given to other images, so that nothing can be learned."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What computes features on the fly, for the record."""

    # The model
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    # The optimisation
    epochs: int = 15
    batch_size: int = 16
    """Over all workers."""
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    lr_drop: int = 100
    """Epochs after which the learning rate is multiplied by ``lr_gamma``, again and again."""
    lr_gamma: float = 0.5
    clip: float = 0.1
    """Largest norm of the gradient; 0 leaves it alone."""
    seed: int = 0
    precision: Precision = "float32"
    compile: bool = False
    micro_batch: int | None = None
    """Largest number of samples a worker computes at once; None: its whole share of a batch."""

    # Where and by whom
    workers: str | None = None
    """``N``, ``MIN:MAX``, or ``0``; None: the number of GPUs, else 1."""
    device: str = "auto"
    address: str | None = None
    """A Ray cluster to join; None starts a local one. Of one command: it is not kept with the run."""
    max_failures: int = 3
    """Worker failures that are survived before the run is given up; -1: any number."""
    status_timeout_s: float = 60.0
    """How long a rank waits for another at a step boundary."""
    threads: int | None = None
    """Threads a worker computes with; None: the cores divided among the workers of this machine."""

    # What is kept
    keep: int = 2
    """Regular checkpoints that are kept beside the best."""
    checkpoint_every_s: float = 300.0
    """Longest time between two checkpoints, besides the one at the end of each epoch; 0: only there."""
    snapshot_every_s: float = 20.0
    """Time between two rolling snapshots; 0: none."""
    snapshot_dir: str | None = None
    """Folder for rolling snapshots on each machine's own disk; ``RUN/.snapshots`` when None, wherever the run lies."""
    log_every: int = 1
    """Steps between two records."""
    trackers: tuple[str, ...] = ()
    """``tensorboard``, ``wandb``."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """Thresholds and what to do (see ``brainenc.guard``); ``{"enabled": False}`` for none."""
    drill: tuple[str, ...] = ()
    """Faults on purpose: ``ram=0.95@step=40,rank=1``."""
    predict: bool = True
    """Predict the test images at the end, where their features are."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("lr_drop", 1), ("keep", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, found {getattr(self, name)}.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(f"micro_batch must be at least 1, found {self.micro_batch}.")
        if self.learning_rate <= 0 or self.clip < 0 or self.weight_decay < 0:
            raise UsageError(
                f"learning_rate must be above 0 and clip and weight_decay not below, found {self.learning_rate}, "
                f"{self.clip} and {self.weight_decay}."
            )
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"There is no precision {self.precision!r}. There is: float32, bfloat16.")
        if self.workers is not None:
            Workers.parse(self.workers)
        for text in self.drill:
            Planned.parse(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for YAML and JSON."""
        plain = asdict(self)
        for name in ("features", "trackers", "drill"):
            plain[name] = list(plain[name])
        return {"version": VERSION, **{k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`.

        Raises:
            DataError: another version, or fields that this version does not know.
        """
        values = dict(found)
        if (version := values.pop("version", None)) != VERSION:
            raise DataError(f"The run's configuration has version {version}, this brainenc reads {VERSION}.")
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise DataError(f"The run's configuration has unknown fields: {', '.join(unknown)}. Was it edited by hand?")
        for name in ("features", "trackers", "drill"):
            values[name] = tuple(values.get(name) or ())
        values["encoder"] = EncoderConfig(**values.get("encoder", {}))
        return cls(**values)

    def to_public_dict(self) -> dict[str, Any]:
        """For files and trackers: without the keys that an address may hold, and without the cluster's address.

        Which Ray is joined is said by each command: one that is kept would be joined by a later one, or with ``auto``
        whichever Ray happens to run then.
        """
        public: dict[str, Any] = redacted(self.to_dict())
        del public["address"]
        return public

    def to_yaml(self) -> str:
        """As in ``config.yaml``."""
        return yaml.safe_dump(self.to_public_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Undo :meth:`to_yaml`."""
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"config.yaml is no YAML: {error}.") from error
        if not isinstance(found, dict):
            raise DataError("config.yaml holds no mapping of names to values.")
        return cls.from_dict({**found, "address": None})  # that of an earlier command, where an older brainenc kept it

    def resumed_with(self, changes: Mapping[str, Any]) -> Self:
        """This configuration with what may change between a stop and a resume.

        Raises:
            UsageError: something that decides what is learned was changed.
        """
        fixed = sorted(
            name for name, value in changes.items() if name not in CHANGEABLE and getattr(self, name) != value
        )
        if fixed:
            sides = "; ".join(f"{name}: {getattr(self, name)!r} in the run, {changes[name]!r} now" for name in fixed)
            raise UsageError(
                f"A resumed run goes on with its own configuration, but {sides}. Leave that out, or start a new run "
                f"with another --out. What may change: {', '.join(sorted(CHANGEABLE))}."
            )
        return replace(self, **changes)


CHANGEABLE = frozenset({
    "out", "store", "subject_dir", "epochs", "micro_batch", "workers", "device", "address", "max_failures",
    "status_timeout_s", "threads", "keep",
    "checkpoint_every_s", "snapshot_every_s", "snapshot_dir", "log_every", "trackers", "guard", "drill", "predict",
    "compile", "test_stimuli",
})  # fmt: skip
"""What may differ on resume: nothing that changes which function is learned, or in which order."""
