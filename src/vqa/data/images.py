"""Reading image files that come from anywhere, with Pillow and NumPy alone: data sets and `vqa.ask` share it."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # a larger image is more likely an attack on the memory than a photograph


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused here


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
            return _colour(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise ImageError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image, or its beginning is damaged") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has more than {MAX_PIXELS // 10**6} million pixels: make it smaller") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError) as error:  # as decoders have it
        raise ImageError(f"{path} cannot be read as an image, it is damaged or cut short: {error}") from None


def _colour(image: Image.Image) -> Image.Image:
    """`image` in RGB: grey repeated, 16 bits cut to 8, what is transparent on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
