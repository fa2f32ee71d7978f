"""Freed memory stays with the process, until it is asked for."""

import resource
import subprocess
import sys

import pytest

from brainenc import allocator

pytestmark = pytest.mark.skipif(allocator._glibc() is None, reason="only glibc's allocator is told to keep memory")

PAGES = 12_000_000 * 4 // resource.getpagesize()
"""Of one block."""

SCRIPT = """
import resource, sys
import psutil
import torch
from brainenc import allocator

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()
def step():
    return sum(float(torch.ones(12_000_000).sum()) for _ in range(3))  # 48 MB each, freed at once
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = psutil.Process().memory_info().rss
allocator.give_back()
print(faults, held - psutil.Process().memory_info().rss)
"""


def run(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, timeout=120)
    faults, returned = done.stdout.split()
    return int(faults), int(returned)


def test_a_step_gets_the_pages_of_the_last_one_and_they_can_be_had_back():
    faults, returned = run("keep")

    # Of 15 blocks that were freed and taken again. Some may be new: a small object that comes to lie in a freed block
    # makes it too short for the next. Four were seen once in many runs, and all 15 without the setting.
    assert faults < 8 * PAGES
    assert returned > 36_000_000


def test_without_it_each_block_comes_from_the_system():
    """The reason for all this: if it is no longer so, the setting can go."""
    faults, _ = run("leave")

    assert faults > 10 * PAGES
