"""Ray's elastic scaling, but that it does not count on nodes that are being taken away."""

from __future__ import annotations

import logging
import time
from typing import Any

from brainenc.train.elastic import Nodes, possible_workers

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


def elastic_trainer() -> Any:
    """The class of Ray's trainer, but that it does not count on nodes that are being taken away.

    Ray's elastic scaling counts each node that is alive, while Ray places nothing on one that is drained: as long as
    such a node stays, a restart would ask again and again for more workers than find a place. There is no public way
    to tell it. Where another Ray has not what is needed for this, its own trainer is taken as it is.
    """
    from ray.train import torch as ray_torch

    plain: Any = ray_torch.TorchTrainer
    try:
        policy, _ = staying_policy(), plain._initialize_and_run_controller
    except (ImportError, AttributeError) as error:
        _counts_all(error)
        return plain

    class Trainer(plain):  # type: ignore[misc]
        def _initialize_and_run_controller(self, **given: Any) -> Any:
            try:
                if not isinstance(given["scaling_policy"], policy.__base__):
                    raise TypeError(f"it scales by {type(given['scaling_policy']).__name__}")
                given["scaling_policy"] = policy(self.scaling_config)
            except (KeyError, TypeError, AttributeError) as error:
                _counts_all(error)
            return super()._initialize_and_run_controller(**given)

    return Trainer


def _counts_all(error: Exception) -> None:
    log.warning(
        "This version of Ray is built otherwise than the one that brainenc knows (%s: %s): a node that is drained and "
        "stays counts as room for workers. If training does not restart, remove the node.",
        type(error).__name__, error,
    )  # fmt: skip


def staying_policy() -> Any:
    """The class of an elastic scaling policy for which nodes that are being taken away hold no workers to come.

    Made in a function, so that it travels to Ray's controller by value; Ray itself is imported late.

    Raises:
        ImportError, AttributeError: this version of Ray has no such policy.
    """
    import ray
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

    from brainenc.guard.actors import draining_nodes

    for name in ("_count_possible_workers", "make_decision_for_running_worker_group"):
        getattr(ElasticScalingPolicy, name)

    class Staying(ElasticScalingPolicy):
        def __init__(self, scaling_config: Any) -> None:
            super().__init__(scaling_config)
            self._looked_at = float("-inf")
            self._leaving: frozenset[str] = frozenset()
            self._alive: Nodes = {}

        def _count_possible_workers(self, reserved: Nodes) -> int:
            self._look()
            return possible_workers(
                reserved, self._alive, self._leaving, count=super()._count_possible_workers,
                least=self.scaling_config.min_workers,
            )  # fmt: skip

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            now = worker_group_state.num_workers
            # The time of a notice is worked in: a group that runs is not made smaller for it.
            return NoopDecision() if self._leaving and getattr(decision, "num_workers", now) < now else decision

        def _look(self) -> None:
            """Who is leaving; not more often than Ray asks for what is reserved, which it does in a loop."""
            now = time.monotonic()
            if now - self._looked_at < _LOOK_EVERY_S:
                return
            self._looked_at = now
            try:
                self._leaving = frozenset(draining_nodes())
                nodes = ray.nodes() if self._leaving else []  # type: ignore[no-untyped-call]
            except Exception:  # scaling must not end a run
                log.warning("Could not ask Ray which nodes are being taken away.", exc_info=True)
                return
            self._alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}

    return Staying
