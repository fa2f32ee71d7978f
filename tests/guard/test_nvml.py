"""NVML through ``ctypes``, against a shared library of our own with the driver's signatures."""

import ctypes
import shutil
import subprocess

import pytest

from brainenc.guard.nvml import Nvml
from brainenc.guard.release import release

_C = r"""
#include <stdio.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct device { int number; } *device_t;
static struct device devices[2] = {{1}, {2}};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, device_t *d) { if (i > 1) return 2; *d = &devices[i]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *u, device_t *d) {
  if (!strcmp(u, "GPU-1")) { *d = &devices[0]; return 0; }
  if (strcmp(u, "GPU-2")) return 6; *d = &devices[1]; return 0; }
int nvmlDeviceGetUUID(device_t d, char *u, unsigned int n) { snprintf(u, n, "GPU-%d", d->number); return 0; }
int nvmlDeviceGetName(device_t d, char *s, unsigned int n) { snprintf(s, n, "Fake %d", d->number); return 0; }
int nvmlDeviceGetMemoryInfo(device_t d, memory_t *m) {
  m->total = 16000000000ULL; m->used = d->number * 5000000000ULL; m->free = m->total - m->used; return 0; }
typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } process_t;
unsigned long long mine = 4000000000ULL;
int nvmlDeviceGetComputeRunningProcesses_v3(device_t d, unsigned int *n, process_t *p) {
  if (d->number == 2) { *n = 0; return 0; }
  if (*n < 2 || !p) { *n = 2; return 7; }
  *n = 2; p[0].pid = 7; p[0].used = 1000000000ULL; p[1].pid = 42; p[1].used = mine; return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A driver library with two devices."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(_C)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "nvml.so", folder / "nvml.c"], check=True, timeout=60)
    return ctypes.CDLL(str(folder / "nvml.so"))


def test_every_call_has_the_drivers_signature(library):
    found = Nvml(library).look({"GPU-1": 1_000_000_000})

    assert [(g.uuid, g.name, g.used, g.limit, g.slack) for g in found] == [
        ("GPU-1", "Fake 1", 5_000_000_000, 16_000_000_000, 1_000_000_000),
        ("GPU-2", "Fake 2", 10_000_000_000, 16_000_000_000, 0),
    ]
    assert found[0].fraction == 0.25


def test_only_the_named_devices_are_read(library):
    assert [g.uuid for g in Nvml(library, uuids=["GPU-2", "GPU-7"]).look()] == ["GPU-2"]


def holding(library, n_bytes):
    ctypes.c_ulonglong.in_dll(library, "mine").value = n_bytes


def test_what_one_process_holds_is_told_for_each_device(library):
    holding(library, 4_000_000_000)

    assert Nvml(library).held(42) == {"GPU-1": 4_000_000_000, "GPU-2": 0}
    assert Nvml(library).held(43) == {"GPU-1": 0, "GPU-2": 0}
    holding(library, 2**64 - 1)
    assert Nvml(library).held(42)["GPU-1"] is None, "the driver does not tell on this system"


@pytest.mark.parametrize(("after", "tensors", "told"), [
    (0, 0, "this process held 4 GB and now 0 B: released."),
    (450_000_000, 0, "this process held 4 GB and now 450 MB: released but for what the driver keeps"),
    (3_000_000_000, 2_500_000_000, "NOT released: 2.5 GB of tensors that other code refers to"),
])  # fmt: skip
def test_a_release_is_checked_and_what_is_still_held_is_said(library, after, tensors, told):
    holding(library, 4_000_000_000)
    given_out = {"GPU-1": 3_500_000_000}

    def let_go():
        holding(library, after)
        given_out["GPU-1"] = tensors

    (found,) = release(let_go, lambda: dict(given_out), Nvml(library, uuids=["GPU-1"]), pid=42)

    assert told in str(found)


def test_where_process_numbers_differ_the_whole_device_is_told(library):
    (found,) = release(lambda: None, lambda: {"GPU-1": 10**9}, Nvml(library, uuids=["GPU-1"]), pid=4711)

    assert not found.own
    assert "the device had in use (the share of this process cannot be told) 5 GB" in str(found)


def test_which_devices_are_read_may_change(library):
    nvml = Nvml(library, uuids=[])
    assert nvml.look() == []

    nvml.watch(["GPU-2"])
    assert [g.uuid for g in nvml.look()] == ["GPU-2"]
    nvml.watch([])
    assert nvml.look() == []
