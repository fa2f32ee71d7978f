"""Whose memory features are kept in."""

from pathlib import Path

import pytest
import torch

from brainenc.extract.features import Feature
from brainenc.extract.outputs import OutputBuffers


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
