"""Reading one picture, against torchvision and against pixels worked out by hand."""

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import models, transforms

import image
from image import SUFFIXES, ImageError, default_preprocessing, load_rgb, resize_and_crop

ROOT = Path(image.__file__).parent
PHOTOS = sorted((Path(__file__).parents[2] / "shared/data/flower_photos").glob("*/*.jpg"))[::125]
RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(*pixels) -> Image.Image:
    """Return a picture one pixel high: L, LA, RGB or RGBA by the length of the pixels."""
    return Image.fromarray(np.array([pixels], dtype=np.uint8))


def read_row(path: Path) -> list:
    """Return the first row of pixels as the project reads it; a grey pixel as one number."""
    picture = load_rgb(path)
    assert picture.mode == "RGB"
    return [r if r == g == b else (r, g, b) for r, g, b in np.asarray(picture)[0].tolist()]


def png(width: int, height: int, bits: int, colour_type: int, data: bytes, extra=()) -> bytes:
    """Return a PNG file put together by hand; `data` is one row, `extra` further chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"\0" + data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff16(order: str, *pixels: int) -> bytes:
    """Return a 16-bit grey TIFF file put together by hand; order is "<" or ">"."""
    data = struct.pack(f"{order}{len(pixels)}H", *pixels)
    tags = [(256, len(pixels)), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data))]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def exif(*tags: tuple[int, int, int, int]) -> bytes:
    """Return EXIF data put together by hand from (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def refusal(path: Path) -> str:
    """Return why a picture is refused, after checking that one line names it."""
    with pytest.raises(ImageError) as caught:
        load_rgb(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# What a person should see of the stored rows 123 and 456.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_upright_by_its_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    blocks = np.kron(UPRIGHT[1], np.full((16, 16), 40)).astype(np.uint8)
    Image.fromarray(blocks).convert("RGB").save(path, exif=exif((0x112, 3, 1, orientation)))
    seen = np.asarray(load_rgb(path))[8::16, 8::16]
    expected = np.repeat(np.array(UPRIGHT[orientation])[..., None], 3, axis=2)
    assert np.array_equal(np.round(seen / 40), expected)


DAMAGED_EXIF = {
    "no TIFF header": b"Exif\0\0junk",
    "ends too early": b"Exif\0\0II*\0\x08\0\0\0\x05\0garbage",
    "points outside": exif((0x10F, 2, 40, 0x7F7F7F7F)),
    "an orientation of 99": exif((0x112, 3, 1, 99)),
    "a resolution that is text": exif((0x11A, 2, 3, 0x41)),
    "a width of -1": exif((0x100, 9, 1, 0xFFFFFFFF)),
}


@pytest.mark.parametrize("data", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data")
def test_damaged_exif_still_gives_the_picture(tmp_path, data):
    noise(16, 8).save(tmp_path / "a.jpg", exif=data)
    assert load_rgb(tmp_path / "a.jpg").size == (16, 8)


@pytest.mark.parametrize("damage", [(0x11A, 2, 3, 0x41), (0x100, 9, 1, 0xFFFFFFFF)])
def test_damage_elsewhere_in_the_exif_does_not_cost_the_orientation(tmp_path, damage):
    noise(16, 8).save(tmp_path / "a.jpg", exif=exif((0x112, 3, 1, 6), damage))
    assert load_rgb(tmp_path / "a.jpg").size == (8, 16)


def test_grey_becomes_rgb_and_transparency_lies_over_white(tmp_path):
    row(0, 77, 255).save(tmp_path / "L.png")
    assert read_row(tmp_path / "L.png") == [0, 77, 255]
    row((100, 255), (100, 0), (0, 51)).save(tmp_path / "LA.png")
    assert read_row(tmp_path / "LA.png") == [100, 255, 204]
    colours = row((*RED, 255), (*BLUE, 0), (*RED, 51))
    for name in ("RGBA.png", "RGBA.tif", "RGBA.webp"):
        colours.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert read_row(tmp_path / name) == [RED, 255, (255, 204, 204)], name


def test_palettes_become_rgb_with_and_without_transparency(tmp_path):
    indices = row(0, 1, 2)
    indices.putpalette([*RED, *BLUE, 9, 9, 9])
    for name, kwargs, expected in [
        ("plain.png", {}, [RED, BLUE, 9]),
        ("one.png", {"transparency": 1}, [RED, 255, 9]),
        ("each.png", {"transparency": bytes([51, 0, 255])}, [(255, 204, 204), 255, 9]),
        ("plain.gif", {}, [RED, BLUE, 9]),
        ("one.gif", {"transparency": 1}, [RED, 255, 9]),
        ("plain.bmp", {}, [RED, BLUE, 9]),
    ]:
        indices.save(tmp_path / name, **kwargs)
        assert read_row(tmp_path / name) == expected, name


def test_the_transparent_colour_of_a_png_without_alpha_becomes_white(tmp_path):
    grey = png(2, 1, 8, 0, bytes([0, 7]), [(b"tRNS", struct.pack(">H", 0))])
    (tmp_path / "grey.png").write_bytes(grey)
    assert read_row(tmp_path / "grey.png") == [255, 7]
    rgb = png(2, 1, 8, 2, bytes([*RED, *BLUE]), [(b"tRNS", struct.pack(">HHH", *RED))])
    (tmp_path / "rgb.png").write_bytes(rgb)
    assert read_row(tmp_path / "rgb.png") == [255, BLUE]


@pytest.mark.parametrize(
    ("ink", "expected"),
    [((0, 255, 255, 0), RED), ((255, 255, 0, 0), BLUE), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk_becomes_rgb(tmp_path, ink, expected):
    for name in ("a.jpg", "a.tif"):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / name, quality=95)
        seen = np.asarray(load_rgb(tmp_path / name)).astype(int)
        assert np.abs(seen - expected).max() <= 3, name


def test_one_bit_pictures_are_black_and_white(tmp_path):
    bits = Image.fromarray(np.array([[True, False, False, True]]))
    for name in ("a.png", "a.tif", "a.bmp"):
        bits.save(tmp_path / name)
        assert read_row(tmp_path / name) == [255, 0, 0, 255], name


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = [65535, 32768, 0, *(257 * k for k in range(256))]
    expected = [255, 128, 0, *range(256)]
    big_endian = struct.pack(f">{len(values)}H", *values)
    (tmp_path / "a.png").write_bytes(png(len(values), 1, 16, 0, big_endian))
    (tmp_path / "little.tif").write_bytes(tiff16("<", *values))
    (tmp_path / "big.tif").write_bytes(tiff16(">", *values))
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "wide.tif")
    for name in ("a.png", "little.tif", "big.tif", "wide.tif"):
        assert read_row(tmp_path / name) == expected, name


def test_sixteen_bits_of_colour_are_scaled_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, struct.pack(">3H", 65535, 32768, 257 * 77)))
    assert read_row(tmp_path / "a.png") == [(255, 128, 77)]


@pytest.mark.parametrize("pixels", [[0, 65536], [-1, 0], [0.5, 1.0]])
def test_pixels_of_32_bits_are_refused_since_their_range_is_unknown(tmp_path, pixels):
    kind = np.float32 if isinstance(pixels[0], float) else np.int32
    Image.fromarray(np.array([pixels], dtype=kind)).save(tmp_path / "a.tif")
    assert "save it with 8 or 16 bits" in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_listed_suffix_reads_in_either_letter_case(tmp_path, suffix):
    for name in (f"a{suffix}", f"B{suffix.upper()}"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name)
        seen = np.asarray(load_rgb(tmp_path / name)).astype(int)
        assert np.abs(seen - RED).max() <= 3


def test_the_suffixes_are_those_of_the_six_formats():
    assert sorted(SUFFIXES) == [".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"]


def test_the_content_decides_the_format_not_the_suffix(tmp_path):
    row(1, 2, 3).save(tmp_path / "a.jpg", "PNG")
    assert read_row(tmp_path / "a.jpg") == [1, 2, 3]
    row(1, 2, 3).save(tmp_path / "b.jpg", "PPM")  # no format that the project promises
    assert "not a picture" in refusal(tmp_path / "b.jpg")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo"])
def test_of_several_frames_the_first_is_read(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_rgb(tmp_path / name)).astype(int) - RED).max() <= 3


