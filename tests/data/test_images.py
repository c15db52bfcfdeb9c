"""The one reader of image files, on files of every kind and every fault."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vqa.data.images import ImageError, decode, read_image


def test_images_of_every_kind_look_alike(photo):
    plain = read_image(photo, 64).astype(int)
    image = Image.open(photo)
    assert plain.shape == (3, 64, 64) and (plain == np.asarray(image).transpose(2, 0, 1)).all()
    image.putalpha(255)
    image.save(photo.with_name("alpha.png"))
    assert (read_image(photo.with_name("alpha.png"), 64) == plain).all()
    Image.open(photo).quantize(256).save(photo.with_name("palette.png"))
    assert np.abs(read_image(photo.with_name("palette.png"), 64) - plain).mean() < 8
    Image.open(photo).convert("L").save(photo.with_name("grey.png"))
    grey = read_image(photo.with_name("grey.png"), 64)
    assert (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all() and np.ptp(grey) > 20
    deep = (np.asarray(Image.open(photo).convert("L")).astype(np.uint16)) * 257
    Image.fromarray(deep).save(photo.with_name("deep.png"))
    assert (read_image(photo.with_name("deep.png"), 64) == grey).all()


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 8) == 255).all()


def test_a_rotated_photograph_is_set_upright(photo):
    """EXIF orientation 6: the camera was turned, the viewer must turn the pixels clockwise."""
    lying = Image.open(photo).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(photo.with_name("lying.png"), exif=exif)
    assert (read_image(photo.with_name("lying.png"), 64) == read_image(photo, 64)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright_as_pillow_does(photo, orientation):
    exif, image = Image.Exif(), Image.open(photo).crop((0, 0, 64, 40))
    exif[0x0112] = orientation
    for name in ("turned.jpg", "turned.tif"):
        image.save(photo.with_name(name), exif=exif)
        expected = ImageOps.exif_transpose(Image.open(photo.with_name(name))).convert("RGB")
        assert (np.asarray(decode(photo.with_name(name))) == np.asarray(expected)).all()


def exif_of(kind: int, count: int, value: bytes) -> bytes:
    """EXIF with orientation 6 and one more entry of `kind`, which need not be one that its tag may have."""
    first = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    second = struct.pack("<HHI4s", 0x9201, kind, count, value)
    return (
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + first + second + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    )


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [(10, 1, struct.pack("<I", 38)), (8, 1, struct.pack("<hh", -5, 0)), (2, 900, b"far "), (99, 1, b"odd ")],
    ids=["a fraction by zero", "a negative number", "beyond the end", "of no known kind"],
)
def test_exif_that_cannot_be_written_back_still_sets_upright(photo, kind, count, value):
    image = Image.open(photo).crop((0, 0, 64, 40))
    image.save(photo.with_name("plain.jpg"))
    image.save(photo.with_name("odd.jpg"), exif=exif_of(kind, count, value))
    upright = Image.open(photo.with_name("plain.jpg")).transpose(Image.Transpose.ROTATE_270)
    assert (np.asarray(decode(photo.with_name("odd.jpg"))) == np.asarray(upright)).all()


def test_exif_that_cannot_be_read_leaves_the_image_as_it_is(photo):
    Image.open(photo).save(photo.with_name("plain.jpg"))
    Image.open(photo).save(photo.with_name("odd.jpg"), exif=b"Exif\0\0no TIFF at all")
    assert (read_image(photo.with_name("odd.jpg"), 64) == read_image(photo.with_name("plain.jpg"), 64)).all()


@pytest.mark.parametrize(
    ("white", "kind"), [(1, np.float32), (255, np.float32), (65535, np.float32), (255, np.int32), (65535, np.int32)]
)
def test_deep_grey_is_read_by_its_range(tmp_path, white, kind):
    ramp = np.linspace(0, white, 256).astype(kind).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    grey = read_image(tmp_path / "deep.tif", 16)
    assert np.abs(grey - np.arange(256).reshape(16, 16)).max() <= 1 and (grey[0] == grey[2]).all()


@pytest.mark.parametrize("values", [[-1, 1], [0, 70000], [0, float("nan")], [0, float("inf")]])
def test_grey_of_no_known_range_is_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(ImageError, match=r"odd.tif has grey values from .* to .*: save it with values from 0 to 255$"):
        decode(tmp_path / "odd.tif")


def test_heic_is_named_with_a_remedy(tmp_path):
    for name, brand, sentence in (
        ("phone.jpg", b"heic", r"phone.jpg is a HEIC image, which Pillow cannot read: save it as JPEG or PNG$"),
        ("film.jpg", b"mp42", r"film.jpg is not an image, or its beginning is damaged$"),
    ):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
        with pytest.raises(ImageError, match=sentence):
            decode(tmp_path / name)


def test_another_size_is_resized_as_torchvision_does(photo):
    from torch import from_numpy
    from torchvision.transforms.v2 import functional as vision

    large = Image.open(photo).resize((150, 100), Image.Resampling.BICUBIC)
    large.save(photo.with_name("large.png"))
    pixels = from_numpy(np.asarray(large).transpose(2, 0, 1).copy())
    expected = vision.resize(pixels, [64, 64], antialias=True).numpy().astype(int)
    assert np.abs(read_image(photo.with_name("large.png"), 64) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_what_pillow_decodes(photo, mode):
    image = Image.open(photo).convert(mode)
    image.save(photo.with_suffix(".jpg"))
    assert (np.asarray(decode(photo.with_suffix(".jpg"))) == Image.open(photo.with_suffix(".jpg")).convert("RGB")).all()


def test_image_faults_are_one_sentence_each(photo, tmp_path):
    raw = photo.read_bytes()
    Image.open(photo).save(photo.with_suffix(".jpg"))
    jpeg = photo.with_suffix(".jpg").read_bytes()
    files = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or cut short"),
        "header.jpg": (b"\0" + jpeg[1:], "is not an image"),
        "text.jpg": (b"not an image", "is not an image"),
        "missing.png": (None, "there is no file"),
        "text.png": (b"not an image", "is not an image"),
        "cut.png": (raw[: len(raw) // 2], "damaged or cut short"),
        "flipped.png": (raw[:60] + bytes([raw[60] ^ 255]) + raw[61:], "damaged or cut short"),
        "empty.png": (b"", "is not an image"),
    }
    for name, (content, sentence) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=sentence):
            read_image(tmp_path / name, 64)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path, 64)  # a folder


@pytest.mark.parametrize("side", [8000, 60000])
def test_an_enormous_image_is_refused_before_it_is_decoded(tmp_path, side):
    """64 million pixels, and more than Pillow itself opens; a few kilobytes as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ImageError, match="more than 50 million pixels"):
        read_image(tmp_path / "bomb.png", 64)
