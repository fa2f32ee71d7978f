"""What the driver finds out before any worker starts: images, backbone, collections, what is left. No Ray.

:func:`survey` only looks; :func:`create` then makes the store, stimulus sets and collections that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brainenc.errors import BadImages, BrainencError, NotAStore, ProvenanceMismatch
from brainenc.extract import description as descriptions
from brainenc.extract.changes import KnownHashes, changed_rows, refuse_changed, suspects
from brainenc.extract.config import MICRO_BATCH, ExtractConfig, ExtractJob
from brainenc.extract.description import Description
from brainenc.extract.features import Feature
from brainenc.extract.images import open_image
from brainenc.extract.machines import Machines
from brainenc.extract.plan import ShardTask, Voucher, Wanted, choose_rows_per_shard, outstanding
from brainenc.extract.reading import (
    absolute,
    absolute_backbone,
    content_hash,
    image_from_pixels,
    read_bytes,
    read_pixels,
)
from brainenc.extract.site import Here, Site
from brainenc.extract.sources import list_sources
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.dtypes import storage_dtype
from brainenc.featurestore.recovery import dead_partials
from brainenc.featurestore.stimuli import StimulusSet
from brainenc.featurestore.store import FeatureStore, open_store

_TRIED_IMAGES = 64
"""How many images are tried for one that can be read, when the size of a set's images is wanted: the first ones, then
as many of the others, because broken ones lie together (a copy that was cut short)."""
_JUST_OPENED_S = 2.0
"""A writer locks its partial microseconds after it made it; this long even where the machine hardly moves."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is asked for, beside what is there."""

    config: ExtractConfig
    device: str
    actors: int
    threads: int
    decode_threads: int
    sets: Mapping[str, StimulusSet]
    """Stimulus sets as listed now."""
    wanted: tuple[Wanted, ...]
    identities: Mapping[str, Mapping[str, Any]]
    """Key -> provenance."""
    details: Mapping[str, Mapping[str, Any]]
    """Key -> what readers want to know beside it."""
    image_shapes: Mapping[str, tuple[int, int]]
    """Stimulus set -> (H, W) of its preprocessed images."""
    existing: frozenset[str]
    """Keys that the store has."""
    donors: Mapping[str, tuple[str, ...]]
    """Key -> collections of other sets whose rows may be copied."""
    vouchers: tuple[Voucher, ...]
    """Collections of these stimulus sets, whatever they are made with."""

    @property
    def tasks(self) -> list[ShardTask]:
        """What is left, with the images of each shard."""
        return [
            replace(task, uris=tuple(s.uri for s in stimuli), ids=tuple(s.id for s in stimuli) if self.donors else ())
            for task in outstanding(self.wanted, self.vouchers)
            for stimuli in (self.sets[task.stimuli][task.start : task.stop],)
        ]

    @property
    def job(self) -> ExtractJob:
        """What workers need to know."""
        c = self.config
        return ExtractJob(
            store=absolute(c.store), backbone=absolute_backbone(c.backbone), slug=c.slug,
            size_policy=c.size_policy, image_size=c.image_size,
            device=self.device, threads=self.threads, decode_threads=self.decode_threads, compute=c.compute,
            dtype=c.dtype, on_bad_image=c.on_bad_image, stage=c.stage, node_store=c.node_store, guard=c.guard,
            donors=dict(self.donors), image_shapes=dict(self.image_shapes),
        )  # fmt: skip


def survey(config: ExtractConfig, *, site: Callable[[], Site] = Here, repeat: bool = False) -> Survey:
    """List the images, load the backbone, and compare with what the store has. Creates nothing.

    Args:
        config: what is asked for.
        site: says where the work will be done, when that matters; by default here.
        repeat: try first what an earlier run has kept of the backbone, which saves loading it if nothing is left to
            do, and keep it for the next.

    Raises:
        UnknownName, UsageError, DataError: what was asked for does not exist or does not go together.
        StimuliChanged: the store has this stimulus set with other images.
        ProvenanceMismatch: the store has these features, made in another way.
    """
    sets = {s.name: StimulusSet(s.name, s.rows) for s in list_sources(config.sources, merged=_merged_name(config))}
    store = _open(config)
    existing = frozenset(store.keys()) if store else frozenset()
    steady = frozenset(
        name for name, stimuli in sets.items()
        if store is not None and _compare_stimuli(store, stimuli, existing, check_all=config.check_images)
    )  # fmt: skip
    if repeat and existing:
        found = _finished(config, sets, store, existing, steady)
        if found is not None:
            return found
    description = descriptions.loaded(config)
    found = _compare(config, description, site(), sets, store, existing, steady)
    if repeat:
        descriptions.keep(config, description)
    return found


