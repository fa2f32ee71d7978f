"""Every odd kind of image file becomes what a person expects to see, or is refused with a reason."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from brainenc.errors import BadImages
from brainenc.extract import images
from brainenc.extract.images import open_image


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    image = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(height=40, width=60):
    ramp = np.linspace(0, 255, height * width).reshape(height, width)
    return np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1).astype(np.uint8)


def test_plain_rgb_is_unchanged(tmp_path):
    """An 8-bit RGB file gives its own pixels, from bytes and from a path."""
    data = saved(Image.fromarray(gradient()))
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(pixels(data), gradient())
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), gradient())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    """65535 becomes 255 and 32768 becomes 128: the whole range is kept (Pillow's own conversion clips at 255)."""
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert pixels(saved(Image.fromarray(values), kind))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@given(st.integers(0, 65535))
def test_sixteen_bit_grey_rounds_to_the_nearest(value):
    """v becomes round(v * 255 / 65535)."""
    got = pixels(saved(Image.fromarray(np.array([[value]], np.uint16))))[0, 0, 0]
    assert abs(int(got) - value * 255 / 65535) <= 0.5


def test_grey_and_one_bit_are_grey_in_all_channels():
    """Greyscale and black-and-white files have equal channels."""
    grey = gradient()[:, :, 0]
    assert np.array_equal(pixels(saved(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
    assert set(np.unique(pixels(saved(Image.fromarray(grey > 100))))) == {0, 255}


def test_palette_gives_its_colours():
    """A palette image shows the palette's colours, not its indices."""
    image = Image.fromarray(gradient()).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(saved(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_shows_white(mode):
    """What is transparent is white, whatever colour lies under it: alpha, grey with alpha, palette, one key colour."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (90, 90, 90, 255))
    if mode == "LA":
        data = saved(image.convert("LA"))
    elif mode == "P":
        data = saved(image.convert("RGB").convert("P"), transparency=0)
    elif mode == "RGB":
        data = saved(image.convert("RGB"), transparency=(0, 0, 0))
    else:
        data = saved(image)
    shown = pixels(data)
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert abs(int(shown[1, 1, 0]) - 90) <= 12  # a web palette has no exact 90


def test_half_transparent_is_half_white():
    """Alpha 128 over white: black becomes mid grey."""
    assert pixels(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))[0, 0, 0] == 127


def test_cmyk_becomes_its_colours():
    """A CMYK JPEG of full cyan is cyan, and of no ink is white."""
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    blank = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG", quality=100)
    assert np.abs(pixels(cyan)[8, 8].astype(int) - [0, 255, 255]).max() <= 3
    assert np.abs(pixels(blank)[8, 8].astype(int) - 255).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    """The pixels stand as the photographer held the camera, for each of the eight orientations."""
    upright = gradient(40, 60)
    stored = Image.fromarray(upright)
    inverse = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
               7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[inverse[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(saved(stored, exif=exif)), upright)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_leaves_whole_pixels():
    """An EXIF block of rubbish does not cost the picture."""
    data = saved(Image.fromarray(gradient()), "JPEG", quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert pixels(data).shape == (40, 60, 3)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_tiff_is_turned_upright_like_any_other(orientation):
    """Orientation is a tag of TIFF itself, which EXIF took over."""
    upright = gradient(40, 60)
    stored = Image.fromarray(upright)
    inverse = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[inverse[orientation]])
    assert np.array_equal(pixels(saved(stored, "TIFF", tiffinfo={0x0112: orientation})), upright)


def test_sixteen_bit_colour_keeps_the_high_byte():
    """Pillow reads 16-bit colour as 8 bit a channel: 0xABCD is 0xAB."""
    values = np.array([[[0xABCD, 0x0100, 0x00FF], [0xFFFF, 0x8000, 0x7FFF]]], ">u2")
    body = b"".join(b"\0" + line.tobytes() for line in values)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )  # fmt: skip
    assert pixels(data)[0].tolist() == [[0xAB, 0x01, 0x00], [0xFF, 0x80, 0x7F]]


def test_the_first_frame_of_several():
    """Of an animation the first picture is taken."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_truncated_files_are_refused(kind, monkeypatch):
    """Half a file is no image, also after another library has told Pillow to put up with it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImages) as caught:
        open_image(data[: len(data) // 2], name="half.png")
    assert list(caught.value.reasons) == ["half.png"]


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "empty"), (b"hello, I am a text", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image|damaged")],
)
def test_what_is_no_image_is_refused_with_its_name(data, why, tmp_path):
    """The error names the file and says why."""
    path = tmp_path / "notes.png"
    path.write_bytes(data)
    with pytest.raises(BadImages, match=why) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


def chunk(kind, body):
    """One part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height):
    """A whole, tiny PNG whose header claims a size: what decompression bombs look like before they are inflated."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("edge", [9_500, 14_000, 60_000])
def test_decompression_bombs_are_refused_before_they_are_inflated(edge):
    """A header that claims more pixels than any camera takes is refused; nothing of that size is allocated."""
    with pytest.raises(BadImages, match=r"pixels|bomb"):
        open_image(png_claiming(edge, edge), name="bomb.png")


def test_our_own_limit_holds_when_pillows_is_off(monkeypatch):
    """Other libraries switch Pillow's limit off; ours stays."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImages, match=str(images.MAX_PIXELS)):
        open_image(png_claiming(60_000, 60_000))


def test_floats_and_wide_integers_are_refused():
    """Nothing in such a file says which value is white."""
    with pytest.raises(BadImages, match="floating-point"):
        open_image(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(BadImages, match="32-bit"):
        open_image(saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))


def test_a_missing_file_is_no_bad_image(tmp_path):
    """A file that is not there is the operating system's error, not the image's."""
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "nothing.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's notes on damaged metadata
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_decoded_never_anything_else(data):
    """Flipped bytes anywhere give an image or a BadImages, and no other error."""
    whole = bytearray(saved(Image.fromarray(gradient()), data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(whole)).mode == "RGB"
    except BadImages:
        return


def test_decoding_from_several_threads():
    """Threads that decode ahead of the model get their own image each."""
    wanted = [gradient(20 + n, 30) for n in range(8)]
    files = [saved(Image.fromarray(w)) for w in wanted]
    got = [None] * 8

    def work(n):
        for _ in range(5):
            got[n] = pixels(files[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