def test_no_file_stays_open(tmp_path):
    frames = [noise(16, 16, seed) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    noise(16, 16).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    before = os.listdir("/dev/fd")
    picture = load_rgb(tmp_path / "a.gif")
    with pytest.raises(ImageError) as caught:
        load_rgb(tmp_path / "b.png")
    assert os.listdir("/dev/fd") == before
    assert picture
    assert caught.value  # both kept until here: neither may hold the file


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("a.jpg", {}),
        ("progressive.jpg", {"progressive": True}),
        ("a.png", {}),
        ("a.webp", {}),
        ("lossless.webp", {"lossless": True}),
        ("a.bmp", {}),
        ("a.gif", {}),
        ("a.tif", {}),
        ("packed.tif", {"compression": "tiff_lzw"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:Truncated")
def test_a_file_cut_anywhere_is_refused(tmp_path, name, kwargs):
    noise(60, 40).save(tmp_path / name, **kwargs)
    whole = (tmp_path / name).read_bytes()
    for size in [1, 4, 10, 30, 60, *(len(whole) * tenth // 10 for tenth in range(1, 10))]:
        (tmp_path / name).write_bytes(whole[:size])
        assert refusal(tmp_path / name), size


def test_what_is_no_picture_is_refused_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert refusal(tmp_path / "empty.jpg") == "the file is empty"
    (tmp_path / "text.jpg").write_text("a shopping list\n" * 100)
    assert "not a picture" in refusal(tmp_path / "text.jpg")
    assert refusal(tmp_path / "missing.jpg") == os.strerror(errno.ENOENT)
    assert refusal(tmp_path) == "not a file"


def test_a_line_break_in_the_name_leaves_the_message_one_line_that_names_the_file(tmp_path):
    (tmp_path / "two\nlines.jpg").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        load_rgb(tmp_path / "two\nlines.jpg")
    assert str(caught.value) == f"{tmp_path}/two\\nlines.jpg: the file is empty"


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(60000, 60000), (13000, 13000), (10000, 10000)])
def test_a_small_file_that_claims_a_huge_picture_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size, 8, 2, bytes(100)))
    assert "pixels" in refusal(tmp_path / "bomb.png")


@pytest.mark.parametrize(("progressive", "more"), [(True, 10), (True, 100), (False, 100)])
def test_a_jpeg_of_many_scans_is_refused(tmp_path, progressive, more):
    """Its last scan again and again is still a picture, which takes the longer to read."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG", progressive=progressive)
    data = file.getvalue()
    first, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    (tmp_path / "a.jpg").write_bytes(data[:end] + data[first:end] * more + data[end:])
    if more == 10:
        assert load_rgb(tmp_path / "a.jpg").getpixel((9, 9)) == (254, 0, 0)
    else:
        with pytest.raises(ImageError, match=r"a JPEG of 1\d\d scans, over 64"):
            load_rgb(tmp_path / "a.jpg")


@pytest.mark.parametrize("read", [load_rgb, image.check_header])
def test_a_named_pipe_is_refused_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg: not a file"):
        read(tmp_path / "a.jpg")


def test_a_picture_without_width_or_height_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    jpeg = bytearray((tmp_path / "a.jpg").read_bytes())
    width = jpeg.index(b"\xff\xc0") + 7
    jpeg[width : width + 2] = bytes(2)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    bmp = bytearray((tmp_path / "a.bmp").read_bytes())
    bmp[18:22] = bytes(4)
    for data in (png(0, 1, 8, 2, b""), png(1, 0, 8, 2, b""), jpeg, bmp):
        (tmp_path / "a.jpg").write_bytes(data)
        assert refusal(tmp_path / "a.jpg")


def test_the_error_can_be_pickled_for_worker_processes(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_rgb(tmp_path / "missing.jpg")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ImageError
    assert str(copy) == str(caught.value)
    assert isinstance(copy, OSError)


# Upright and wide, odd and even, smaller and larger than the crop, up to 16 times longer than wide.
SIZES = [(1, 1), (2, 2), (7, 5), (224, 224), (256, 256), (232, 231), (500, 333), (333, 500)]
SIZES += [(1, 16), (16, 1), (31, 496), (640, 40), (1023, 64), (255, 257), (320, 239), (37, 411)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(90, 700, (16, 2)).tolist()]


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (224, 224), (65, 48)])
def test_resize_and_crop_gives_the_pixels_of_torchvision(resize, crop):
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    for picture in pictures + [load_rgb(path) for path in PHOTOS]:
        ours = resize_and_crop(picture, resize, crop)
        assert (ours.shape, ours.dtype) == ((crop, crop, 3), np.uint8)
        assert np.array_equal(ours, np.asarray(theirs(picture))), picture.size


LONG = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))  # 256 x 25,600,000 pixels take 26 GB
from PIL import Image
from image import resize_and_crop
wide, upright = Image.new("RGB", (100_000, 1)), Image.new("RGB", (1, 100_000))
wide.paste("red", (49_992, 0, 50_008, 1))
upright.paste("red", (0, 49_992, 1, 50_008))
for picture in (wide, upright):
    cut = resize_and_crop(picture, 256, 224)
    print(cut.shape, cut.reshape(-1, 3).min(0), cut.reshape(-1, 3).max(0))
"""


def test_a_line_of_100000_pixels_is_cut_to_its_middle_in_little_memory():
    run = subprocess.run(
        [sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "(224, 224, 3) [255   0   0] [255   0   0]\n" * 2, run.stderr


@pytest.mark.parametrize("width", ["0_5", "1_0", "1_5", "2_0"])
def test_default_preprocessing_is_what_torchvision_publishes_with_its_weights(width):
    weights = models.get_model_weights(f"shufflenet_v2_x{width}").DEFAULT
    theirs = weights.transforms()
    assert default_preprocessing(f"shufflenet_v2_x{width}") == {
        "resize": theirs.resize_size[0],
        "crop": theirs.crop_size[0],
        "mean": theirs.mean,
        "std": theirs.std,
    }


def test_networks_without_published_weights_are_prepared_like_x1_0():
    expected = default_preprocessing("shufflenet_v2_x1_0")
    assert default_preprocessing("shufflenet_v1_x2_0_g3") == expected


def test_reading_pictures_imports_no_torch_and_prints_no_warning(tmp_path):
    (tmp_path / "large.png").write_bytes(png(10000, 10000, 8, 2, bytes(100)))
    code = f"""
import sys, image
try:
    image.load_rgb({str(tmp_path / "large.png")!r})
except image.ImageError:
    print(sorted(name for name in sys.modules if name.startswith("torch")))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
