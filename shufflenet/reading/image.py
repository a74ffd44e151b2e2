"""One image, for all scripts: open it safely, turn it upright, make it RGB, resize and crop."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from shufflenet.common.messages import printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error below
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged EXIF, at length


class ImageError(OSError):
    """An image that cannot be read, and why."""

    def __init__(self, path: object, reason: object = None) -> None:
        # With one argument, the whole message, it is unpickled, and raised by DataLoader's workers.
        super().__init__(path if reason is None else f"{printable(path)}: {printable(reason)}")
        self.path = str(path)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet. What goes wrong meanwhile becomes an ImageError,
    but for a lack of memory, which is no fault of the image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a quarter of a GiB as RGB
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image: empty, damaged, or none of {', '.join(FORMATS)}"
        raise ImageError(path, reason) from None


def is_small(path: str | Path) -> bool:
    """Whether an image has at most 48 pixels a side; False if it cannot be read."""
    with suppress(ImageError), _opened(path) as image:
        return max(image.size) <= 48
    return False


def load_rgb(path: str | Path) -> Image.Image:
    """Read an image as it should be seen: upright by its EXIF orientation, 8-bit RGB.

    Transparency lies over white; 16-bit grey is scaled to 8 bits, not clipped; of an animation
    the first frame is read. ImageError if it is missing, empty, truncated, over 89 million pixels,
    or none of the `FORMATS`.
    """
    with _opened(path) as image:
        return _decoded(image)


def load_crop(path: str | Path, crop: Callable, side: int, spare: float) -> np.ndarray:
    """Read a part of an image, as `load_rgb` does, resized (bilinear, antialiased) to uint8
    (side, side, 3). `crop(width, height)` of the image upright is its left, top, right, bottom.

    Only the part is resized: less work, and no image is too long for the memory. The decoder of
    JPEG shrinks large photographs by 2, 4 or 8, so long as the part keeps `spare * side` pixels.
    """
    with _opened(path) as image:
        width, height = image.size
        with suppress(Exception):  # damaged EXIF
            on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            if on_its_side and image.format != "TIFF":  # whose size Pillow gives upright
                width, height = height, width
        box = crop(width, height)
        least = max(1, min(box[2] - box[0], box[3] - box[1]) / (spare * side))
        image.draft("RGB", (int(image.width / least), int(image.height / least)))
        upright = _decoded(image)
        shrunk = round(width / upright.width)
        box = tuple(edge / shrunk for edge in box)
        return np.array(upright.resize((side, side), Image.Resampling.BILINEAR, box))


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # damaged EXIF: the pixels are still good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # "I;16" and, where Pillow has no better mode, "I"
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def load_centre(path: str | Path, preprocessing: dict) -> np.ndarray:
    """An image as evaluation wants it: the shorter side resized to `resize` pixels, the centre of
    `crop` pixels cut out; uint8 (crop, crop, 3).

    Hardly ever over 1 of 255 away from torchvision's Resize and CenterCrop, at most 2, but for
    photographs that the decoder shrinks (`load_crop`).
    """
    resize, crop = preprocessing["resize"], preprocessing["crop"]

    def centre(*size: int) -> tuple:
        edges = []  # left and right, then top and bottom
        for pixels in size:
            resized = resize * pixels // min(size)
            first = round((resized - crop) / 2)
            edges.append((first * pixels / resized, (first + crop) * pixels / resized))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom

    return load_crop(path, centre, crop, spare=2)
