"""One worker's work: the images of a shard through the backbone once, each feature into a shard of its own.

A plain class: tests call it without a cluster, ``pipeline.py`` puts it into Ray's actors. It raises nothing that a
shard did; what happened comes back as a :class:`~brainenc.extract.outcome.ShardOutcome`.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image

from brainenc.errors import (
    BadImages,
    BrainencError,
    ExtractionFailed,
    ShardSealed,
    StimuliChanged,
    TransferFailed,
    ValueNotStorable,
)
from brainenc.extract.backbone import Backbone, load_backbone
from brainenc.extract.changes import KnownHashes
from brainenc.extract.config import ExtractJob
from brainenc.extract.decode import DecodeAhead, Decoded, batches
from brainenc.extract.devices import environment, release_memory
from brainenc.extract.donors import Donation, Donors
from brainenc.extract.features import Feature
from brainenc.extract.images import open_image
from brainenc.extract.node_store import collection_beside
from brainenc.extract.outcome import ShardOutcome, ShardPass
from brainenc.extract.outputs import OutputBuffers
from brainenc.extract.plan import ShardTask
from brainenc.extract.reading import content_hash, image_from_pixels, read_bytes, read_pixels
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.dtypes import logical_dtype
from brainenc.featurestore.store import open_store
from brainenc.featurestore.writer import ShardWriter
from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.out_of_memory import is_out_of_memory
from brainenc.redact import redact


@dataclass(frozen=True, slots=True)
class Sink:
    """Where one feature of a shard goes."""

    key: str
    row_shape: tuple[int, ...]
    writer: ShardWriter


Sinks = Mapping[Feature, Sink]


def load_for(job: ExtractJob) -> Backbone:
    """The job's backbone on the job's device."""
    backbone = load_backbone(job.backbone, slug=job.slug, size_policy=job.size_policy, image_size=job.image_size)
    return backbone.to(job.device, job.compute)


class Stopped(Exception):
    """Leaves a shard at a micro-batch boundary; never leaves this module."""


class Extractor:
    """A backbone on one device, used for shard after shard. Worker only; one thread calls it.

    Args:
        job: what is the same for all shards.
        guard: asked at every micro-batch: an order to stop or to shrink is obeyed.
        should_stop: asked at every micro-batch as well.
        on_batch: told (images done so far, size of the next pass) before each forward pass.
        backbone: instead of loading the job's.
    """

    def __init__(
        self,
        job: ExtractJob,
        *,
        guard: StepGuard | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_batch: Callable[[int, int], None] = lambda rows, size: None,
        backbone: Backbone | None = None,
    ) -> None:
        self._job, self._guard = job, guard or NullGuard()
        self._should_stop, self._on_batch = should_stop, on_batch
        torch.set_num_threads(job.threads)  # explicit: equal bytes need an equal number of threads
        self._store = open_store(job.store, stage=job.stage)
        self._backbone = backbone or load_for(job)
        self._dtype: torch.dtype = getattr(torch, job.dtype)
        self._outputs = (
            OutputBuffers(self._dtype) if job.device == "cpu" else None
        )  # a GPU's allocator keeps its blocks
        self._ahead = DecodeAhead(threads=job.decode_threads)
        self._ceiling: int | None = None
        """Micro-batch that memory allows here; learned, and kept for this worker's life."""
        self._rows_done = 0

    @property
    def rows_done(self) -> int:
        """Images that went through the model since this was made."""
        return self._rows_done

    def close(self) -> None:
        """End the decoding threads."""
        self._ahead.close()

    def extract(self, task: ShardTask) -> ShardOutcome:
        """Do one shard. Features that somebody sealed meanwhile are left alone."""
        shard = ShardPass(task=task)
        try:
            with self._open_sinks(task) as sinks:
                if sinks:
                    self._fill(shard, sinks)
        except Stopped as why:
            shard.notes.append(f"stopped: {why}")
            return shard.outcome("stopped")
        except Exception as error:  # told to the driver, which decides what it means for the run
            return shard.outcome("failed", error=_portable(error, task))
        return shard.outcome("bad_images" if self._unfit(shard) else "sealed")

    def _unfit(self, shard: ShardPass) -> bool:
        return bool(shard.bad) and self._job.on_bad_image == "fail"

    @contextlib.contextmanager
    def _open_sinks(self, task: ShardTask) -> Iterator[Sinks]:
        """A writer for each feature whose shard is not sealed; what was not sealed inside is dropped on the way out."""
        made_with = environment(self._job.device, self._job.threads, task.micro_batch)
        with contextlib.ExitStack() as stack:
            sinks = {}
            for text, key in task.features:
                with contextlib.suppress(ShardSealed):
                    collection = self._target(key)
                    writer = stack.enter_context(collection.shard_writer(task.shard, environment=made_with))
                    sinks[Feature.parse(text)] = Sink(key, collection.row_shape, writer)
            yield sinks

    def _target(self, key: str) -> Collection:
        """The collection that shards are written to: the store's, or the one on this node's disk beside it."""
        if self._job.node_store is None:
            return self._store.collection(key)
        return collection_beside(self._store, key, self._job.node_store)

    def _fill(self, shard: ShardPass, sinks: Sinks) -> None:
        task = shard.task
        images = self._ahead.images(
            self._decoder(task, list(sinks)), range(task.start, task.stop), task.uris, ahead=2 * task.micro_batch
        )
        with contextlib.closing(images):
            for batch in batches(images, task.micro_batch):
                self._obey(shard)
                shard.take(batch)
                if not self._unfit(shard):  # else go on only to find the other bad images
                    self._compute(shard, batch, sinks)
        if self._unfit(shard):
            return
        self._compare_with_sibling(shard)
        for sink in sinks.values():
            sink.writer.seal(content_hashes=shard.hashes)
            shard.sealed.append(sink.key)

    def _compute(self, shard: ShardPass, batch: Sequence[Decoded], sinks: Sinks) -> None:
        """Forward what is there of the batch, in pieces that fit, and append every row in order."""
        pixels = [image.pixels for image in batch if image.pixels is not None]
        absent = [n for n, image in enumerate(batch) if image.problem]
        pieces = self._forward(shard, pixels, sinks)
        if len(pixels) < len(batch):  # rare: worth a copy
            pieces = iter([_with_gaps(pieces, sinks, batch, self._job.dtype)])
            self._rows_done += len(batch) - len(pixels)
        for outputs in pieces:
            for feature, sink in sinks.items():
                self._append(sink, outputs.pop(feature), absent)

    def _append(self, sink: Sink, rows: np.ndarray, absent: Sequence[int]) -> None:
        try:
            sink.writer.append(rows, missing=absent)
        except ValueNotStorable as error:
            wider = "float32" if self._job.dtype == "bfloat16" else "bfloat16 or --dtype float32"
            raise ValueNotStorable(
                f"{sink.key}: {error} If the model itself gives finite numbers, --dtype {wider} holds them."
            ) from error

    def _forward(
        self, shard: ShardPass, pixels: Sequence[torch.Tensor], sinks: Sinks
    ) -> Iterator[dict[Feature, np.ndarray]]:
        """Outputs of all images in order, in one pass if memory allows; else the passes are halved until it does.

        What is yielded is good until the next is asked for.
        """
        start = 0
        while start < len(pixels):
            size = min(len(pixels) - start, self._ceiling or len(pixels))
            shard.begin_batch()
            self._on_batch(self._rows_done, size)
            outputs = self._try(pixels[start : start + size], sinks)
            if isinstance(outputs, str):
                if size == 1:
                    raise ExtractionFailed(_nothing_fits(self._job, outputs))
                self._shrink(size // 2)
                shard.notes.append(f"out of memory with {size} images at a time: {self._ceiling} from here on")
                continue
            yield outputs
            start += size
            self._rows_done += size
            shard.end_batch(size, self._ceiling)

    def _try(self, pixels: Sequence[torch.Tensor], sinks: Sinks) -> dict[Feature, np.ndarray] | str:
        """One forward pass; the text of the error when memory ran out (not the error: its traceback holds tensors)."""
        try:
            out = None
            if self._outputs is not None:
                out = self._outputs.take(len(pixels), {feature: sink.row_shape for feature, sink in sinks.items()})
            stacked = torch.stack(list(pixels))
            if self._job.device.startswith("cuda"):
                stacked = stacked.pin_memory().to(self._job.device, non_blocking=True)
            with torch.inference_mode():
                outputs = self._backbone.forward(stacked, list(sinks), dtype=self._dtype, out=out)
                return {feature: _to_numpy(outputs.pop(feature)) for feature in sinks}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _one_line(error)

    def _shrink(self, size: int) -> None:
        self._ceiling = max(1, size)
        release_memory(self._job.device)

    def _obey(self, shard: ShardPass) -> None:
        """What guard and driver ask for, at a micro-batch boundary. What is sealed is durable, and all there is."""
        order = self._guard.pending()
        if order is not None:
            if order.kind == "shrink":
                self._shrink((self._ceiling or shard.task.micro_batch) // 2)
                shard.notes.append(f"memory got short ({order.reason}): {self._ceiling} images at a time from here on")
            self._guard.saved(path=redact(self._job.store), step=self._rows_done, epoch=0)
            if order.kind == "stop":
                raise Stopped(order.reason)
        if self._should_stop():
            raise Stopped("asked to")
        self._guard.beat(epoch=0, step=self._rows_done)

    def _decoder(self, task: ShardTask, features: list[Feature]) -> Callable[[int, str], Decoded]:
        wanted = self._job.image_shapes.get(task.stimuli)
        keys = dict(task.features)
        donors = (
            Donors(self._store, {f: self._job.donors.get(keys[str(f)], ()) for f in features}) if task.ids else None
        )

        def find(row: int, digest: str) -> Donation | None:
            return donors.find(task.ids[row - task.start], digest) if donors else None

        return lambda row, uri: self._decode(row, uri, wanted, find)

    def _decode(
        self, row: int, uri: str, wanted: tuple[int, int] | None, find: Callable[[int, str], Donation | None]
    ) -> Decoded:
        """Read, hash, decode and preprocess one image. Runs in the decoding threads.

        Only what is wrong with the image itself is kept as its problem. That it could not be read just now is no such
        thing: that is raised and fails the shard, or a busy server would leave a missing row for good.
        """
        try:
            digest, image = _read(uri)
        except (FileNotFoundError, BadImages) as error:
            return Decoded(row=row, uri=uri, pixels=None, content_hash="", problem=_one_line(error))
        if (donation := find(row, digest)) is not None:
            return Decoded(row=row, uri=uri, pixels=None, content_hash=digest, donation=donation)
        try:
            tensor = self._backbone.preprocess(image())
        except Exception as error:  # whatever a decoder raises is this image's problem: kept, listed, never hidden
            if is_out_of_memory(error):
                raise MemoryError(_one_line(error)) from error
            if digest != _read(uri)[0]:
                raise TransferFailed(
                    f"{redact(uri)} could not be decoded ({_one_line(error)}), and gives other bytes when it is read "
                    "again: it is being written, or was damaged on its way. The same command tries again."
                ) from None
            return Decoded(row=row, uri=uri, pixels=None, content_hash=digest, problem=_one_line(error))
        height, width = tensor.shape[-2:]
        if wanted is not None and (height, width) != wanted:
            problem = (
                f"gives {height} x {width} pixels where the others give {wanted[0]} x {wanted[1]} "
                "(images of different sizes need --size-policy resize or crop)"
            )
            return Decoded(row=row, uri=uri, pixels=None, content_hash=digest, problem=problem)
        return Decoded(row=row, uri=uri, pixels=tensor, content_hash=digest)

    def _compare_with_sibling(self, shard: ShardPass) -> None:
        """A feature that was sealed earlier for these rows says what the images were; they must be the same now."""
        sibling = shard.task.sibling
        if sibling is None:
            return
        known = KnownHashes([self._store.collection(sibling)])
        before = [known(row) for row in range(shard.task.start, shard.task.stop)]
        pairs = zip(shard.task.uris, before, shard.hashes, strict=True)
        changed = [uri for uri, old, new in pairs if old and new and old != new]
        if changed:
            raise StimuliChanged(
                f"{len(changed)} image(s) of {shard.task.stimuli} are not those that {sibling} was made of: "
                f"{', '.join(changed[:5])}. Put the old files back, or extract the new ones under another name: "
                "--stimuli NAME."
            )


def _read(uri: str) -> tuple[str, Callable[[], Image]]:
    """(Hash of the content, what decodes it)."""
    pixels = read_pixels(uri)
    if pixels is not None:
        return content_hash(pixels.tobytes()), lambda: image_from_pixels(pixels)
    data = read_bytes(uri)
    return content_hash(data), lambda: open_image(data)


def _with_gaps(
    pieces: Iterable[Mapping[Feature, np.ndarray]], sinks: Sinks, batch: Sequence[Decoded], dtype: str
) -> dict[Feature, np.ndarray]:
    """The rows of a batch: computed ones, those that another set has, and zeros where images are missing."""
    computed = [n for n, image in enumerate(batch) if image.pixels is not None]
    whole = {f: np.zeros((len(batch), *sink.row_shape), logical_dtype(dtype)) for f, sink in sinks.items()}
    for piece in pieces:
        for feature, rows in piece.items():
            whole[feature][computed[: len(rows)]] = rows
        computed = computed[len(rows) :]
    for n, image in enumerate(batch):
        if image.donation is not None:
            for feature in sinks:
                whole[feature][n] = image.donation.read(feature)
    return whole


def _to_numpy(output: torch.Tensor) -> np.ndarray:
    """The rows on the host; bfloat16, which NumPy does not have by itself, as the store knows it."""
    output = output.cpu()
    if output.dtype == torch.bfloat16:
        return output.view(torch.uint16).numpy().view(logical_dtype("bfloat16"))
    array: np.ndarray = output.numpy()
    return array


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, BrainencError) else f"{type(error).__name__}: {text}"


def _nothing_fits(job: ExtractJob, why: str) -> str:
    return (
        f"{job.backbone} does not fit on {job.device} even with one image at a time ({why}). Take a smaller backbone "
        "or --image-size, fewer features in one command, or --device cpu."
    )


def _portable(error: Exception, task: ShardTask) -> Exception:
    """The error as it crosses to the driver: ours as they are, foreign ones as text with their traceback."""
    if isinstance(error, BrainencError):
        return error
    return ExtractionFailed(
        f"Shard {task.name} failed: {_one_line(error)}.\n{''.join(traceback.format_exception(error))}"
    )
