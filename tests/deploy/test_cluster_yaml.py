"""cluster.yaml passes Ray's own validator, offline, and what the validator does not look at."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()

PROVIDER_KEYS = {"type", "region", "availability_zone", "project_id", "use_internal_ips"}
NODE_KEYS = {"machineType", "disks", "networkInterfaces", "serviceAccounts", "scheduling"}


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(TEXT)


def nodes(config: dict) -> dict:
    return config["available_node_types"]


def test_ray_accepts_it(config):
    validate_config(prepare_config(config))


@pytest.mark.parametrize("breach", ["unknown key", "wrong type", "head without a type"])
def test_ray_would_notice_a_mistake(config, breach):
    """The test of the test."""
    broken = copy.deepcopy(config)
    if breach == "unknown key":
        broken["max_wrokers"] = 8
    elif breach == "wrong type":
        broken["max_workers"] = "many"
    else:
        broken["head_node_type"] = "heads"

    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(broken))


def test_names_that_ray_does_not_check(config):
    assert set(config["provider"]) == PROVIDER_KEYS
    assert all(set(t["node_config"]) <= NODE_KEYS for t in nodes(config).values())
    assert config["provider"]["availability_zone"].startswith(config["provider"]["region"])


def test_nothing_faces_the_internet(config):
    assert config["provider"]["use_internal_ips"] is True
    for kind in nodes(config).values():
        assert all("accessConfigs" not in i for i in kind["node_config"]["networkInterfaces"])
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in TEXT


def test_the_head_has_no_gpu_and_takes_no_work(config):
    head = nodes(config)[config["head_node_type"]]

    assert head["resources"] == {"CPU": 0}
    assert "guestAccelerators" not in head["node_config"]


def test_gpu_workers_scale_from_zero_and_may_be_preemptible(config):
    gpu = {name: t for name, t in nodes(config).items() if t["resources"].get("GPU")}

    assert all(t["min_workers"] == 0 < t["max_workers"] for t in gpu.values())
    assert {bool(t["node_config"]["scheduling"].get("preemptible")) for t in gpu.values()} == {True, False}
    assert all(t["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE" for t in gpu.values())


def test_workers_may_use_the_bucket_and_nothing_else(config):
    for name, kind in nodes(config).items():
        if name != config["head_node_type"]:
            (account,) = kind["node_config"]["serviceAccounts"]
            assert account["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]


def test_every_node_installs_from_the_constraints(config):
    setup = " ".join(config["setup_commands"])

    assert "-c ~/brainenc/constraints.txt" in setup
    assert config["file_mounts"] == {"~/brainenc": "."}


def test_a_stopped_job_has_time_for_a_checkpoint(config):
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in " ".join(config["head_start_ray_commands"])


def test_every_setting_has_its_reason():
    """Commented line by line: no more than eight lines of settings without a comment between them."""
    longest = run = 0
    for line in TEXT.splitlines():
        run = 0 if "#" in line or not line.strip() else run + 1
        longest = max(longest, run)

    assert longest <= 12
    assert len(re.findall(r"^\s*#", TEXT, re.M)) >= 35
