"""One image, for all scripts: open it safely, turn it upright, make it RGB, resize and crop."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageStat, JpegImagePlugin

from shufflenet.common.files import kind_of
from shufflenet.common.messages import notice, printable

# What Pillow reads by itself: no format that starts a program, or has no pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
FORMATS += ("PCX", "SGI", "QOI", "PSD", "DDS")
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".tga", ".pcx",
    ".sgi", ".qoi", ".psd", ".dds",
})  # fmt: skip
PIXELS = 89_478_485  # at most, when decoded: a quarter of a GiB as RGB
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
TRANSPARENT = {0: 2, 2: 6}  # bytes of tRNS, by the kind of colours of a PNG
PNG = b"\x89PNG\r\n\x1a\n"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error below
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged EXIF, at length

Source = str | Path | IO[bytes] | Image.Image
Answer = TypeVar("Answer")


class ImageError(OSError):
    """An image that cannot be read, and why."""

    def __init__(self, path: object, reason: object = None) -> None:
        # With one argument, the whole message, it is unpickled, and raised by DataLoader's workers.
        super().__init__(path if reason is None else f"{printable(path)}: {printable(reason)}")
        self.path, self.reason = str(path), str(reason)


def _read(source: Source, use: Callable[[Image.Image], Answer]) -> Answer:
    """use(image) of an image whose pixels are not decoded yet. What goes wrong becomes an
    ImageError, but for a lack of memory, which is no fault of the image."""
    try:
        try:
            with _opened(source) as image:
                return use(image)
        except MemoryError:
            raise
        except Exception:
            if not _first_bytes(source).startswith(PNG):
                raise
            with Image.open(_needed_chunks(source), formats=["PNG"]) as image:
                return use(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
        if isinstance(error, Image.UnidentifiedImageError | SyntaxError | struct.error):
            reason = f"no image, but {kind_of(_first_bytes(source))}"
        raise ImageError(source, reason) from None


def _opened(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        image = source.copy()  # the caller's is neither turned nor closed
        image.tag_v2 = getattr(source, "tag_v2", {})
        return image
    # TGA has no mark of its own: it would be seen in damaged files of other kinds.
    formats = [*FORMATS, "TGA"] if str(source).lower().endswith(".tga") else FORMATS
    try:
        return Image.open(source, formats=formats)
    except Image.DecompressionBombError:
        if not _first_bytes(source).startswith(b"\xff\xd8"):
            raise
        if hasattr(source, "seek"):
            source.seek(0)
        return JpegImagePlugin.JpegImageFile(source)  # whose decoder may shrink it


def _needed_chunks(source: Source) -> IO[bytes]:
    """A PNG without what its pixels do not need: texts and colour profiles that are too large for
    Pillow, or damaged."""
    if hasattr(source, "seek"):
        source.seek(0)
        data = source.read()
    else:
        data = Path(source).read_bytes()
    kept, place = [data[:8]], 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 8 + length
        if kind[:1].isupper():  # it is needed
            kept.append(data[place : end + 4])
        elif kind == b"eXIf" or (kind == b"tRNS" and length == TRANSPARENT.get(data[25], length)):
            chunk = data[place:end]
            kept.append(chunk + struct.pack(">I", zlib.crc32(chunk[4:])))
        place = end + 4
    return io.BytesIO(b"".join(kept))


def _first_bytes(source: Source) -> bytes:
    with suppress(Exception):
        if hasattr(source, "seek"):  # an open file
            source.seek(0)
            return source.read(512)
        with open(source, "rb") as file:
            return file.read(512)
    return b""


def is_small(path: str | Path) -> bool:
    """Whether an image has at most 48 pixels a side; False if it cannot be read."""
    with suppress(ImageError):
        return _read(path, lambda image: max(image.size) <= 48)
    return False


def load_rgb(source: Source) -> Image.Image:
    """Read an image as it should be seen: upright by its EXIF orientation, 8-bit RGB.

    Transparency lies over white; 16-bit grey is scaled to 8 bits, not clipped; of an animation
    the first frame is read. ImageError if it is missing, empty, truncated, over `PIXELS`, or none
    of the `FORMATS`.
    """
    return _read(source, _decoded)


def load_crop(source: Source, crop: Callable, side: int, spare: float) -> np.ndarray:
    """Read a part of an image, as `load_rgb` does, resized (bilinear, antialiased) to uint8
    (side, side, 3). `crop(width, height)` of the image upright is its left, top, right, bottom.

    Only the part is resized: less work, and no image is too long for the memory. The decoder of
    JPEG shrinks large photographs by 2, 4 or 8, so long as the part keeps `spare * side` pixels.
    """

    def part(image: Image.Image) -> np.ndarray:
        width, height = image.size
        if not width * height:
            raise ValueError("it has no pixels")
        if image.info.get("progressive") and width * height > PIXELS:
            raise ValueError(f"{width}x{height} pixels are too many for a progressive JPEG")
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

    return _read(source, part)


def _decoded(image: Image.Image) -> Image.Image:
    if image.width * image.height > PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many")
    white, deep = _white(image), ";16" in str(image.tile if hasattr(image, "tile") else "")
    image.load()
    with suppress(Exception):  # damaged EXIF: the pixels are still good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # "I;16" and, where Pillow has no better mode, "I"
        values = np.asarray(image)
        most = values.max()
        if image.mode == "F" or values.min() < 0 or most > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits")
        if most > white:
            white = 65535
        elif white == 65535 and 255 < most < 4096:
            _notice_12_bits()
        return Image.fromarray(np.round(values / (white / 255)).astype(np.uint8)).convert("RGB")
    if deep and max(high for _, high in ImageStat.Stat(image.convert("RGB")).extrema) < 16:
        _notice_12_bits()  # colours, of which Pillow keeps the upper 8 bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _white(image: Image.Image) -> int:
    """The value of white of a 16-bit image: 65535, unless a TIFF says that it has fewer bits. (Its
    largest value, which the same tag may hold, does not: images would be scaled one by one.)"""
    tags = getattr(image, "tag_v2", {})
    with suppress(Exception):  # damaged tags
        bits = int(np.max(tags.get(BITS_PER_SAMPLE, 16)))
        declared = int(np.max(tags.get(MAX_SAMPLE_VALUE, 65535)))
        for value in (2**bits - 1, declared):
            if value in (1023, 4095, 16383):
                return value
    return 65535


@cache
def _notice_12_bits() -> None:
    what = "look nearly black, as of 12 bits"
    notice(f"16-bit images whose values stay below 4096 {what}: save them with all 16")


def load_centre(source: Source, preprocessing: dict) -> np.ndarray:
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

    return load_crop(source, centre, crop, spare=2)
