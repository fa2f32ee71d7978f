"""show-model says what a backbone has, for people and for programs."""

import json

import pytest

from brainenc.cli.main import run
from brainenc.extract.backbone import load_backbone, parse_features
from brainenc.extract.miniature import backbone_string, save_miniature


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return str(save_miniature("dinov2_registers", tmp_path_factory.mktemp("models") / "reg"))


def shown(capsys, *arguments):
    assert run(["show-model", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_every_layer_facet_shape_and_byte(dino, capsys):
    """What is printed is what the backbone then gives: shapes, bytes in float16, grid, prefix, preprocessing."""
    report = json.loads(shown(capsys, dino, "--json"))
    backbone = load_backbone(dino)
    assert report["weights"] == backbone.info.weights_hash
    assert (report["grid"], report["n_prefix"], report["n_registers"]) == ([31, 31], 5, 4)
    assert (report["input_size"], report["n_layers"], report["slug"]) == ([434, 434], 4, "reg")
    assert report["preprocessing"]["policy"] == "pad"
    for layer, facets in report["layers"].items():
        for facet, row in facets.items():
            (feature,) = parse_features([f"{layer}.{facet}"], backbone.info)
            assert tuple(row["shape"]) == backbone.row_shape(feature, (425, 425))
    assert report["layers"]["3"]["q"] == {"shape": [966, 48], "bytes": 966 * 48 * 2}


def test_the_page_for_people(dino, capsys):
    """Layers, tokens, preprocessing and a command to go on with are on the page."""
    page = shown(capsys, dino)
    for text in ("0-3", "registers", "966 x 48", "92.7 kB", "zero-padded", "31 x 31 patches of 14 px", "--feature 3.q"):
        assert text in page, text


def test_other_images_and_sizes(dino, capsys):
    """--images asks about images of another size, --image-size and --size-policy about another input."""
    assert json.loads(shown(capsys, dino, "--images", "100x60", "--json"))["grid"] == [8, 5]
    squashed = json.loads(shown(capsys, dino, "--size-policy", "resize", "--image-size", "56", "--json"))
    assert (squashed["grid"], squashed["preprocessing"]["policy"]) == ([4, 4], "resize")


def test_modules_are_listed_on_request(dino, capsys):
    """--modules names every module whose output can be taken, with its shape."""
    report = json.loads(shown(capsys, dino, "--modules", "--images", "56x56", "--json"))
    assert report["modules"]["encoder.layer.0.mlp"]["token"]["shape"] == [21, 48]


def test_a_preset_shows_its_feature_and_its_warning(tmp_path, capsys):
    """The clip preset says that its preprocessing is the published one, not CLIP's."""
    saved = backbone_string("open_clip", save_miniature("open_clip", tmp_path / "c"))
    assert "is the right one" in shown(capsys, f"clip@{saved}")
    assert "--feature=proj.token" in shown(capsys, f"clip@{saved}")


def test_a_convolutional_network_lists_its_stages(tmp_path, capsys):
    """Stages go by name, with the size of their maps."""
    saved = backbone_string("resnet18", save_miniature("resnet18", tmp_path / "r"))
    page = shown(capsys, saved)
    assert "layer4" in page
    assert "49 x 512" in page


@pytest.mark.parametrize("arguments", [["nosuch/model"], ["/nowhere"], ["--images", "big"]])
def test_mistakes_are_one_paragraph_and_exit_code_2(arguments, dino, capsys):
    """Wrong usage exits 2 with a message, not a traceback."""
    assert run(["show-model", *([dino] if arguments[0].startswith("-") else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("brainenc: ")
    assert "Traceback" not in error
