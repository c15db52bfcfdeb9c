"""The one reader of image files, on files of every kind and every fault."""

import numpy as np
import pytest
from PIL import Image

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
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ImageError, match="more than 50 million pixels"):
        read_image(tmp_path / "bomb.png", 64)
