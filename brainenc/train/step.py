"""One training step without a DDP wrapper: local forward and backward, then, if all ranks said yes, the update.

Runs in the training thread of each worker. Gradient buckets and optimizer state are allocated when a :class:`Stepper`
is made, so that what is left to fail for want of memory is the forward and the backward, before anybody said "go".
"""

from __future__ import annotations

import gc
import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from brainenc import allocator
from brainenc.train.team import Team

BUCKET_BYTES = 32 << 20
"""Gradients travel in buckets of this size: large enough for bandwidth, small enough to overlap."""

_ALIGN = 16
"""Floats: each gradient starts on 64 bytes, because vector kernels round differently at other alignments."""


class TrainingBatch(Protocol):
    """This rank's share of a global batch, on its device."""

    count: int
    global_count: int

    def part(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples ``first`` to before ``last``: features ``(m, D, H, W)``, responses ``(m, V_lh)``, ``(m, V_rh)``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """How a step is computed."""

    seed: int
    weight_decay: float = 1e-4
    clip: float = 0.1
    """Largest norm of the gradient; 0 leaves it alone."""
    bfloat16: bool = False
    compile: bool = False


def derive_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Seed of one micro-batch's random numbers, so that a step that is done again draws the same ones."""
    packed = struct.pack("<4Q", seed & (2**64 - 1), step, rank, micro_batch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def relieve(device: torch.device) -> None:
    """Give back what a failed forward or backward left behind."""
    gc.collect()
    allocator.give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def predict(model: torch.nn.Module, features: torch.Tensor, *, bfloat16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions ``(B, V_lh)`` and ``(B, V_rh)``, float32, without dropout."""
    model.eval()
    with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        lh, rh = model(features)
    return lh.float(), rh.float()


class Stepper:
    """Forward, backward, reduction and update of one model.

    Args:
        model: with ``model(features) -> (lh, rh)`` and ``model.loss(lh, rh, lh_target, rh_target)``.
        team: the ranks that gradients are summed over.
        settings: how.
        micro_batch: the largest number of samples in one forward.
    """

    def __init__(self, model: torch.nn.Module, team: Team, settings: StepSettings, *, micro_batch: int) -> None:
        self.model, self.settings, self.micro_batch = model, settings, micro_batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buckets = list(_buckets(self.parameters))
        self.optimizer = _adamw(self.parameters, settings.weight_decay)
        self._team = team
        self.device = self.parameters[0].device
        self._loss: Any = torch.compile(self._plain_loss) if settings.compile else self._plain_loss

    @property
    def reserved_bytes(self) -> int:
        """Bytes of gradients and optimizer state."""
        return 3 * sum(b.numel() * b.element_size() for b in self.buckets)

    def local(self, batch: TrainingBatch, step: int) -> float:
        """Forward and backward of this rank's share, in micro-batches; gradients end up in the buckets.

        Args:
            batch: this rank's share; may be empty.
            step: finished optimizer steps, for the random numbers.

        Returns:
            The sum of the loss over the share's samples.
        """
        for bucket in self.buckets:
            bucket.zero_()
        total = torch.zeros((), dtype=torch.float64)
        self.model.train()
        for number, first in enumerate(range(0, batch.count, self.micro_batch)):
            last = min(first + self.micro_batch, batch.count)
            torch.manual_seed(derive_seed(self.settings.seed, step, self._team.rank, number))
            loss = self._loss(*batch.part(first, last))
            # Weighted by samples, so that the sum over micro-batches and ranks is the mean over the global batch.
            (loss * ((last - first) / batch.global_count)).backward()
            total += loss.detach().double().cpu() * (last - first)
        return float(total)

    def update(self, learning_rate: float, updating: Callable[[], AbstractContextManager[None]] = nullcontext) -> float:
        """Sum gradients over ranks, clip, update. Called after "go" by all ranks.

        Args:
            learning_rate: of this step.
            updating: entered while weights are overwritten.

        Returns:
            The norm of the summed gradient before clipping; when it is not finite the weights were left alone, on
            every rank, because every rank sees the same sum.
        """
        self._team.sum(self.buckets)
        limit = self.settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with updating():  # a copy taken in here would be half one step and half the next
            self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(
        self, features: torch.Tensor, lh: torch.Tensor, rh: torch.Tensor
    ) -> tuple[float, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Mean loss, predictions and responses of some samples, without dropout."""
        self.model.eval()
        outs = self.predict(features)
        loss = self.model.loss(*outs, lh, rh)  # type: ignore[operator]
        return float(loss), outs, (lh, rh)

    def predict(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions ``(B, V_lh)`` and ``(B, V_rh)``, float32, without dropout."""
        return predict(self.model, features, bfloat16=self.settings.bfloat16)

    def shrink(self) -> None:
        """Halve the micro-batch; gradients accumulate to the same effective batch."""
        self.micro_batch = max(1, self.micro_batch // 2)

    def relieve(self) -> None:
        """Give back what a failed forward or backward left behind."""
        relieve(self.device)

    def _plain_loss(self, features: torch.Tensor, lh: torch.Tensor, rh: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            lh_out, rh_out = self.model(features)
        loss: torch.Tensor = self.model.loss(lh_out.float(), rh_out.float(), lh, rh)  # type: ignore[operator]
        return loss


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    """Flat buffers whose slices are the parameters' gradients: backward adds into them, nothing is copied."""
    group: list[tuple[torch.nn.Parameter, int]] = []
    size = 0
    for parameter in reversed(parameters):  # backward fills the last layers first
        if group and (size + parameter.numel()) * 4 > BUCKET_BYTES:
            yield _bucket(group, size)
            group, size = [], 0
        group.append((parameter, size))
        size += -(-parameter.numel() // _ALIGN) * _ALIGN
    if group:
        yield _bucket(group, size)


def _bucket(group: list[tuple[torch.nn.Parameter, int]], size: int) -> torch.Tensor:
    first = group[0][0]
    flat = torch.zeros(size, dtype=first.dtype, device=first.device)
    for parameter, offset in group:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
    return flat


def _adamw(parameters: list[torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with its state allocated now and not in the first step."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, fused=True)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
    return optimizer