def _finished(
    config: ExtractConfig, sets: Mapping[str, StimulusSet], store: FeatureStore | None, existing: frozenset[str],
    steady: frozenset[str],
) -> Survey | None:  # fmt: skip
    """The survey, if what is kept of the backbone shows that nothing is left to do."""
    description = descriptions.kept(config)
    if description is None:
        return None
    unseen = Here(Machines(nodes=(), cluster=True))  # nothing will be computed: no library is loaded to look for GPUs
    try:
        asked = config.with_(micro_batch=None) if config.micro_batch == "auto" else config  # nor anything measured
        found = _compare(asked, description, unseen, sets, store, existing, steady)
    except (descriptions.NotKept, BrainencError):  # the backbone itself has the last word
        return None
    return None if found.tasks else replace(found, config=config)


def _compare(
    config: ExtractConfig, backbone: Description, site: Site, sets: Mapping[str, StimulusSet],
    store: FeatureStore | None, existing: frozenset[str], steady: frozenset[str],
) -> Survey:  # fmt: skip
    features = backbone.features(config.features)
    machines = site.machines
    device = machines.device(config.device)
    actors = config.actors or machines.copies(device)
    threads = config.threads or machines.threads(device, actors)
    shapes: dict[str, tuple[int, int]] = {}
    wanted: list[Wanted] = []
    identities: dict[str, Mapping[str, Any]] = {}
    details: dict[str, Mapping[str, Any]] = {}
    settled: dict[tuple[int, int], int] = {}
    for name, stimuli in sets.items():
        there = [k for k in sorted(existing) if k.startswith(f"{name}/{backbone.slug}/")]
        size = (_kept_image_size(store, there) if store and name in steady else None) or _image_size(stimuli)
        shape = shapes[name] = backbone.input_shape(size)
        asked = config
        if config.micro_batch == "auto" and there:  # a collection keeps its own, and what is added takes that, too
            asked = config.with_(micro_batch=None)
        elif config.micro_batch == "auto":
            if shape not in settled:
                settled[shape] = _settled(config, site, device, threads, shape, features)
            asked = config.with_(micro_batch=settled[shape])
        found = _wanted(asked, backbone, features, stimuli, size, device, store, existing)
        wanted += found
        identities |= {w.key: backbone.identity(Feature.parse(w.feature)) for w in found}
        details |= {w.key: _details(backbone, w, size) for w in found}
    neighbours = [store.collection(k) for k in sorted(existing) if k.split("/")[0] in sets] if store else []
    return Survey(
        config=config, device=device, actors=actors, threads=threads,
        decode_threads=config.decode_threads or machines.decode_threads(device, actors), sets=sets,
        wanted=tuple(wanted), identities=identities, details=details, image_shapes=shapes, existing=existing,
        vouchers=tuple(_voucher(neighbour) for neighbour in neighbours),
        donors=_donors(store, existing, wanted, identities, config.dtype) if config.by_id else {},
    )  # fmt: skip


def create(found: Survey) -> dict[str, Collection]:
    """Make the store, the stimulus sets and the collections that are not there; key -> collection."""
    store = open_store(found.config.store, create=True, stage=found.config.stage)
    there = store.stimuli_names()  # survey() has compared those: the same images may lie elsewhere now
    for name, stimuli in found.sets.items():
        if name not in there:
            store.add_stimuli(stimuli)
    return {w.key: _create_collection(store, found, w) for w in found.wanted}


def looked_again(found: Survey, collections: Mapping[str, Collection]) -> Survey:
    """The same with what is sealed now."""
    wanted = tuple(replace(w, sealed=collections[w.key].sealed()) for w in found.wanted)
    return replace(found, wanted=wanted)


def tidy(found: Survey) -> None:
    """Remove what dead writers left half-written in the collections asked for: each is as large as a shard."""
    store = _open(found.config)
    if store is None:
        return
    for w in found.wanted:
        for partial in dead_partials(store, f"{w.key}/", just_opened_s=_JUST_OPENED_S):
            partial.unlink(missing_ok=True)


