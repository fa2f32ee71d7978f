"""The states that objects hand out, as values that can be read back without trusting whoever wrote them.

A file of tensors, numbers and text runs no code when it is read. Scores and histories are often NumPy arrays, which
would have to be pickled: they are kept as the bytes of a tensor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

_ARRAY = "__numpy__"
"""Marks an array."""


def plain(value: Any) -> Any:
    """NumPy scalars, as schedulers keep them, become Python's: a file without foreign objects loads without trust."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "O") in "biufcmMSU":
        return _array(value)
    return value


def _array(value: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    kept = torch.from_numpy(data if data.flags.writeable else data.copy())
    return {_ARRAY: kept, "dtype": value.dtype.str, "shape": list(value.shape)}


def as_given(value: Any) -> Any:
    """Of what :func:`plain` has made: arrays where they were."""
    if isinstance(value, dict) and _ARRAY in value:
        import numpy as np

        return np.frombuffer(value[_ARRAY].numpy().tobytes(), np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if isinstance(value, dict):
        for key in value:  # in place: a module's is a dict of its own kind, with versions as an attribute
            value[key] = as_given(value[key])
        return value
    if type(value) in (list, tuple):
        return type(value)(as_given(item) for item in value)
    return value


def _without_data(value: Any) -> Any:
    """The same with empty tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        return torch.empty(0, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _without_data(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_data(item) for item in value)
    return value


def doubts(objects: Mapping[str, Any]) -> list[str]:
    """A sentence for every object whose state could not be saved, or not be read back without ``trust``. Tries it."""
    import pickle

    import torch

    found = []
    for name, thing in objects.items():
        file = io.BytesIO()
        try:
            torch.save(_without_data(plain(thing.state_dict())), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            found.append(
                f"The state of {name!r} holds {what[1] if what else 'objects'}, which is neither tensor, array nor "
                "number: it is saved, but `guard.resume()` will need `trust=True`."
            )
        except Exception as error:
            found.append(f"The state of {name!r} cannot be saved: {type(error).__name__}: {error}.")
        if isinstance(thing, torch.optim.LBFGS):
            found.append(
                "LBFGS computes inside its update: memory that ends there leaves weights of no step, which are not "
                "saved. Save them yourself from time to time."
            )
    return found
