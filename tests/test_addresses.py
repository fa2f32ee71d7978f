"""Which Ray a command works on."""

import pytest

from brainenc.addresses import init_options, resolve
from brainenc.errors import UsageError


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        (None, None, None),
        ("auto", None, "auto"),
        (None, "10.0.0.5:6379", "10.0.0.5:6379"),
        ("10.0.0.7:6379", "10.0.0.5:6379", "10.0.0.7:6379"),
        ("local", "10.0.0.5:6379", None),
        ("none", "auto", None),
        (None, "", None),
    ],
)
def test_the_option_wins_then_the_variable_then_a_local_one(option, variable, expected):
    environ = {} if variable is None else {"RAY_ADDRESS": variable}

    assert resolve(option, command="extract", environ=environ) == expected


@pytest.mark.parametrize("where", ["option", "variable"])
def test_ray_client_is_refused_with_what_to_do(where):
    address = "ray://head:10001"
    environ = {"RAY_ADDRESS": address} if where == "variable" else {}

    with pytest.raises(UsageError, match=r"ray job submit.* brainenc train"):
        resolve(address if where == "option" else None, command="train", environ=environ)


def test_a_word_is_no_address():
    with pytest.raises(UsageError, match="host:port"):
        resolve("head", command="train", environ={})


def test_a_local_ray_is_asked_for_by_name_and_kept_small():
    options = init_options(None, num_cpus=2)

    assert options["address"] == "local"
    assert options["include_dashboard"] is False
    assert options["object_store_memory"] <= 200_000_000
    assert "_memory" not in options


def test_a_named_cluster_keeps_its_own_sizes():
    assert init_options("auto", num_cpus=2) == {"address": "auto", "log_to_driver": False, "logging_level": "ERROR"}
