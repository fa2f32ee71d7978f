"""Where an extraction is done: on this machine, or on a cluster that is joined when it is first asked about."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from brainenc.addresses import resolve
from brainenc.errors import UsageError
from brainenc.extract.config import ExtractConfig, ExtractJob
from brainenc.extract.machines import Machines, this_machine
from brainenc.extract.measure import Measured, measure, settle_micro_batch
from brainenc.extract.plan import Wanted


class Site(Protocol):
    """What planning asks of the place where the work will be done."""

    @property
    def machines(self) -> Machines:
        """What is there."""
        ...

    def settle_micro_batch(self, job: ExtractJob, image_shape: tuple[int, int], features: Sequence[str]) -> int:
        """As :func:`~brainenc.extract.measure.settle_micro_batch`, on a machine that will do the work."""
        ...

    def measure(self, job: ExtractJob, wanted: Sequence[Wanted], uris: Sequence[str], actors: int) -> Measured:
        """As :func:`~brainenc.extract.measure.measure`, for that many actors."""
        ...


class Here:
    """This machine.

    Args:
        machines: what it is taken to be; by default what it is.
    """

    def __init__(self, machines: Machines | None = None) -> None:
        self.machines = machines or this_machine()

    def settle_micro_batch(self, job: ExtractJob, image_shape: tuple[int, int], features: Sequence[str]) -> int:
        """In a process of its own."""
        return settle_micro_batch(job, image_shape, features)

    def measure(self, job: ExtractJob, wanted: Sequence[Wanted], uris: Sequence[str], actors: int) -> Measured:
        """All actors beside each other, as they will be."""
        return measure(job, wanted, uris, processes=actors)


def _refuse_memory(config: ExtractConfig) -> None:
    for location in (config.store, *(source.location for source in config.sources)):
        if "memory://" in location:
            raise UsageError(
                f"{location} lies in the memory of one process, but an extraction's workers are processes of their own "
                "and would not see it. Name a folder, or a URL that every process can reach (gs://, s3:// ...)."
            )


@contextlib.contextmanager
def site_of(config: ExtractConfig) -> Iterator[Callable[[], Site]]:
    """What answers with the site; a cluster is joined at the first call, and left at the end.

    Raises:
        UsageError: store or images lie in the memory of this process; when called: as
            :func:`brainenc.addresses.resolve`.
    """
    _refuse_memory(config)
    with contextlib.ExitStack() as stack:

        @functools.cache
        def site() -> Site:
            address = resolve(config.address, command="extract")
            if address is None:
                return Here(this_machine(gpus=config.device != "cpu"))
            from brainenc.extract.pipeline import joined  # late: Ray

            return stack.enter_context(joined(address))

        yield site
