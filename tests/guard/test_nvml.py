"""NVML through ``ctypes``, against a shared library of our own with the driver's signatures."""

import ctypes
import shutil
import subprocess

import pytest

from brainenc.guard.nvml import Nvml

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
  if (strcmp(u, "GPU-2")) return 6; *d = &devices[1]; return 0; }
int nvmlDeviceGetUUID(device_t d, char *u, unsigned int n) { snprintf(u, n, "GPU-%d", d->number); return 0; }
int nvmlDeviceGetName(device_t d, char *s, unsigned int n) { snprintf(s, n, "Fake %d", d->number); return 0; }
int nvmlDeviceGetMemoryInfo(device_t d, memory_t *m) {
  m->total = 16000000000ULL; m->used = d->number * 5000000000ULL; m->free = m->total - m->used; return 0; }
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
