"""The emergency file of PyTorch objects: complete, streamed, verified, refused when torn."""

import errno
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash

from brainenc.errors import CheckpointUnusable, NoSpace
from brainenc.guard import pytorch as files
from brainenc.guard.emergency import EmergencyFiles


def trained(seed=0):
    """A model and its optimizer after two steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
    opt = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(6, 8)).square().mean().backward()
        opt.step()
    return {"model": model, "optimizer": opt}


def save(objects, path, **more):
    return files.write(files.payload(objects, epoch=3, step=7, rng=files.capture_rng(), **more), path)


def equal(a, b):
    """Are two nested states the same, bit by bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_everything_comes_back_bit_by_bit(tmp_path):
    objects = trained()
    n_bytes = save(objects, tmp_path / "emergency_epoch3.pth")

    content = files.load(tmp_path / "emergency_epoch3.pth")
    others = trained(seed=1)
    files.restore(content, others, tmp_path)

    assert (content["epoch"], content["step"]) == (3, 7)
    assert n_bytes == (tmp_path / "emergency_epoch3.pth").stat().st_size
    assert all(equal(objects[name].state_dict(), others[name].state_dict()) for name in objects)


def test_the_file_is_one_that_plain_torch_opens_without_trust(tmp_path):
    """Also with what NumPy leaves in a scheduler's state."""
    objects = trained()
    objects["scheduler"] = torch.optim.lr_scheduler.StepLR(objects["optimizer"], 2)
    objects["scheduler"].best = np.float64(0.5)
    save(objects, tmp_path / "a.pth")

    plain = torch.load(tmp_path / "a.pth", weights_only=True)

    assert set(plain["model_state_dict"]) == set(objects["model"].state_dict())
    assert plain["scheduler_state_dict"]["best"] == 0.5


def test_random_numbers_go_on_where_they_were(tmp_path):
    states = files.capture_rng()
    wanted = (random.random(), np.random.rand(), torch.rand(3))

    files.restore_rng(states)

    found = (random.random(), np.random.rand(), torch.rand(3))
    assert found[:2] == wanted[:2]
    assert torch.equal(found[2], wanted[2])