def _create_collection(store: FeatureStore, found: Survey, w: Wanted) -> Collection:
    return store.create_collection(
        w.key, identity=found.identities[w.key], rows_per_shard=w.rows_per_shard, row_shape=w.row_shape,
        dtype=found.config.dtype, format=found.config.format, details=found.details[w.key],
    )  # fmt: skip


def _wanted(
    config: ExtractConfig, backbone: Description, features: Sequence[Feature], stimuli: StimulusSet,
    size: tuple[int, int], device: str, store: FeatureStore | None, existing: frozenset[str],
) -> list[Wanted]:  # fmt: skip
    """Every feature of one stimulus set. New collections take shard size and micro-batch from their neighbours."""
    prefix = f"{stimuli.name}/{backbone.slug}/"
    row_shapes = {f: backbone.row_shape(f, size) for f in features}
    row_bytes = {f: math.prod(shape) * storage_dtype(config.dtype).itemsize for f, shape in row_shapes.items()}
    there = {k: store.collection(k) for k in sorted(existing) if k.startswith(prefix)} if store else {}
    for key, neighbour in there.items():
        _same_weights(key, neighbour, backbone)
    micro_batch, rows_per_shard = _shape_of_work(config, device, row_bytes.values(), list(there.values()))
    wanted = []
    for feature in features:
        key = f"{prefix}{feature}"
        collection = there.get(key)
        if collection is not None:
            _same_identity(key, collection, backbone.identity(feature), row_shapes[feature], config.dtype)
        wanted.append(
            Wanted(
                key=key, stimuli=stimuli.name, feature=str(feature), row_shape=row_shapes[feature],
                row_bytes=row_bytes[feature], n_rows=len(stimuli),
                rows_per_shard=collection.rows_per_shard if collection else rows_per_shard,
                micro_batch=_micro_batch_of(collection, micro_batch) if collection else micro_batch,
                sealed=collection.sealed() if collection else frozenset(),
            )
        )  # fmt: skip
    return wanted


def _settled(
    config: ExtractConfig, site: Site, device: str, threads: int, image_shape: tuple[int, int],
    features: Sequence[Feature],
) -> int:  # fmt: skip
    """A measured micro-batch."""
    job = ExtractJob(
        store=absolute(config.store), backbone=absolute_backbone(config.backbone), slug=config.slug,
        size_policy=config.size_policy, image_size=config.image_size, device=device, threads=threads, decode_threads=1,
        compute=config.compute, dtype=config.dtype, on_bad_image=config.on_bad_image,
    )  # fmt: skip
    return site.settle_micro_batch(job, image_shape, [str(f) for f in features])


def _shape_of_work(
    config: ExtractConfig, device: str, row_bytes: Any, neighbours: Sequence[Collection]
) -> tuple[int, int]:
    """(micro-batch, rows per shard) of new collections: as asked for, else as the neighbours', else by size.

    Features of equal shards share their passes over the images, so that the neighbours' shard size is worth keeping.
    """
    asked = config.micro_batch if isinstance(config.micro_batch, int) else None
    default = asked or MICRO_BATCH[device]
    neighbour = next((n for n in neighbours if asked in (None, n.details.get("micro_batch"))), None)
    micro_batch = _micro_batch_of(neighbour, default) if neighbour else default
    if config.rows_per_shard is not None:
        return micro_batch, config.rows_per_shard
    if neighbour is not None:
        return micro_batch, neighbour.rows_per_shard
    return micro_batch, choose_rows_per_shard(row_bytes, micro_batch, config.shard_bytes)


def _micro_batch_of(collection: Collection, default: int) -> int:
    return int(collection.details.get("micro_batch") or default)


def _details(backbone: Description, w: Wanted, size: tuple[int, int]) -> dict[str, Any]:
    feature = Feature.parse(w.feature)
    return {**backbone.details(feature, size), "micro_batch": w.micro_batch, "image_size": list(size)}


def _same_weights(key: str, collection: Collection, backbone: Description) -> None:
    """One name, one set of weights: else features of two networks would stand side by side as one."""
    stored, now = collection.identity.get("weights"), backbone.weights_hash
    if stored not in (None, now):
        raise ProvenanceMismatch(
            key, {"weights": (stored, now)},
            f"The name {backbone.slug!r} is taken by other weights here: give this backbone a name with --name.",
        )  # fmt: skip


