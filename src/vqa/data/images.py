"""Reading image files that come from anywhere, with Pillow and NumPy alone: data sets and `ask` share it."""

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # a larger image is more likely an attack on the memory than a photograph
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # as bytes 8 to 12 of a file name it
UPRIGHT = {  # what sets an image upright, by the orientation in its EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Pillow warns of large images, which are refused here, and of EXIF entries that it skips.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """A file that cannot be used as an image; its message is one sentence that names it."""


def read_image(path: Path, size: int) -> np.ndarray:
    """The image in `path` as a model sees it, (3, size, size) uint8: `decode`, squeezed or stretched to a square.

    Raises ImageError if there is no image that can be read.
    """
    image = decode(path)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def decode(path: Path) -> Image.Image:
    """The image in `path` in RGB: upright as its EXIF says, what is transparent on white.

    Raises ImageError for what is missing, no image, damaged, cut short, or of more than MAX_PIXELS,
    which its header tells before anything is decoded. (Pillow by itself only warns above 89 million
    pixels and refuses above 179 million.) Damage inside JPEG's compressed data is not always
    noticeable: the format has no checksum.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            opened.load()
            return _colour(_upright(opened), path)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        if _brand(path) in HEIC:
            raise ImageError(f"{path} is a HEIC image, which Pillow cannot read: save it as JPEG or PNG") from None
        raise ImageError(f"{path} is not an image, or its beginning is damaged") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has more than {MAX_PIXELS // 10**6} million pixels: make it smaller") from None
    except Exception as error:  # Pillow's forty decoders raise errors of any kind
        raise ImageError(f"{path} cannot be read as an image, it is damaged or cut short: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF says. (ImageOps.exif_transpose also writes EXIF anew, and fails on odd entries.)"""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _colour(image: Image.Image, path: Path) -> Image.Image:
    """`image` in RGB: grey repeated, deeper grey brought to 8 bits, what is transparent on white."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """A grey `image` of 16 or 32 bits or of fractions, with 8 bits.

    Files do not say which number is white, so it is the first of 1 (of fractions only), 255 and 65,535 that no pixel
    exceeds; 65,535 for 16 bits. Raises ImageError if there is none, or pixels are negative or NaN.
    """
    whites = {"F": (1, 255, 65_535), "I": (255, 65_535)}.get(image.mode, (65_535,))
    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        raise ImageError(f"{path} has grey values from {low:g} to {high:g}: save it with values from 0 to 255")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _brand(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(12)
    return head[8:] if head[4:8] == b"ftyp" else b""
