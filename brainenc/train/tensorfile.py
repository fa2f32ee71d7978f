"""Writing ``model.safetensors`` tensor by tensor: the library's own writer copies the whole model first.

An emergency checkpoint is written when memory is short, so its extra memory is one tensor at most (a copy to the host
when it lies on a GPU, nothing otherwise). The format is the safetensors library's, which reads it back.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

import torch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(file: IO[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in safetensors format.

    Args:
        file: open for writing; only ``write`` is used.
        tensors: name -> tensor on any device.
        metadata: text beside them.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        spot = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        header[name] = spot
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    host = tensor.detach().to("cpu").contiguous()
    flat: Any = host.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