def _same_identity(
    key: str, collection: Collection, identity: Mapping[str, Any], row_shape: tuple[int, ...], dtype: str
) -> None:
    stored = dict(collection.identity) | {"row_shape": list(collection.row_shape), "dtype": collection.dtype}
    now = dict(identity) | {"row_shape": list(row_shape), "dtype": dtype}
    differences = {k: (stored[k], now[k]) for k in now if k in stored and stored[k] != now[k]}
    if differences:
        raise ProvenanceMismatch(
            key, differences, "Give this backbone a name of its own with --name, or the set with --stimuli."
        )


def _compare_stimuli(store: FeatureStore, found: StimulusSet, existing: frozenset[str], *, check_all: bool) -> bool:
    """Refuse other images; whether the store has the set, and its first image was not even touched since."""
    if found.name not in store.stimuli_names():
        return False
    stored = store.stimuli(found.name)
    rows = suspects(stored, found)
    steady = 0 not in rows[:1]
    if check_all:
        rows = list(range(len(found)))
    if rows:
        collections = [store.collection(k) for k in sorted(existing) if k.split("/")[0] == found.name]
        for collection in collections:
            collection.sealed()  # what a crash has left without a receipt, or with a torn one, has one now
        known = KnownHashes(collections)
        refuse_changed(changed_rows(rows, stored, found, known, _hash_now), stored, found)
    return steady


def _donors(
    store: FeatureStore | None, existing: frozenset[str], wanted: Sequence[Wanted],
    identities: Mapping[str, Mapping[str, Any]], dtype: str,
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    """For each collection those of other sets that are made alike: in the store, or in this very run."""
    found: dict[str, tuple[str, ...]] = {}
    for w in wanted:
        name = w.key.partition("/")[2]
        beside = [
            o.key for o in wanted if o.key != w.key and o.key.partition("/")[2] == name and o.row_shape == w.row_shape
        ]
        others = [k for k in sorted(existing) if k.partition("/")[2] == name and k != w.key and k not in beside]
        alike = [k for k in others if store and _is_alike(store.collection(k), identities[w.key], w.row_shape, dtype)]
        if beside or alike:
            found[w.key] = (*alike, *beside)
    return found


def _is_alike(collection: Collection, identity: Mapping[str, Any], row_shape: tuple[int, ...], dtype: str) -> bool:
    return collection.identity == identity and (collection.row_shape, collection.dtype) == (row_shape, dtype)


def _voucher(collection: Collection) -> Voucher:
    return Voucher(
        key=collection.key, stimuli=collection.spec.stimuli, rows_per_shard=collection.rows_per_shard,
        sealed=collection.sealed(),
    )  # fmt: skip


def _hash_now(uri: str) -> str:
    """Of what lies there.

    Raises:
        TransferFailed: it could not be read just now, which does not make it another image.
    """
    try:
        return content_hash(read_bytes(uri))
    except (FileNotFoundError, BadImages) as error:
        return f"unreadable: {error}"  # equals no hash


def _kept_image_size(store: FeatureStore, keys: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) of the images that these collections are of, where one of them says so."""
    for key in keys:
        size = store.collection(key).details.get("image_size")
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _image_size(stimuli: StimulusSet) -> tuple[int, int]:
    """(height, width) of the first image that can be read.

    Raises:
        BadImages: none of those that were tried can: the first ones, and as many spread over the rest.
        TransferFailed: one could not be read just now, which says nothing about it.
    """
    problems: dict[str, str] = {}
    first, rest = range(len(stimuli))[:_TRIED_IMAGES], range(len(stimuli))[_TRIED_IMAGES:]
    for row in (*first, *rest[:: max(1, -(-len(rest) // _TRIED_IMAGES))]):
        uri = stimuli[row].uri
        try:
            pixels = read_pixels(uri)
            image = open_image(read_bytes(uri)) if pixels is None else image_from_pixels(pixels)
        except BadImages as error:  # kept, and told if there is no better image
            problems[uri] = "; ".join(error.reasons.values())
            continue
        except FileNotFoundError as error:
            problems[uri] = str(error)
            continue
        return image.height, image.width
    tried = "all of them" if len(problems) == len(stimuli) else f"{len(problems)} of its {len(stimuli)} were tried"
    raise BadImages(
        problems,
        f"No image of {stimuli.name!r} could be read ({tried}), and without one nobody knows the size of its rows, so "
        "nothing was started. Mend or remove them, or name another folder with --images.",
    )


def _open(config: ExtractConfig) -> FeatureStore | None:
    try:
        return open_store(config.store, stage=config.stage)
    except NotAStore:
        return None


def _merged_name(config: ExtractConfig) -> str | None:
    return config.stimuli if config.by_id else None
