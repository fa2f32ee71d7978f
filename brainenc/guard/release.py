"""Is the GPU free again? Asked of the driver after everything was let go of, not believed. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from brainenc.guard.nvml import Nvml
from brainenc.units import format_bytes

_NOTICED = 1 << 20
"""Less than this is no holding: allocators round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One GPU before and after. Bytes."""

    name: str
    before: int
    """What this process held; of the whole device where its share cannot be told."""
    after: int
    tensors: int
    """Still given out by this process's allocator: somebody refers to it."""
    own: bool
    """The driver told the share of this process: not in containers with process numbers of their own."""

    def __str__(self) -> str:
        who = "this process held" if self.own else "the device had in use (the share of this process cannot be told)"
        told = f"GPU {self.name}: {who} {format_bytes(self.before)} and now {format_bytes(self.after)}"
        if self.tensors >= _NOTICED:
            held = f"{format_bytes(self.tensors)} of tensors that other code refers to"
            return f"{told}; NOT released: {held}, which go when the process ends."
        if self.own and self.after == 0:
            return f"{told}: released."
        return f"{told}: released but for what the driver keeps for a process, or what others use."


def release(
    let_go: Callable[[], None], allocated: Callable[[], Mapping[str, int]], nvml: Nvml, pid: int | None = None
) -> list[Release]:
    """Let go of GPU memory, and look at each device before and after.

    Args:
        let_go: drops what can be dropped.
        allocated: UUID -> bytes that the allocator of this process has given out.
        nvml: the devices.
        pid: this process, as the driver knows it.
    """
    pid = pid or os.getpid()
    held = nvml.held(pid)
    uses = {use.uuid: use for use in nvml.look()}
    given_out = allocated()
    let_go()
    held_now, given_out_now = nvml.held(pid), allocated()
    found = []
    for use in nvml.look():
        mine, mine_now = held.get(use.uuid), held_now.get(use.uuid)
        own = mine is not None and mine_now is not None and mine >= given_out.get(use.uuid, 0)
        before = uses[use.uuid].used if use.uuid in uses else use.used
        found.append(
            Release(
                name=use.name, before=(mine or 0) if own else before, after=(mine_now or 0) if own else use.used,
                tensors=given_out_now.get(use.uuid, 0), own=own,
            )
        )  # fmt: skip
    return found
