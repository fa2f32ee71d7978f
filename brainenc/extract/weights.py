"""One hash for a set of weights, the same on every machine and under every version of the libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash


def hash_weights(state: Mapping[str, torch.Tensor], *, without: Iterable[str] = ()) -> str:
    """xxh3-128 over dtype, shape and bytes of every tensor; ``"xxh3:..."``.

    Names are left out, and with them the order: libraries rename weights between versions (transformers 5 calls
    ``q_proj`` what 4 called ``query``), and a store must not be refused for that. Two models of one architecture and
    the same tensors in other places do not occur.

    Args:
        state: a state dict, on any device.
        without: names to leave out: weights that no checkpoint filled and that nothing we take depends on.
    """
    left_out = frozenset(without)
    digests = sorted(_digest(tensor) for name, tensor in state.items() if name not in left_out)
    return f"xxh3:{xxhash.xxh3_128(b''.join(digests)).hexdigest()}"


def _digest(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{str(plain.dtype).removeprefix('torch.')}|{tuple(plain.shape)}|".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
