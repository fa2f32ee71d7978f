"""What to do when nodes of a run are about to be taken away: preemption notices, autoscalers, maintenance.

A plain class: who is leaving and what is left is passed in (``actors.py`` asks Ray), nothing is read or sent. A node
that is being drained works until its deadline, so the run does, too: it saves when it hears of it, and again shortly
before the end. Where too little would be left, it saves and stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from brainenc.guard.messages import OrderKind

AGAIN_S = 10.0
"""The second checkpoint is ordered so long before a deadline, or after half of the time given, whichever is later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What to order."""

    kind: OrderKind
    reason: str
    nodes: tuple[str, ...]


@dataclass(slots=True)
class _Notice:
    heard_at: float
    deadline: float
    """Seconds since 1970; 0: nobody said."""
    told_again: bool = False

    @property
    def again_at(self) -> float:
        return self.deadline - min(AGAIN_S, (self.deadline - self.heard_at) / 2)


class Departures:
    """Which of a run's nodes are leaving, and what was ordered for it.

    Args:
        home: the driver's node; without it the run cannot go on.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._notices: dict[str, _Notice] = {}

    def look(
        self, draining: Mapping[str, float], workers: Mapping[str, int], now: float, *, goes_on: bool
    ) -> Advice | None:  # fmt: skip
        """What to order now, None when nothing.

        Args:
            draining: node -> when it goes, in seconds since 1970, 0 where nobody said. Any node of the cluster.
            workers: node -> workers of this run that are on it.
            now: seconds since 1970.
            goes_on: the nodes that stay can hold the run.
        """
        ours = {node: end for node, end in draining.items() if workers.get(node) or node == self._home}
        self._notices = {node: notice for node, notice in self._notices.items() if node in draining}
        fresh = tuple(sorted(ours.keys() - self._notices.keys()))
        for node in fresh:
            self._notices[node] = _Notice(now, ours[node])
        if fresh:
            kind: OrderKind = "checkpoint" if goes_on and self._home not in fresh else "stop"
            return Advice(kind=kind, reason=_reason(fresh, ours, kind, now), nodes=fresh)
        due = tuple(sorted(node for node in ours if self._is_due(node, now)))
        for node in due:
            self._notices[node].told_again = True
        return Advice(kind="checkpoint", reason=_reason(due, ours, "checkpoint", now), nodes=due) if due else None

    def _is_due(self, node: str, now: float) -> bool:
        notice = self._notices[node]
        return bool(notice.deadline) and not notice.told_again and now >= notice.again_at


def _reason(nodes: tuple[str, ...], ends: Mapping[str, float], kind: OrderKind, now: float) -> str:
    known = [ends[node] for node in nodes if ends[node]]
    when = f" in {max(0.0, min(known) - now):.0f} s" if known else ""
    names = ", ".join(node[:8] for node in nodes)
    what = f"node {names} is" if len(nodes) == 1 else f"nodes {names} are"
    then = "" if kind == "checkpoint" else ", and what is left cannot hold this run"
    return f"{what} being taken away{when}{then}"