def test_anybody_can_check_the_sum(tmp_path):
    """``xxh128sum -c a.pth.xxh128``: the line that tool writes and reads."""
    save(trained(), tmp_path / "a.pth")

    wanted = xxhash.xxh3_128((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert (tmp_path / "a.pth.xxh128").read_text() == f"{wanted}  a.pth\n"


@pytest.mark.parametrize("where", [0.01, 0.3, 0.6, 0.9])
def test_a_flipped_bit_is_never_accepted(tmp_path, where):
    path = tmp_path / "a.pth"
    save(trained(), path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)

    with pytest.raises(CheckpointUnusable, match="XXH128"):
        files.load(path)


def test_a_flipped_bit_in_the_weights_is_noticed_without_the_sum_file_too(tmp_path):
    """By the CRCs inside; a sum that was lost in a crash is no loss."""
    path, objects = tmp_path / "a.pth", trained()
    save(objects, path)
    files.sum_path(path).unlink()
    files.verify(path)
    data = bytearray(path.read_bytes())
    data[data.find(objects["model"][0].weight.detach().numpy().tobytes()) + 17] ^= 4
    path.write_bytes(data)

    with pytest.raises(CheckpointUnusable, match="damaged"):
        files.load(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("with_sum", [True, False])
def test_a_torn_file_is_never_accepted(tmp_path, kept, with_sum):
    path = tmp_path / "a.pth"
    save(trained(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    if not with_sum:
        files.sum_path(path).unlink()

    with pytest.raises(CheckpointUnusable, match=r"torn|XXH128"):
        files.load(path)


def test_a_new_file_replaces_the_old_one_and_its_sum(tmp_path):
    path = tmp_path / "a.pth"
    save(trained(seed=1), path)
    save(trained(seed=2), path)

    assert equal(files.load(path)["model_state_dict"], dict(trained(seed=2)["model"].state_dict()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.pth.xxh128"]


def test_of_two_that_save_at_once_each_sum_stays_with_its_file(tmp_path, monkeypatch):
    """As two ranks of one training do. The second comes while the first has put its file there, and not yet its sum."""
    path, begun, second_is_done = tmp_path / "a.pth", threading.Event(), threading.Event()
    flush = files.atomic.fsync_dir

    def slow(folder):
        flush(folder)
        if not begun.is_set():
            begun.set()
            second_is_done.wait(0.5)

    monkeypatch.setattr(files.atomic, "fsync_dir", slow)
    first = threading.Thread(target=save, args=(trained(seed=1), path))
    first.start()
    begun.wait(30)
    save(trained(seed=2), path)
    second_is_done.set()
    first.join()

    assert equal(files.load(path)["model_state_dict"], dict(trained(seed=2)["model"].state_dict()))


def test_a_disk_that_gives_back_other_bytes_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_file_hash", lambda path: "0" * 32)

    with pytest.raises(CheckpointUnusable, match="reads back other bytes"):
        save(trained(), tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_before_the_new_sum_leaves_a_file_that_is_accepted(tmp_path, monkeypatch):
    """The old sum is gone before the new file takes the name: it must not condemn it."""
    path = tmp_path / "a.pth"
    save(trained(seed=1), path)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.atomic, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(trained(seed=2), path)

    assert equal(files.load(path)["model_state_dict"], dict(trained(seed=2)["model"].state_dict()))


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "space", lambda folder: type("Room", (), {"free": 10})())

    with pytest.raises(NoSpace, match="10 B are free"):
        save(trained(), tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_with_its_name(tmp_path):
    save(trained(), tmp_path / "a.pth")
    other = {"model": torch.nn.Linear(3, 3)}

    with pytest.raises(CheckpointUnusable, match="does not fit this model"):
        files.restore(files.load(tmp_path / "a.pth"), other, tmp_path / "a.pth")


def test_a_missing_state_is_named(tmp_path):
    save({"model": trained()["model"]}, tmp_path / "a.pth")

    with pytest.raises(CheckpointUnusable, match="no state of 'optimizer'"):
        files.restore(files.load(tmp_path / "a.pth"), trained(), tmp_path / "a.pth")


class Opaque:
    """Something with a state that is no plain value."""

    def state_dict(self):
        return {"path": Path("a")}


def test_foreign_objects_need_trust(tmp_path):
    save({"mine": Opaque()}, tmp_path / "a.pth")

    with pytest.raises(CheckpointUnusable, match="trust=True"):
        files.load(tmp_path / "a.pth")
    assert files.load(tmp_path / "a.pth", trust=True)["mine_state_dict"] == {"path": Path("a")}


def test_whatever_torch_says_of_a_damaged_file_it_is_damaged(tmp_path, monkeypatch):
    """Some bits no sum covers once the sum file is gone, and torch has many words for them."""
    save(trained(), tmp_path / "a.pth")
    files.sum_path(tmp_path / "a.pth").unlink()

    def confused(*_, **__):
        raise NotImplementedError("no storage type 7")

    monkeypatch.setattr(torch, "load", confused)
    with pytest.raises(CheckpointUnusable, match="damaged: NotImplementedError: no storage type 7"):
        files.load(tmp_path / "a.pth")


def test_a_file_that_does_not_fit_into_memory_now_is_not_damaged(tmp_path, monkeypatch):
    """Passed over, it would have the training begin again."""
    save(trained(), tmp_path / "a.pth")

    def refused(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(RuntimeError, match="allocate memory"):
        files.load(tmp_path / "a.pth")


def test_a_checkpoint_of_somebody_else_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pth")

    with pytest.raises(CheckpointUnusable, match="format"):
        files.load(tmp_path / "a.pth")


def test_the_size_of_a_checkpoint_is_known_before_the_first_step():
    objects = trained()
    fresh = {"model": objects["model"], "optimizer": torch.optim.AdamW(objects["model"].parameters())}

    assert files.payload_bytes(fresh) == pytest.approx(files.payload_bytes(objects), rel=0.1)


_UNDER_LIMIT = """
import resource, sys, torch
from pathlib import Path
from brainenc.guard import pytorch as files
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(16)])      # tensors of 4 MB
opt = torch.optim.Adam(model.parameters())
for p in model.parameters(): p.grad = torch.ones_like(p)
opt.step(); opt.zero_grad(set_to_none=True)
objects = {"model": model, "optimizer": opt}
folder, small = Path(sys.argv[1]), {"model": torch.nn.Linear(2, 2)}
files.write(files.payload(small, epoch=0, step=0, rng=files.capture_rng()), folder / "first.pth")
status = dict(line.split(":") for line in open("/proc/self/status"))
data = int(status["VmData"].split()[0]) * 1024
limit = data + (4 << 20) + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(files.write(files.payload(objects, epoch=0, step=0, rng=files.capture_rng()), folder / "a.pth"))
files.verify(folder / "a.pth")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
def test_saving_needs_no_more_than_the_largest_tensor_and_64_mb(tmp_path):
    """200 MB of state are saved where only 68 MB more may be allocated."""
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-800:]
    assert int(done.stdout) > 200_000_000


def test_modules_and_optimizer_states_give_up_their_memory():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()

    files.empty_tensors({"model": model, "optimizer": optimizer}, lambda tensor: tensor.dtype == torch.float32)

    assert all(p.numel() == 0 and p.grad is None for p in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.numel() for value in states} == {0}
    assert model[1].num_batches_tracked.numel() == 1, "not asked for"


def test_without_a_gpu_there_is_nothing_to_release():
    model = torch.nn.Linear(2, 2)

    assert files.release_gpus({"model": model}) == []
    assert model.weight.numel() == 4


@pytest.mark.root
def test_a_disk_that_fills_while_saving_is_told_and_the_next_place_takes_it(small_disk, tmp_path, monkeypatch):
    """There was room when it was asked for; torch ends its archive all the same, and fails again in that."""
    monkeypatch.setattr(files, "space", lambda folder: None)
    big = {"model": torch.nn.Linear(1500, 1500)}

    with pytest.raises(OSError, match="No space left") as failed:
        save(big, small_disk / "a.pth")
    assert failed.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []

    saved = EmergencyFiles(small_disk, [tmp_path / "second"]).save(3, lambda path: save(big, path))
    assert saved.path == str(tmp_path / "second/emergency_epoch3.pth")
    assert "No space left on device" in saved.failures[0]


class OnGpu:
    """Something whose tensors lie on a GPU, as far as anybody can tell here."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def state_dict(self):
        return {
            str(n): SimpleNamespace(untyped_storage=None, is_cuda=True, device=SimpleNamespace(index=n))
            for n in self.numbers
        }


@pytest.fixture
def two_gpus(monkeypatch):
    """A process that has used the first of two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: [900, 0][i])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: [300, 0][i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"uuid-{i}"))


@pytest.mark.usefixtures("two_gpus")
def test_only_gpus_that_are_used_count():
    assert files.gpus_in_use({"model": OnGpu(1), "optimizer": OnGpu(1)}) == {1: "GPU-uuid-1"}
    assert files.gpus_in_use({"model": torch.nn.Linear(2, 2)}) == {}
    assert files.gpu_uuids() == ["GPU-uuid-0"]
    assert files.gpu_slack() == {"GPU-uuid-0": 600}


def test_asking_for_gpus_starts_nothing_on_them(monkeypatch):
    """A script on the CPU of a machine with GPUs: a context there would cost it half a gigabyte of them."""

    def start(i):
        raise AssertionError("this would initialise CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, start)

    assert files.gpu_uuids() == []
    assert files.gpu_allocations() == []
    assert files.gpu_slack({"model": torch.nn.Linear(2, 2)}) == {}
