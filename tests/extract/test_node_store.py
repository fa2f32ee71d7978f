"""Shards that wait on a node's disk and are moved into the shared store, once, whatever happens meanwhile."""

import os

import pytest

from brainenc.errors import ProvenanceMismatch, UsageError
from brainenc.extract.extractor import Extractor
from brainenc.extract.node_store import collect
from brainenc.extract.prepare import create, looked_again, survey
from tests.extract.conftest import save_images, tree
from tests.extract.test_extractor import configured, run


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("few") / "few", 20)


def on_node(config, tasks=slice(None)) -> None:
    """What one node computes of what is left."""
    found = survey(config)
    create(found)
    extractor = Extractor(found.job)
    assert {extractor.extract(task).status for task in found.tasks[tasks]} == {"sealed"}
    extractor.close()


def shards(store) -> dict[str, bytes]:
    return {name: data for name, data in tree(store).items() if "/shard-" in name}


def test_two_nodes_shards_are_moved_and_equal_those_written_in_place(tmp_path, few, miniature):
    run(configured(tmp_path / "direct", few, miniature))
    shared = configured(tmp_path / "shared", few, miniature)
    nodes = [str(tmp_path / "a"), str(tmp_path / "b")]
    for node, part in zip(nodes, (slice(0, 2), slice(1, 3)), strict=True):  # shard 1 on both, as after a lost answer
        on_node(shared.with_(node_store=node), part)
    assert not shards(tmp_path / "shared")

    moved = [collect(node, shared.store) for node in nodes]

    assert [(m.shards, m.error) for m in moved] == [(4, None), (2, None)]
    assert shards(tmp_path / "shared") == shards(tmp_path / "direct")
    assert not any(shards(tmp_path / node) for node in "ab"), "moved, not copied"
    found = survey(shared)
    assert not found.tasks
    assert [len(c.manifest().shards) for c in create(found).values()] == [3, 3]
    assert [collect(node, shared.store).shards for node in nodes] == [0, 0]


def test_what_a_lost_node_had_is_to_be_done_again(tmp_path, few, miniature):
    config = configured(tmp_path / "shared", few, miniature, node_store=str(tmp_path / "lost"))
    found = survey(config)
    collections = create(found)
    on_node(config, slice(0, 1))

    assert collect(str(tmp_path / "another"), config.store).shards == 0
    assert len(looked_again(found, collections).tasks) == 3
    assert collect(str(tmp_path / "lost"), config.store).shards == 2
    assert len(looked_again(found, collections).tasks) == 2


def test_a_folder_may_be_named_by_a_variable_of_the_node(tmp_path, few, miniature, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "nvme"))
    config = configured(tmp_path / "shared", few, miniature, node_store="$NODE_DISK/brainenc")
    on_node(config)
    assert shards(tmp_path / "nvme" / "brainenc")
    monkeypatch.delenv("NODE_DISK")

    answer = collect("$NODE_DISK/brainenc", config.store)

    assert isinstance(answer.error, UsageError)
    assert os.uname().nodename in str(answer.error)
    assert not shards(tmp_path / "shared")


def test_shards_of_a_store_that_was_made_anew_are_not_mixed_in(tmp_path, few, miniature):
    """The shared store was made again, cut otherwise: what waits on a node for the old one is left there."""
    node = str(tmp_path / "node")
    config = configured(tmp_path / "shared", few, miniature, node_store=node)
    on_node(config)
    (tmp_path / "shared").rename(tmp_path / "old")
    on_node(config.with_(rows_per_shard=4))

    answer = collect(node, config.store)

    assert isinstance(answer.error, ProvenanceMismatch)
    assert answer.shards == 10
    assert len(shards(tmp_path / "shared")) == 2 * 10
    assert not survey(config).tasks
