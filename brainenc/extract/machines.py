"""The machines that an extraction is spread over, and what one copy of the model gets of them. Pure; no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from brainenc.errors import UsageError
from brainenc.extract.devices import gpu_count, usable_cores

_UNITS = 10_000
"""Ray counts resources in ten-thousandths; in whole numbers of them, three thirds are no more than one."""
_UNSEEN_CORES = 4
"""Of a machine that an autoscaler has yet to bring: few enough that every one has them."""
_MOST_DECODERS = 8


@dataclass(frozen=True, slots=True)
class Node:
    """What Ray may hand out on one machine."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Machines:
    """This machine, or those that a cluster has now.

    An actor is never split: what counts is what each machine has, not their sum.
    """

    nodes: tuple[Node, ...]
    cluster: bool = False
    """More may come than are there: an autoscaler starts machines when they are asked for."""

    @property
    def gpus(self) -> int:
        """All GPUs together."""
        return sum(int(node.gpus) for node in self.nodes)

    def device(self, asked: str) -> str:
        """``auto`` -> ``cuda`` where a machine has a GPU, else ``cpu``; else what was asked for.

        Raises:
            UsageError: ``cuda`` was asked for, there is none, and none can come.
        """
        if asked == "cuda" and not self.gpus and not self.cluster:
            raise UsageError(
                "--device cuda was asked for, but torch sees no CUDA device here; `brainenc doctor` says why."
            )
        if asked == "auto":
            return "cuda" if self.gpus else "cpu"
        return asked

    def copies(self, device: str) -> int:
        """Model copies that make sense by default: one per GPU, else one."""
        return max(1, self.gpus) if device == "cuda" else 1

    def threads(self, device: str, actors: int) -> int:
        """Threads a copy computes with by default: its share of the cores of the machine that will hold it."""
        return max(1, self._cores(device, actors) // _UNITS)

    def decode_threads(self, device: str, actors: int) -> int:
        """A CPU model leaves one core to decoding at most; a GPU eats more images than one thread can decode."""
        if device != "cuda":
            return 1
        return max(1, min(_MOST_DECODERS, self._cores(device, actors) // _UNITS - 1))

    def resources(self, device: str, actors: int, threads: int) -> dict[str, float]:
        """What one of the actors asks Ray for: no more than lets all of them find room.

        Machines smaller than what was asked for still get their actors, on shared cores; so do GPUs that are fewer
        than the actors. A GPU that has yet to come is asked for whole: parts of one would all go to the first machine.
        """
        if self._room(device, actors):
            cpus = min(threads * _UNITS, self._cores(device, actors)) / _UNITS
        else:
            cpus = 1.0 if device == "cuda" else float(min(threads, _UNSEEN_CORES))
        if device != "cuda":
            return {"num_cpus": cpus}
        return {"num_cpus": cpus, "num_gpus": _UNITS // self._actors_per_gpu(actors) / _UNITS}

    def _actors_per_gpu(self, actors: int) -> int:
        return -(-actors // self.gpus) if self.gpus else 1

    def _room(self, device: str, actors: int) -> list[tuple[int, int]]:
        """(Cores in units, most actors) of every machine that can hold an actor at all."""
        if device == "cuda":
            most = self._actors_per_gpu(actors)
            return [(round(n.cpus * _UNITS), int(n.gpus) * most) for n in self.nodes if n.gpus >= 1]
        return [(round(n.cpus * _UNITS), actors) for n in self.nodes if n.cpus > 0]

    def _cores(self, device: str, actors: int) -> int:
        """The most cores, in units, that each actor can have so that all find room; 0 where GPUs come without cores."""
        room = self._room(device, actors)
        if not room:
            return _UNSEEN_CORES * _UNITS
        shares = {cores // k for cores, most in set(room) for k in range(1, most + 1)} - {0}
        fitting = (s for s in shares if sum(min(most, cores // s) for cores, most in room) >= actors)
        return max(fitting, default=0)


def this_machine(*, gpus: bool = True) -> Machines:
    """What this process may use. Counting GPUs imports torch."""
    return Machines((Node(usable_cores(), gpu_count() if gpus else 0),))
