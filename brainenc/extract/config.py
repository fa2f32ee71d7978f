"""What an extraction is asked to do, and what it did: the values that cross its boundaries."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from brainenc.errors import UsageError

DTYPES = ("float16", "float32", "bfloat16")
COMPUTES = ("float32", "bfloat16", "float16")
MICRO_BATCH = {"cpu": 8, "cuda": 32}
"""Images that go through the model at once, by kind of device. Constants, so that two machines of one kind make
equal bytes; a collection keeps the number that it was created with."""
SHARD_BYTES = 256 << 20
"""What the largest feature of a shard may take: few files, yet little to do again after a crash."""
MAX_ROWS_PER_SHARD = 512
"""Small features (one vector an image) would otherwise put a whole data set, and hours of work, into one shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where images come from."""

    location: str
    """A folder, a list (``.txt .csv .tsv``) or an HDF5 file; a local path or any fsspec URL."""
    kind: Literal["subject", "images"] = "images"
    """``subject``: an Algonauts 2023 subject folder, which makes two stimulus sets; ``images``: anything else."""
    stimuli: str | None = None
    """Name of the stimulus set; by default made from the folder or file name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """One extraction. Checked when it is made; holds only plain values, so that it pickles and prints."""

    store: str
    """Folder or URL of the feature store; created if absent."""
    backbone: str
    """What :func:`brainenc.extract.backbone.load_backbone` takes."""
    features: tuple[str, ...]
    """``11.q``, ``-1.token``, ``8-11.k`` ...: see :func:`brainenc.extract.backbone.parse_features`."""
    sources: tuple[Source, ...]
    slug: str | None = None
    """Name of the backbone in keys; by default the last part of its name."""
    by_id: bool = False
    """Share rows by stimulus id: images that another set of the store has are copied, not computed; and with
    ``stimuli`` all sources are merged into one set of that name, in which every id has one row."""
    stimuli: str | None = None
    """Name of the merged stimulus set (with ``by_id``)."""
    size_policy: str | None = None
    image_size: int | None = None
    micro_batch: int | Literal["auto"] | None = None
    """Images a forward pass; None: the constant of :data:`MICRO_BATCH`. A collection that exists keeps its own."""
    rows_per_shard: int | None = None
    shard_bytes: int = SHARD_BYTES
    dtype: str = "float16"
    """What is stored."""
    compute: str = "float32"
    """What the model computes in: ``bfloat16`` and ``float16`` are autocast, and part of the provenance."""
    format: str = "arrow"
    actors: int | None = None
    """Model copies, each in a process of its own; None: one per GPU, else one."""
    threads: int | None = None
    """Threads a copy computes with; None: the cores divided among the actors."""
    decode_threads: int | None = None
    """Threads that decode ahead of the model, per actor; None: one on a CPU, up to eight beside a GPU."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    on_bad_image: Literal["fail", "null"] = "fail"
    check_images: bool = False
    """Read every image of sealed rows again and compare it with the hash kept in the receipt."""
    max_attempts: int = 3
    """How often a shard may lose its worker before it is left out and the run ends with an error."""
    commit_every_s: float = 60.0
    address: str | None = None
    """Ray cluster to join, as :func:`brainenc.addresses.resolve` takes it; None: a local one for this run alone."""
    stage: bool | None = None
    """Treat the store as a mount without a real flush; None: find out."""
    node_store: str | None = None
    """Folder on each node's own disk where shards wait until the run ends, when they are moved into ``store``; may
    hold environment variables of the node. None: shards are written to ``store``."""
    guard: bool = True
    """Let a guard watch host memory beside each worker."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("compute", self.compute, COMPUTES)
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("on-bad-image", self.on_bad_image, ("fail", "null"))
        for name in ("rows_per_shard", "shard_bytes", "actors", "threads", "decode_threads", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} is {value}, but must be at least 1.")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise UsageError(f"The batch size is {self.micro_batch}, but must be at least 1.")
        if not self.features:
            raise UsageError(
                "No feature was asked for. Add for example --feature 11.q; `brainenc show-model` lists them."
            )
        if not self.sources:
            raise UsageError("No images were named. Add --subject-dir DIR or --images DIR.")

    def with_(self, **changes: Any) -> ExtractConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractJob:
    """What every worker needs to know, the same for all shards. Crosses to Ray's processes."""

    store: str
    backbone: str
    slug: str | None
    size_policy: str | None
    image_size: int | None
    device: str
    threads: int
    decode_threads: int
    compute: str
    dtype: str
    on_bad_image: Literal["fail", "null"]
    stage: bool | None = None
    node_store: str | None = None
    guard: bool = True
    donors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Key -> collections of other stimulus sets that are made in exactly the same way."""
    image_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Stimulus set -> (H, W) of its preprocessed images; an image that comes out otherwise does not fit its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractProgress:
    """How far a run is. Made by the driver a few times a second."""

    images_done: int
    images_total: int
    images_per_s: float
    seconds_left: float | None
    shards_sealed: int
    shards_total: int
    retries: int
    memory_bytes: int
    """Anonymous and shared memory of the workers."""
    memory_limit_bytes: int
    gpu_fraction: float | None = None
    note: str = ""
    """Something that happened once: a retry, a halved batch, a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """What an extraction did; for people and logs, so without credentials."""

    store: str
    """Its address without credentials."""
    keys: tuple[str, ...]
    """Collections that are now complete."""
    images: int
    """Images that went through the model in this run."""
    reused: int
    """Images whose rows were copied from other stimulus sets."""
    shards_sealed: int
    """Shards sealed in this run, counted per collection."""
    shards_before: int
    """Shards that were there already."""
    missing: dict[str, str] = field(default_factory=dict)
    """Images written as missing rows by this run, and why."""
    retries: int = 0
    micro_batch: int = 0
    started_ray: bool = False
    startup_s: float = 0.0
    seconds: float = 0.0
    images_per_s: float = 0.0
    """From the first micro-batch on, start-up left out."""
    peak_worker_bytes: int = 0
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)
