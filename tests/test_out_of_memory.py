"""What counts as out of memory, for extraction, training and guarded scripts alike."""

import errno

import pytest
import torch

from brainenc.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mmap: Cannot allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("no number"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA out of memory"), False),
        (None, False),
    ],
)
def test_what_less_at_a_time_may_help(error, wanted):
    assert is_out_of_memory(error) is wanted
