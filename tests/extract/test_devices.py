"""What counts as out of memory, and whose memory features are kept in."""

import errno
from pathlib import Path

import pytest
import torch

from brainenc.extract.devices import is_out_of_memory
from brainenc.extract.features import Feature
from brainenc.extract.outputs import OutputBuffers


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("no number"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_what_less_at_a_time_may_help(error, wanted):
    assert is_out_of_memory(error) is wanted


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists its pages")
def test_features_are_kept_in_memory_of_this_process_alone():
    """Shared pages would count as shared memory, which containers bound apart."""
    taken = OutputBuffers(torch.float16).take(3, {Feature("3", "q"): (1024, 512)})
    address = taken[Feature("3", "q")].data_ptr()

    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    (mode,) = [mode for span, mode, *_ in lines if int(span.split("-")[0], 16) <= address < int(span.split("-")[1], 16)]

    assert mode == "rw-p"
    taken[Feature("3", "q")].fill_(1.0)


def test_features_are_kept_where_private_pages_cannot_be_asked_for(monkeypatch):
    """On Windows."""
    monkeypatch.delattr("mmap.MAP_PRIVATE", raising=False)

    taken = OutputBuffers(torch.float32).take(2, {Feature("3", "q"): (4,)})

    assert taken[Feature("3", "q")].fill_(2.0).sum() == 16
