"""One decoder for all images: depths, orientations, modes, animations, and the middle of them."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from gradmask.recipes.data.decoding import decode, middle

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = np.array([[0, 128, 129, 256], [257, 32767, 65406, 65535]])
# Where the orientation of EXIF says that the first row and column of the stored pixels lie.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def decoded(image, kind="PNG", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(decode(stored(image, kind, **options)))


def big_endian(values):
    image = Image.new("I;16B", values.shape[::-1])
    image.frombytes(values.astype(">u2").tobytes())
    return image


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    expected = (DEEP / 257).round()
    assert (decoded(Image.fromarray(DEEP.astype(np.uint16)), kind) == expected).all()
    if kind == "TIFF":
        assert (decoded(Image.fromarray(DEEP.astype(np.int32)), kind) == expected).all()
        assert (decoded(big_endian(DEEP), kind) == expected).all()


def test_floats_are_scaled():
    values = np.array([[0, 0.5, 1], [0.1, 1 / 255, 0.999]], dtype=np.float32)
    expected = (values.astype(float) * 255).round()
    assert (decoded(Image.fromarray(values), "TIFF") == expected).all()


@pytest.mark.parametrize("wrong", [-0.1, 1.001, 255, float("nan"), float("inf"), -float("inf")])
def test_floats_out_of_range(wrong):
    image = Image.fromarray(np.array([[0.5, wrong]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"go from .* to .*, and must lie in 0 to 1$"):
        decoded(image, "TIFF")


@pytest.mark.parametrize("wrong", [-1, 65536, 2**31 - 1])
def test_integers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must lie in 0 to 65535"):
        decoded(Image.fromarray(np.array([[5, wrong]], dtype=np.int32)), "TIFF")


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, **LOSSLESS[kind]}
    upright = UPRIGHT[orientation]
    assert (decoded(Image.fromarray(COLOUR), kind, **options) == upright(COLOUR)).all()
    if kind != "WEBP":
        assert (decoded(Image.fromarray(GREY), kind, **options) == upright(GREY)).all()
        deep = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1285
        found = decoded(Image.fromarray(deep), kind, **options)
        assert (found == upright(deep / 257)).all()
    if kind != "PNG":  # of many pages
        more = {"save_all": True, "append_images": [Image.fromarray(COLOUR[::-1])]}
        found = decoded(Image.fromarray(COLOUR), kind, **options, **more)
        assert (found == upright(COLOUR)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0wrong"])
def test_damaged_exif_is_passed_over(exif):
    smooth = Image.fromarray(COLOUR)
    plain = np.asarray(Image.open(stored(smooth, "JPEG")))
    assert (np.asarray(decode(stored(smooth, "JPEG", exif=exif))) == plain).all()


@pytest.mark.filterwarnings("ignore:.*Warning, tag 271", "ignore:Truncated File Read")
def test_an_orientation_in_exif_that_cannot_be_written_again():
    """Pillow writes the other tags anew, and fails at those that are damaged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    exif[0x0110] = "model" * 20
    tags = exif.tobytes()
    damaged = tags.replace(b"\1\x0f\0\2", b"\1\x0f\0\5")  # text becomes a fraction
    assert damaged != tags
    found = decode(stored(Image.fromarray(COLOUR), "PNG", exif=damaged))
    assert (np.asarray(found) == UPRIGHT[6](COLOUR)).all()


def test_modes():
    colour, grey = Image.fromarray(COLOUR), Image.fromarray(GREY)
    alpha = Image.fromarray(RNG.integers(0, 256, (5, 7), dtype=np.uint8))
    clear = colour.copy()
    clear.putalpha(alpha)
    assert (decoded(clear) == COLOUR).all()
    clear = grey.copy()
    clear.putalpha(alpha)
    assert (decoded(clear) == GREY).all()
    assert (decoded(grey) == GREY).all()
    assert (decoded(grey, transparency=3) == GREY).all()
    black = GREY > 127
    assert (decoded(Image.fromarray(black)) == black * 255).all()
    palette = colour.quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": 2}, {"transparency": bytes(range(8))}):
        assert (decoded(palette, **options) == expected).all()
    assert (decoded(palette, "GIF", transparency=2) == expected).all()
    assert decoded(grey.convert("P")).shape == (5, 7, 3)  # of a palette that happens to be grey
    cmyk = colour.convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        expected = np.asarray(Image.open(stored(cmyk, kind)).convert("RGB"))
        assert (decoded(cmyk, kind) == expected).all()


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_first_frame(kind, options):
    first = Image.fromarray(COLOUR).quantize(16).convert("RGB")
    others = [Image.fromarray(COLOUR[::-1]), Image.fromarray(COLOUR[:, ::-1])]
    found = decoded(first, kind, save_all=True, append_images=others, **options)
    assert (found == np.asarray(first)).all()


def test_middle_is_that_of_the_reference_recipe():
    image = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    for shape in ((300, 200), (200, 301), (517, 64)):
        large = image.resize(shape, Image.Resampling.BICUBIC)
        expected = v2.Compose([v2.Resize(64), v2.CenterCrop(56), v2.PILToTensor()])(large)
        found = v2.functional.pil_to_tensor(middle(large, 56))
        assert (found.int() - expected.int()).abs().float().mean() < 1.5  # half a pixel of 64
        mirrored = large.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert (v2.functional.pil_to_tensor(middle(mirrored, 56)).flip(2) == found).all()


def test_middle_does_not_enlarge_to_cut():
    for size in (7, 56, 224):
        whole = Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8))
        assert (np.asarray(middle(whole, size)) == np.asarray(whole)).all()
    small = Image.fromarray(COLOUR[:, 1:6])
    expected = np.asarray(small.resize((9, 9), Image.Resampling.BILINEAR))
    assert (np.asarray(middle(small, 9)) == expected).all()
    grey = middle(Image.fromarray(GREY), 4)
    assert torch.equal(  # grey before or after
        v2.functional.pil_to_tensor(grey.convert("RGB")),
        v2.functional.pil_to_tensor(middle(Image.fromarray(GREY).convert("RGB"), 4)),
    )


def test_very_long_images_are_cut_before_they_are_resized():
    assert middle(Image.new("RGB", (3, 200_000)), 224).size == (224, 224)
    assert middle(Image.new("L", (200_000, 1)), 224).size == (224, 224)
