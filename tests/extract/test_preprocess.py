"""Preprocessing is what the models were trained with, and pads with zeros after normalisation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.preprocess import IMAGENET, MEANING, OPENAI_CLIP, Preprocessing

MEAN, STD = IMAGENET


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def pad(multiple=14, **kwargs):
    return Preprocessing(policy="pad", mean=MEAN, std=STD, multiple=multiple, **kwargs)


def test_native_size_is_padded_with_zeros_after_normalisation():
    """425 x 425 becomes 434 x 434: the image untouched in the top left, zeros (not black) at the bottom and right."""
    image = picture(425, 425)
    tensor = pad()(image)
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
    assert tensor.shape == (3, 434, 434)
    assert torch.equal(tensor[:, :425, :425], plain)
    assert tensor[:, 425:].abs().max() == 0
    assert tensor[:, :, 425:].abs().max() == 0


@pytest.mark.parametrize("size", [(425, 425), (300, 500), (500, 300), (224, 224), (100, 90)])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_crop_is_torchvisions(size, how):
    """Shortest edge, centre crop and normalisation give torchvision's numbers exactly, small images included."""
    mine = Preprocessing(policy="crop", mean=MEAN, std=STD, resample=how, size=(224, 224), shortest=256)
    theirs = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode(how)), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    assert torch.equal(mine(picture(*size)), theirs(picture(*size)))


def test_resize_squashes_whatever_the_aspect():
    """The published CLIP path: Image.resize((224, 224)), which is bicubic, then the statistics."""
    image = picture(300, 500)
    mine = Preprocessing(policy="resize", mean=MEAN, std=STD, resample="bicubic", size=(224, 224))
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image.resize((224, 224)))
    assert torch.equal(mine(image), theirs)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.sampled_from(["pad", "resize", "crop"]))
def test_the_shape_is_known_before(height, width, multiple, policy):
    """output_shape is the shape that comes out, for any image; padding adds less than one patch."""
    made = pad(multiple) if policy == "pad" else Preprocessing(
        policy=policy, mean=MEAN, std=STD, size=(28, 42), shortest=50 if policy == "crop" else None
    )  # fmt: skip
    shape = made.output_shape(height, width)
    assert made(picture(height, width)).shape == (3, *shape)
    if policy == "pad":
        assert 0 <= shape[0] - height < multiple
        assert shape[0] % multiple == 0 == shape[1] % multiple


def test_another_policy_keeps_the_statistics():
    """with_policy changes sizes only; crop keeps the ratio between shortest edge and crop."""
    clip = Preprocessing(policy="crop", mean=OPENAI_CLIP[0], std=OPENAI_CLIP[1], size=(224, 224), shortest=256)
    padded = clip.with_policy("pad", None, 14)
    assert (padded.policy, padded.size, padded.multiple, padded.mean) == ("pad", None, 14, OPENAI_CLIP[0])
    bigger = clip.with_policy(None, 448, 14)
    assert (bigger.policy, bigger.size, bigger.shortest) == ("crop", (448, 448), 512)
    assert clip.with_policy("resize", (28, 42), 14).output_shape(5, 5) == (28, 42)
    assert clip.with_policy("pad", 100, 14).output_shape(9, 9) == (112, 112)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    """The message names a size that fits and the policy that would pad."""
    with pytest.raises(UsageError, match=r"take 224.*pad"):
        Preprocessing(policy="resize", mean=MEAN, std=STD, size=(224, 224)).with_policy(None, 225, 14)


def test_unknown_policies_say_what_there_is():
    """A policy or resampling that there is not lists those that there are."""
    with pytest.raises(UnknownName, match="pad, resize, crop"):
        Preprocessing(policy="stretch", mean=MEAN, std=STD)
    with pytest.raises(UnknownName, match="bicubic"):
        Preprocessing(policy="pad", mean=MEAN, std=STD, resample="cubic")


def test_the_description_is_json_with_its_own_version():
    """What goes into provenance can be written down and says which meaning it has."""
    described = pad().describe()
    assert json.loads(json.dumps(described)) == described
    assert described["version"] == MEANING
    assert described["multiple"] == 14
    assert described["mean"] == list(MEAN)


def test_what_plays_no_part_is_not_described():
    """At native size nothing is resampled, so the kind of resampling does not tell two preprocessings apart."""
    assert pad(resample="bicubic").describe() == pad(resample="bilinear").describe()
    assert pad(resample="bicubic", size=(28, 28)).describe() != pad(resample="bilinear", size=(28, 28)).describe()


def test_the_sentence_says_what_happens():
    """People read the policy, the size and the statistics."""
    assert "zero-padded at bottom and right to multiples of 14 after normalisation" in pad().sentence()
    crop = Preprocessing(policy="crop", mean=MEAN, std=STD, size=(224, 224), shortest=256)
    assert "shortest edge to 256 (bilinear), crop 224 x 224" in crop.sentence()
    assert "0.485" in crop.sentence()
