"""Nothing is lost, at any instant: death and refusal at every step, and broken stores to test these tests."""

import contextlib
import errno
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainenc import atomic
from brainenc.errors import NoSpace
from brainenc.featurestore import layout, open_store, recovery
from brainenc.featurestore.collection import Collection
from tests.featurestore.faults import Injector, extract_all, problems, public, run_and_die
from tests.featurestore.making import KEY, tree

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The files of a store that nobody disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    extract_all(folder)
    return tree(folder)


@pytest.mark.parametrize(
    ("what", "stride"), [("kill", 3), pytest.param("kill", 1, marks=pytest.mark.chaos), ("torn", 1)]
)
def test_death_at_every_step_loses_nothing_and_the_same_command_finishes(tmp_path, calm, what, stride):
    died, at = True, 0
    while died:
        at += stride
        folder = tmp_path / str(at)
        died, acknowledged = run_and_die(folder, at, what)
        assert problems(folder, acknowledged) == []
        before = {name: data for name, data in public(tree(folder)).items() if "shard" in name} if died else {}
        extract_all(folder)
        assert public(tree(folder)) == calm
        assert before.items() <= calm.items(), "what was sealed was made again"
        store = open_store(folder)
        recovery.gc(store, list(recovery.debris(store, just_opened_s=0)))
        assert tree(folder) == calm
    assert at > (50 if what == "kill" else 9), "the sweep did not reach every step"


@pytest.mark.chaos
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deaths=st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_death_upon_death_loses_nothing(tmp_path_factory, calm, deaths):
    """The command that comes after a death dies, too, somewhere else."""
    folder = tmp_path_factory.mktemp("deaths")
    for at in deaths:
        _, acknowledged = run_and_die(folder, at)
        assert problems(folder, acknowledged) == []
    extract_all(folder)
    assert public(tree(folder)) == calm


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk failing"])
def test_refusal_of_every_step_is_said_and_leaves_nothing_half_done(tmp_path, calm, code):
    """One step fails, the command ends with an error (or goes on where it can), the same command again finishes."""
    at, hit = 0, "first"
    while hit:
        at += 1
        folder = tmp_path / str(at)
        injector = Injector(at, code)
        with injector.active(), contextlib.suppress(NoSpace if code == errno.ENOSPC else OSError):
            extract_all(folder)
        hit = injector.hit
        assert problems(folder) == []
        assert [name for name in tree(folder) if name.endswith(".partial")] == [] or hit == "unlink"
        extract_all(folder)
        assert public(tree(folder)) == calm
    assert at > 50


class PublishesInPlace(Collection):
    """Broken on purpose: copies under the public name, instead of giving a finished file that name."""

    def _publish(self, partial, receipt):
        data = partial.read_bytes()
        fd = os.open(self.place.local(self.shard_name(receipt.shard)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for start in range(0, len(data), 100):
            os.pwrite(fd, data[start : start + 100], start)
        os.close(fd)
        return self._write_receipt(receipt)


class ReceiptFirst(Collection):
    """Broken on purpose: the receipt is there before the shard is."""

    def _publish(self, partial, receipt):
        self._write_receipt(receipt)
        return super()._publish(partial, receipt)


class ReceiptInPlace(Collection):
    """Broken on purpose: the receipt is written under its public name, bit by bit."""

    def _publish(self, partial, receipt):
        self.place.publish(partial, self.shard_name(receipt.shard))
        fd = os.open(self.place.local(layout.receipt_file(self.key, receipt.shard)), os.O_WRONLY | os.O_CREAT, 0o644)
        for position, byte in enumerate(receipt.to_bytes()[::40]):
            os.pwrite(fd, bytes([byte]), position)
        os.pwrite(fd, receipt.to_bytes(), 0)
        os.close(fd)
        return receipt


@pytest.mark.chaos
@pytest.mark.parametrize("broken", [PublishesInPlace, ReceiptFirst, ReceiptInPlace])
def test_the_sweep_sees_a_store_that_is_broken_on_purpose(tmp_path, broken):
    """A test of the tests: each of these passes when nobody dies."""
    extract_all(tmp_path / "calm", collection_class=broken)
    assert problems(tmp_path / "calm") == []
    seen, died, at = 0, True, 0
    while died and not seen:
        at += 1
        died, acknowledged = run_and_die(tmp_path / str(at), at, collection_class=broken)
        seen += bool(problems(tmp_path / str(at), acknowledged))
    assert seen


def test_the_sweep_sees_an_acknowledgement_that_comes_too_early(tmp_path, monkeypatch):
    """A test of the tests: the seal returns before the receipt is there."""

    class AcknowledgesEarly(Collection):
        def _publish(self, partial, receipt):
            return receipt

    died, acknowledged = run_and_die(tmp_path, 10**6, collection_class=AcknowledgesEarly)
    assert not died
    assert problems(tmp_path, acknowledged)


def test_every_name_is_flushed_with_its_folder(tmp_path, monkeypatch):
    """What a kill cannot show: each public name is followed by a flush of its folder, each file flushed before."""
    events, real_fsync, real_link = [], os.fsync, os.link

    def fsync(fd):
        events.append(("flush", os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def link(source, target):
        events.append(("name", os.fspath(source), os.fspath(target)))
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    extract_all(tmp_path / "store")
    names = [i for i, event in enumerate(events) if event[0] == "name" and "/.probe" not in event[1]]
    assert len(names) >= 9
    for i in names:
        _, source, target = events[i]
        assert ("flush", source) in events[:i], f"{target} was named before it was flushed"
        assert ("flush", os.path.dirname(target)) in events[i:], f"the folder of {target} was not flushed"


def test_a_manifest_that_was_made_while_its_answer_was_lost_is_made_once(tmp_path, monkeypatch):
    """The driver commits, dies before it knows, and commits again."""
    extract_all(tmp_path)
    before = tree(tmp_path)
    collection = open_store(tmp_path).collection(KEY)
    monkeypatch.setattr(atomic, "write_new", lambda *_: False)  # "somebody else was first": our own lost answer
    assert collection.commit().shards == collection.manifest().shards
    assert tree(tmp_path) == before
