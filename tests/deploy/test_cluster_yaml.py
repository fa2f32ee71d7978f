"""cluster.yaml passes Ray's own validator, offline, and what the validator does not look at."""

import copy
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()
PAGE = (ROOT / "docs" / "cluster.md").read_text()

PROVIDER_KEYS = {"type", "region", "availability_zone", "project_id", "use_internal_ips"}
NODE_KEYS = {"machineType", "disks", "networkInterfaces", "serviceAccounts", "scheduling"}


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(TEXT)


def nodes(config: dict) -> dict:
    return config["available_node_types"]


def ray_start(config: dict, kind: str) -> tuple[list[str], dict[str, str]]:
    """Of the command that starts Ray on ``head`` or ``worker``: its arguments, and the environment before it."""
    (command,) = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
    words = shlex.split(command.rpartition(";")[2])
    program = words.index("~/brainenc-env/bin/ray")
    return words[program + 2 :], dict(word.split("=", 1) for word in words[:program])


def ports(config: dict, kind: str) -> dict[str, int]:
    """Port options of ``ray start``."""
    options = dict(word.split("=", 1) for word in ray_start(config, kind)[0] if "=" in word)
    return {name: int(value) for name, value in options.items() if name.endswith("port")}


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
    assert config["file_mounts"]["~/brainenc"] == "."


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_knows_every_option(config, kind):
    from ray.scripts.scripts import start

    arguments, _ = ray_start(config, kind)

    assert start.make_context("start", arguments, resilient_parsing=True).params["head"] is (kind == "head")


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_nobody_is_heard_without_the_token(config, kind):
    _, environ = ray_start(config, kind)

    assert environ["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"  # where `ray get-auth-token` puts it
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_whoever_speaks_to_ray_has_the_token(config):
    (preemption,) = [c for c in config["worker_start_ray_commands"] if "preemption.sh" in c]
    (profile,) = [c for c in config["setup_commands"] if ".bashrc" in c]

    assert preemption.startswith("RAY_AUTH_MODE=token ")
    assert "RAY_AUTH_MODE=token" in profile.partition("export")[2]


def test_the_token_is_where_ray_puts_and_seeks_it():
    from ray._private.authentication import authentication_token_setup

    assert authentication_token_setup._get_default_token_path() == Path("~/.ray/auth_token").expanduser()


def test_no_port_is_left_to_chance(config):
    """All that ``ray start`` has an option for, the same on all nodes."""
    from ray.scripts.scripts import start

    elsewhere = {"--port", "--dashboard-port", "--ray-client-server-port"}  # the head's own; their defaults are fixed
    wanted = {o for p in start.params for o in p.opts if o.endswith("-port")} - elsewhere

    assert set(ports(config, "worker")) == wanted
    assert ports(config, "head") == {"--port": 6379} | ports(config, "worker")
    assert "$RAY_HEAD_IP:6379" in " ".join(config["worker_start_ray_commands"])


def test_the_pages_firewall_rules_let_through_what_ray_uses_and_ssh(config):
    rules = re.findall(r"firewall-rules create (\S+)(.*?)(?:```|\n#|\ngcloud)", PAGE, re.S)
    allowed = {name: re.search(r"--allow (\S+)", text)[1].split(",") for name, text in rules}
    spans = [tuple(map(int, rule.removeprefix("tcp:").split("-"))) for rule in allowed["brainenc-nodes"]]
    used = ports(config, "head")
    workers = used.pop("--min-worker-port"), used.pop("--max-worker-port")

    assert workers in spans
    assert all(any(span[0] <= port <= span[-1] for span in spans) for port in (22, *used.values()))
    assert not any(span[0] <= port <= span[-1] for span in spans for port in (8265, 10001))
    assert allowed["brainenc-iap"] == ["tcp:22"]
    assert "--source-ranges 35.235.240.0/20 " in dict(rules)["brainenc-iap"]
    assert "--source-ranges" not in dict(rules)["brainenc-nodes"]


def test_every_name_to_replace_is_on_the_page():
    assert set(re.findall(r"MY-[A-Z]+", TEXT)) - {"MY-SUBNET"} <= set(re.findall(r"MY-[A-Z]+", PAGE))


def test_a_stopped_job_has_time_for_a_checkpoint(config):
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in " ".join(config["head_start_ray_commands"])


def test_every_setting_has_its_reason():
    """No more than eight lines of settings without a comment between them, and one at each key of the first level."""
    longest = run = 0
    before = ""
    for line in TEXT.splitlines():
        assert not re.match(r"\w", line) or "#" in line + before or re.match(r"\w", before), line
        run = 0 if "#" in line or not line.strip() else run + 1
        longest = max(longest, run)
        before = line

    assert longest <= 8
    assert len(re.findall(r"^\s*#", TEXT, re.M)) >= 60
