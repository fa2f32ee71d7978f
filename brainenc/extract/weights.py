"""One hash for a set of weights, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash


def hash_weights(state: Mapping[str, torch.Tensor], *, without: Iterable[str] = ()) -> str:
    """xxh3-128 over name, dtype, shape and bytes of every tensor, by name; ``"xxh3:..."``.

    Args:
        state: a state dict. Order does not matter; neither do the device and the strides.
        without: names to leave out: weights that no checkpoint filled and that nothing we take depends on.
    """
    left_out = frozenset(without)
    digest = xxhash.xxh3_128()
    for name in sorted(state.keys() - left_out):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"xxh3:{digest.hexdigest()}"
