"""One picture: open it safely, turn it upright, make it RGB, resize and crop.

Train, eval and predict all read pictures through `load_rgb` and, but for the augmentation of
training, through `resize_and_crop`. No torch here: an exported network needs none.
"""

import os
import warnings
from pathlib import Path
from reprlib import repr  # of a list that holds a list twice, that ...: built-in, it never ends

import numpy as np
from PIL import ExifTags, Image

from cli import RunError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# Pillow's own limit (a quarter of a GiB as RGB): above it Pillow warns, here it is an error.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged EXIF, at length

# No picture needs more than this of its longer side: 100,000 x 1 pixels, resized to a shorter
# side of 256, would be 19 GB, of which the crop keeps a millionth.
MAX_ASPECT = 16

# Cameras and programs write about ten; a file of a megabyte can hold ten thousand, which would take
# a quarter of an hour to read.
MAX_SCANS = 64

# What makes a picture upright again, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class ImageError(OSError):
    """A picture that cannot be read; the message names the file and the reason."""


def default_preprocessing(model_name: str) -> dict:
    """What torchvision publishes with its ImageNet weights of a variant, for use with
    `resize_and_crop` and `my_dataset.normalize`: resize and crop in pixels, mean and std of RGB
    values in 0 to 1. Networks without published weights use the same as x1.0."""
    resize = 232 if model_name in ("shufflenet_v2_x1_5", "shufflenet_v2_x2_0") else 256
    return {"resize": resize, "crop": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def check_preprocessing(preprocessing: object, source: str | Path) -> None:
    """Raise RunError unless it is as `default_preprocessing` returns it; `source` says whence."""
    values = preprocessing if isinstance(preprocessing, dict) else {}
    resize, crop = values.get("resize"), values.get("crop")
    if not (isinstance(resize, int) and isinstance(crop, int) and 1 <= crop <= resize <= 1024):
        raise RunError(
            f"{source}: resize {repr(resize)} and crop {repr(crop)} are not 1 <= crop <= resize"
        )
    colours = [values.get("mean"), values.get("std")]
    if not all(isinstance(c, list) and len(c) == 3 and all(map(_positive, c)) for c in colours):
        raise RunError(f"{source}: mean and std {repr(colours)} are no colours")


def _positive(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1e3


def check_classes(classes: object, source: str | Path) -> None:
    """Raise RunError unless it is a list of different names, such as folders have."""
    named = isinstance(classes, list) and all(map(is_name, classes))
    if not named or len(set(classes)) != len(classes):
        raise RunError(f"{source}: its class names are no text, or one stands twice")


def is_name(value: object) -> bool:
    """Whether it is text that a file name could be: others cannot be written to a table."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def load_rgb(path: str | Path) -> Image.Image:
    """Read a picture as it should be seen: upright by its EXIF orientation, 8-bit RGB.

    Transparency lies over white; 16-bit grey is scaled to 8 bits, not clipped; of an animation
    the first frame is read.

    Raises:
        ImageError: missing, empty, truncated, too large, not a picture, or of another format than
            JPEG, PNG, WebP, BMP, GIF and TIFF.
    """
    try:
        _check_kind(path)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image)
            _check_scans(image, path)
            image.load()
            return _to_rgb(_upright(image))
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        # "from None": a worker process of a DataLoader must be able to pickle it.
        raise ImageError(f"{printable(path)}: {printable(_reason(path, error))}") from None


def check_header(path: str | Path) -> None:
    """Raise ImageError if `load_rgb` would refuse a picture for what its first bytes say. Reads
    these alone, so that a thousand pictures take a fraction of a second."""
    try:
        _check_kind(path)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image)
    except Exception as error:
        raise ImageError(f"{printable(path)}: {printable(_reason(path, error))}") from None


def _check_scans(image: Image.Image, path: str | Path) -> None:
    # Each scan of a JPEG may go over all its pixels, but needs only a dozen bytes.
    if image.format == "JPEG":
        scans = Path(path).read_bytes().count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of {scans} scans, over {MAX_SCANS}")


def _check_kind(path: str | Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a file")  # a named pipe would be waited for, without an end


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, over {MAX_PIXELS:,} in all")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF: the pixels are still good
        return image
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and, where Pillow has no better mode, "I"
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(path: str | Path, error: Exception) -> str:
    path = Path(path)
    if isinstance(error, Image.UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "the file is empty"
        return f"not a picture, or damaged, or none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def resize_and_crop(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Resize the shorter side to `resize` pixels (bilinear, antialiased) and cut the centre.

    The same pixels as torchvision's Resize and CenterCrop, but for pictures over 16 times longer
    than wide, whose ends are cut off first to bound time and memory.

    Args:
        image: RGB.
        resize: the shorter side after resizing, at least `crop`.
        crop: side of the square that is kept.

    Returns:
        uint8 (crop, crop, 3).
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = _center(image, min(width, longest), min(height, longest))
        width, height = image.size
    scaled = resize * max(width, height) // min(width, height)
    size = (resize, scaled) if width <= height else (scaled, resize)
    return np.array(_center(image.resize(size, Image.Resampling.BILINEAR), crop, crop))


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
