"""Planning asks the machines that will do the work, and only when there is work."""

import sys

import pytest

from brainenc.errors import UsageError
from brainenc.extract.estimate import estimate
from brainenc.extract.machines import Machines, Node
from brainenc.extract.prepare import survey
from brainenc.extract.site import Here, site_of
from tests.extract.test_extractor import configured, run


class Cluster(Here):
    """Two machines with GPUs, and a head that has none and drives; measures nothing."""

    def __init__(self):
        super().__init__(Machines((Node(0), Node(8, 1), Node(8, 1)), cluster=True))

    def settle_micro_batch(self, job, image_shape, features):
        assert (job.device, job.threads) == ("cuda", 8)
        return 16


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_head_without_gpu_plans_for_the_gpus_of_its_cluster(tmp_path, miniature, pictures, device):
    config = configured(tmp_path / "s", pictures, miniature, device=device, threads=None, micro_batch=None)

    found = survey(config, site=Cluster)

    assert (found.device, found.actors, found.threads, found.decode_threads) == ("cuda", 2, 8, 7)
    assert {w.micro_batch for w in found.wanted} == {32}


def test_what_is_asked_for_stays(tmp_path, miniature, pictures):
    config = configured(tmp_path / "s", pictures, miniature, device="cpu", threads=3, actors=5, decode_threads=2)

    found = survey(config, site=Cluster)

    assert (found.device, found.actors, found.threads, found.decode_threads) == ("cpu", 5, 3, 2)


def test_an_automatic_batch_is_settled_where_the_work_will_be_done(tmp_path, miniature, pictures):
    config = configured(tmp_path / "s", pictures, miniature, device="auto", threads=None, micro_batch="auto")

    assert {w.micro_batch for w in survey(config, site=Cluster).wanted} == {16}


def test_a_repeat_with_nothing_to_do_asks_nobody(tmp_path, miniature, pictures, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "cache"))
    config = configured(tmp_path / "s", pictures, miniature)
    survey(config, repeat=True)
    run(config)

    for device in ("cpu", "cuda", "auto"):
        found = survey(config.with_(device=device, address="10.0.0.5:6379"), site=pytest.fail, repeat=True)
        assert not found.tasks


def test_without_an_address_the_site_is_here_and_no_ray_is_loaded(tmp_path, miniature, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "brainenc.extract.pipeline", None)
    config = configured(tmp_path / "s", pictures, miniature, device="auto")

    with site_of(config) as site:
        assert isinstance(site(), Here)
        assert site() is site()
    assert estimate(config, timed=False).images_left == 45


def test_an_address_that_would_put_the_driver_elsewhere_is_refused(tmp_path, miniature, pictures):
    config = configured(tmp_path / "s", pictures, miniature, address="ray://head:10001")

    with site_of(config) as site, pytest.raises(UsageError, match="ray job submit"):
        site()
