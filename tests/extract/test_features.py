"""Feature names: every way of naming layers, and errors that say what there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.features import Feature, Layers, resolve_features

OFFERED = ("token", "cls", "q", "k", "v", "pool")


def layers(count=12, numbered=True):
    blocks = tuple(f"encoder.layer.{n}" for n in range(count))
    others = ("embeddings", "encoder", *(f"encoder.layer.{n}.mlp" for n in range(count)), "layernorm")
    names = {"norm": ("token", "cls", "pool")}
    return Layers(
        where="mini",
        blocks=blocks,
        stations=("norm",),
        modules=(*blocks, *others),
        facets=lambda layer: names.get(layer, OFFERED if layer.isdecimal() or not numbered else ("token",)),
        numbered=numbered,
    )


def resolved(*texts, **kwargs):
    return [str(feature) for feature in resolve_features(texts, layers(**kwargs))]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("11.q", ["11.q"]),
        ("-1.q", ["11.q"]),
        ("-12.q", ["0.q"]),
        ("8-11.token", ["8.token", "9.token", "10.token", "11.token"]),
        ("-2--1.k", ["10.k", "11.k"]),
        ("0,5,-1.v", ["0.v", "5.v", "11.v"]),
        ("0,8-9.v", ["0.v", "8.v", "9.v"]),
        ("*.cls", [f"{n}.cls" for n in range(12)]),
        ("1?.q", ["10.q", "11.q"]),
        ("[02].q", ["0.q", "2.q"]),
        ("norm.token", ["norm.token"]),
        ("encoder.layer.3.q", ["3.q"]),
        ("encoder.layer.[02468].token", [f"{n}.token" for n in (0, 2, 4, 6, 8)]),
        ("encoder.layer.?.mlp.token", [f"encoder.layer.{n}.mlp.token" for n in range(10)]),
        ("blocks.[02468].token", [f"{n}.token" for n in (0, 2, 4, 6, 8)]),
        ("visual.transformer.resblocks.11.q", ["11.q"]),
        ("layernorm.token", ["layernorm.token"]),
        ("11.query", ["11.q"]),
        (" 11.key ", ["11.k"]),
    ],
)
def test_layers_by_number_range_list_glob_and_module(text, wanted):
    """Each way of naming layers resolves to block numbers where it means a block."""
    assert resolved(text) == wanted


def test_each_feature_comes_once_in_the_order_asked_for():
    """The same feature asked for twice, by two names, is one feature."""
    assert resolved("-1.q", "0.q", "11.q", "10-11.q") == ["11.q", "0.q", "10.q"]


def test_convolutional_blocks_go_by_their_modules_names():
    """Numbers reach the stages of a network without tokens, but the resolved name is the module's."""
    assert resolved("-1.token", count=4, numbered=False) == ["encoder.layer.3.token"]


def test_a_star_never_crosses_a_dot():
    """encoder.* means the children of encoder, not everything below it."""
    with pytest.raises(UnknownName):
        resolved("encoder.*.token")


@pytest.mark.parametrize("text", ["12.q", "-13.q", "nosuch.q", "encoder.layer.12.q", "blocks.12.q", "z*.q", "8-12.q"])
def test_unknown_layers_say_what_there_is(text):
    """A layer that is not there is an UnknownName that lists the numbers, the stations and where it looked."""
    with pytest.raises(UnknownName) as caught:
        resolved(text)
    assert "0 to 11" in str(caught.value)
    assert "norm" in str(caught.value)
    assert "mini" in str(caught.value)


def test_a_misspelt_module_gets_its_neighbours_named():
    """The closest module names are among what there is."""
    with pytest.raises(UnknownName, match=r"encoder\.layer\.3\.mlp"):
        resolved("encoder.layers.3.mlpp.token")


@pytest.mark.parametrize("text", ["11.attn", "11.z", "norm.q", "layernorm.cls", "encoder.layer.11"])
def test_unknown_facets_say_what_there_is(text):
    """A facet that there is not, or not of this layer, is an UnknownName with those that there are."""
    with pytest.raises(UnknownName, match="token"):
        resolved(text)


@pytest.mark.parametrize("text", ["11", "q", "", ".q", "5-3.q"])
def test_what_is_no_feature_is_wrong_usage(text):
    """Texts without a layer or facet, and empty ranges, are refused with an example of how to write them."""
    with pytest.raises(UsageError):
        resolved(text)


@given(st.integers(1, 60), st.data())
def test_numbers_and_negative_numbers_meet(count, data):
    """-k of n blocks is block n - k, and a resolved name resolves to itself."""
    number = data.draw(st.integers(0, count - 1))
    assert resolved(f"{number - count}.q", count=count) == [f"{number}.q"]
    assert resolved(f"{number}.q", count=count) == [f"{number}.q"]


@given(st.sampled_from(["3", "norm", "layer4.1.conv2", "encoder.layer.0.mlp"]), st.sampled_from(OFFERED))
def test_a_feature_survives_being_written_down(layer, facet):
    """Feature.parse reads what str wrote; the facet follows the last dot."""
    assert Feature.parse(str(Feature(layer, facet))) == Feature(layer, facet)
