"""Copies of the training state that are written while training goes on.

At a step boundary the state is copied into memory that was allocated once; a thread writes the copy. The copy is a
second model, so that nothing but the pause for the copying itself is on the critical path.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from brainenc.train.checkpoint import Contents


class StateCopy:
    """Host memory for one copy of weights and optimizer state. Worker, training thread."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._live, self._optimizer = model, optimizer
        self._model = copy.deepcopy(model).to("cpu")
        self._state = _map(optimizer.state_dict(), lambda t: torch.empty_like(t, device="cpu").zero_())

    def take(self, contents: Contents) -> Contents:
        """Copy the state now; the result refers to the copy."""
        with torch.no_grad():
            for target, source in zip(_tensors(self._model), _tensors(self._live), strict=True):
                target.copy_(source)
        _copy_into(self._state, self._optimizer.state_dict())
        return replace(contents, weights=self._model.state_dict, optimizer=self._state)


def copy_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a :class:`StateCopy` takes."""
    total = [sum(t.numel() * t.element_size() for t in _tensors(model))]
    _map(optimizer.state_dict(), lambda t: total.append(t.numel() * t.element_size()))
    return sum(total)


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _map(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, change) for value in tree)
    return tree


def _copy_into(target: Any, source: Any) -> None:
    """Overwrite the tensors of one tree with those of another of the same shape, and its numbers too."""
    for key in source if isinstance(source, Mapping) else range(len(source)):
        value = source[key]
        if isinstance(value, torch.Tensor):
            target[key].copy_(value)
        elif isinstance(value, Mapping | list):
            _copy_into(target[key], value)
        elif isinstance(target, dict | list):
            target[key] = value


class Background:
    """One thread that does one job at a time; what went wrong is asked for. Worker, training thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._well = False

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Run a job, after the one before it has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job in hand."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> Exception | None:
        """What a job has raised since this was asked last."""
        error, self._error = self._error, None
        return error

    def succeeded(self) -> bool:
        """Whether a job has ended well since this was asked last."""
        well, self._well = self._well, False
        return well

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self._error = error
        else:
            self._well = True
