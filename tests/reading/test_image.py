"""Reading one image, against torchvision and against pixels worked out by hand."""

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT, noise
from PIL import Image, JpegImagePlugin
from torchvision import models, transforms

from model import default_preprocessing
from shufflenet.reading import image
from shufflenet.reading.image import SUFFIXES, ImageError, load_centre, load_crop, load_rgb

PHOTOS = sorted((ROOT.parent / "shared/data/flower_photos").glob("*/*.jpg"))[::125]
RED, BLUE = (255, 0, 0), (0, 0, 255)


def row(*pixels):
    """An image one pixel high: L, LA, RGB or RGBA by the length of the pixels."""
    return Image.fromarray(np.array([pixels], dtype=np.uint8))


def read_row(path):
    """The first row of pixels as the project reads it; a grey pixel as one number."""
    pixels = np.asarray(load_rgb(path))[0].tolist()
    return [r if r == g == b else (r, g, b) for r, g, b in pixels]


def bomb(path, size):
    """Write a small BMP file whose header claims size x size pixels."""
    Image.new("RGB", (1, 1)).save(path, "BMP")
    data = path.read_bytes()
    path.write_bytes(data[:18] + struct.pack("<ii", size, size) + data[26:])


def exif(*tags):
    """EXIF data put together by hand from (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def read(path):
    """The image, or why it cannot be read."""
    try:
        return load_rgb(path)
    except ImageError as error:
        name, _, reason = str(error).partition(": ")
    assert (name, reason.count("\n")) == (str(path), 0)
    return reason


# What a person should see of the stored rows 123 and 456, by the EXIF orientation.
UPRIGHT = {1: "123 456", 2: "321 654", 3: "654 321", 4: "456 123"}
UPRIGHT |= {5: "14 25 36", 6: "41 52 63", 7: "63 52 41", 8: "36 25 14"}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    blocks = np.kron([[1, 2, 3], [4, 5, 6]], np.full((16, 16), 40)).astype(np.uint8)
    Image.fromarray(blocks).convert("RGB").save(path, exif=exif((0x112, 3, 1, orientation)))
    seen = np.asarray(load_rgb(path))[8::16, 8::16, 1]
    rows = ("".join(str(round(value / 40)) for value in line) for line in seen.tolist())
    assert " ".join(rows) == UPRIGHT[orientation]


# No TIFF header; a pointer outside, after a good orientation.
DAMAGED_EXIF = {b"Exif\0\0junk": (16, 8)}
DAMAGED_EXIF |= {exif((0x112, 3, 1, 6), (0x10F, 2, 40, 0x7F7F7F7F)): (8, 16)}


@pytest.mark.parametrize(("data", "size"), DAMAGED_EXIF.items())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_still_gives_the_image_and_what_is_good_of_it(tmp_path, data, size):
    noise(16, 8).save(tmp_path / "a.jpg", exif=data)
    assert load_rgb(tmp_path / "a.jpg").size == size


MIXED = row((*RED, 255), (*BLUE, 0), (*RED, 51))
PALETTE, BITS = row(0, 1, 2), row(255, 0, 255).convert("1")
PALETTE.putpalette([*RED, *BLUE, 9, 9, 9])
PALE = (255, 204, 204)  # a fifth of red over white
KINDS = [
    ("LA.png", row((100, 255), (100, 0), (0, 51)), {}, [100, 255, 204]),
    ("grey.png", row(0, 77), {"transparency": 0}, [255, 77]),
    ("rgb.png", row(RED, BLUE), {"transparency": RED}, [255, BLUE]),
    *((f"RGBA.{suffix}", MIXED, {}, [RED, 255, PALE]) for suffix in ("png", "tif")),
    ("RGBA.webp", MIXED, {"lossless": True}, [RED, 255, PALE]),
    *((f"1.{suffix}", BITS, {}, [255, 0, 255]) for suffix in ("png", "tif", "bmp")),
    *((f"plain.{suffix}", PALETTE, {}, [RED, BLUE, 9]) for suffix in ("png", "gif", "bmp")),
    *((f"one.{suffix}", PALETTE, {"transparency": 1}, [RED, 255, 9]) for suffix in ("png", "gif")),
    ("each.png", PALETTE, {"transparency": bytes([51, 0, 255])}, [PALE, 255, 9]),
]


@pytest.mark.parametrize(("name", "pixels", "options", "expected"), KINDS)
def test_every_kind_becomes_rgb_over_white(tmp_path, name, pixels, options, expected):
    pixels.save(tmp_path / name, **options)
    assert read_row(tmp_path / name) == expected


def test_cmyk_becomes_rgb(tmp_path):
    inks = {(0, 255, 255, 0): RED, (255, 255, 0, 0): BLUE, (0, 0, 0, 255): (0, 0, 0)}
    for name, (ink, expected) in itertools.product(("a.jpg", "a.tif"), inks.items()):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / name, quality=95)
        assert np.abs(np.asarray(load_rgb(tmp_path / name)).astype(int) - expected).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped_and_more_are_refused(tmp_path):
    values = [65535, 32768, 0, *(257 * k for k in range(256))]
    big, little = (struct.pack(f"{order}{len(values)}H", *values) for order in "><")
    Image.frombytes("I;16B", (259, 1), big).save(tmp_path / "big.tif")
    Image.frombytes("I;16", (259, 1), little).save(tmp_path / "little.tif")
    Image.frombytes("I;16", (259, 1), little).save(tmp_path / "a.png")
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "wide.tif")
    for name in ("a.png", "big.tif", "little.tif", "wide.tif"):
        assert read_row(tmp_path / name) == [255, 128, 0, *range(256)], name
    for pixels in ([0, 65536], [-1, 0], [0.5, 1.0]):  # of a range that nobody knows
        pixels = np.array([pixels], np.float32 if 0.5 in pixels else np.int32)
        Image.fromarray(pixels).save(tmp_path / "a.tif")
        assert "save it with 8 or 16 bits" in read(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo"])
def test_of_several_frames_the_first_is_read_and_no_file_stays_open(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    before = os.listdir("/dev/fd")
    found = load_rgb(tmp_path / name)
    assert os.listdir("/dev/fd") == before
    assert np.abs(np.asarray(found).astype(int) - RED).max() <= 3


def encoded(form, **options):
    file = io.BytesIO()
    noise(60, 40).save(file, form, **options)
    return file.getvalue()


FILES = {form: encoded(form) for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
FILES["progressive JPEG"] = encoded("JPEG", progressive=True, exif=exif((0x112, 3, 1, 6)))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    whole = FILES[kind]
    for size in [1, 4, 10, 30, 60, *(len(whole) * tenth // 10 for tenth in range(1, 10))]:
        (tmp_path / "a.jpg").write_bytes(whole[:size])
        assert isinstance(read(tmp_path / "a.jpg"), str), size


MORE = {form: encoded(form) for form in ("AVIF", "JPEG2000", "PPM", "PCX", "SGI", "QOI", "DDS")}


@pytest.mark.parametrize("kind", FILES | MORE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_is_damaged_there_is_an_image_or_one_line(tmp_path, kind):
    """A few random changes or none; FUZZ=100000 tries so many."""
    draw, path, images = random.Random(0), tmp_path / "a.jpg", 0
    for _ in range(int(os.environ.get("FUZZ", "60"))):
        data = bytearray((FILES | MORE)[kind])
        for _ in range(draw.randint(0, 4)):
            at, count = int(draw.random() * len(data)), draw.choice((1, 2, 8, 64))
            part = draw.choice((draw.randbytes(count), b"\0" * count, b"\xff" * count, b"", data))
            data[at : at + draw.choice((0, count, len(data)))] = part[:1000]
        path.write_bytes(data)
        if not isinstance(read(path), str):
            images += 1
            assert load_centre(path, {"resize": 40, "crop": 32}).shape == (32, 32, 3)
    assert images


def test_the_content_decides_not_the_name_and_what_is_no_image_is_refused(tmp_path):
    row(1, 2, 3).save(tmp_path / "a.jpg", "PNG")
    assert read_row(tmp_path / "a.jpg") == [1, 2, 3]
    row(1, 2, 3).save(tmp_path / "b.jpg", "EPS")  # which Pillow has a program run for
    assert read(tmp_path / "b.jpg") == "no image, but a PostScript document"
    (tmp_path / "two\nlines.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=f"{tmp_path}/two\\\\nlines.jpg: no image, but empty"):
        load_rgb(tmp_path / "two\nlines.jpg")
    assert read(tmp_path / "missing.jpg") == "No such file or directory"
    for size in (10_000, 20_000):
        bomb(tmp_path / "bomb.bmp", size)
        assert "pixels" in read(tmp_path / "bomb.bmp")


SAVED = {"ppm": "PPM", "pgm": "PPM", "jfif": "JPEG", "tga": "TGA", "dib": "DIB"}
SAVED |= {
    "jp2": "JPEG2000",
    "avif": "AVIF",
    "pcx": "PCX",
    "sgi": "SGI",
    "qoi": "QOI",
    "apng": "PNG",
}
SAVED |= {"dds": "DDS"}


@pytest.mark.parametrize("suffix", SAVED)
def test_whatever_pillow_reads_by_itself_is_read(tmp_path, suffix):
    assert f".{suffix}" in SUFFIXES
    image = Image.new("RGB", (32, 32), RED)
    image.save(
        tmp_path / f"a.{suffix}", SAVED[suffix], **({"quality": 100} if suffix == "avif" else {})
    )
    found = np.asarray(load_rgb(tmp_path / f"a.{suffix}"))
    assert np.abs(found.astype(int) - RED).max() <= 4


OTHERS = {
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC photograph; convert it to JPEG",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif": "an AVIF image, which",
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2": "a video",
    b"\xef\xbb\xbf\n <!DOCTYPE HTML><title>404": "a web page",
    b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer; run `git lfs pull`",
    b"<!-- moved --><html>": "a web page",
    b"\x1a\x45\xdf\xa3\x01": "a video",
    b"<svg xmlns=": "an SVG drawing",
    b"%PDF-1.7": "a PDF document",
    b"not found\n": "text",
    bytes(300): "a file of zeros",
    b"\x89PNG\r\n\x1a\n" + bytes(99): "of an unknown kind, or damaged",
}


@pytest.mark.parametrize("content", OTHERS)
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert read(tmp_path / "a.jpg").startswith(f"no image, but {OTHERS[content]}")


def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", crc)


LARGE = zlib.compress(bytes(3_000_000))
BESIDE = {
    "a large text": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "a large profile": chunk(b"iCCP", b"icc\0\0" + LARGE),
    "a wrong sum": chunk(b"tEXt", b"a\0b", crc=1),
    "a damaged time": chunk(b"tIME", b"1"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("what", BESIDE)
def test_good_pixels_are_read_whatever_lies_beside_them(tmp_path, what, place):
    """The orientation and the transparent colour are still honoured."""
    pixels = row((9, 9, 9), RED, BLUE)
    pixels.save(tmp_path / "a.png", exif=exif((0x112, 3, 1, 3)), transparency=(9, 9, 9))
    data = (tmp_path / "a.png").read_bytes()
    cut = {"before": data.index(b"IDAT") - 4, "after": data.index(b"IEND") - 4}[place]
    (tmp_path / "a.png").write_bytes(data[:cut] + BESIDE[what] + data[cut:])
    assert read_row(tmp_path / "a.png") == [BLUE, RED, 255]
    assert load_centre(tmp_path / "a.png", {"resize": 8, "crop": 8}).shape == (8, 8, 3)


def test_a_damaged_transparency_leaves_the_colours(tmp_path):
    row(RED, BLUE).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    cut = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:cut] + chunk(b"tRNS", b"1") + data[cut:])
    assert read_row(tmp_path / "a.png") == [RED, BLUE]


def test_twelve_bits_are_noticed_once_unless_the_file_says_so(tmp_path, capsys):
    """A file that declares its range is scaled by it, not by the values that it happens to have."""
    image._notice_12_bits.cache_clear()
    values = struct.pack("<4H", 0, 1024, 2048, 4095)
    picture = Image.frombytes("I;16", (4, 1), values)
    for name in ("a.png", "b.tif"):
        picture.save(tmp_path / name)
        assert read_row(tmp_path / name) == [0, 4, 8, 16]
    said = "16-bit images whose values stay below 4096"
    assert capsys.readouterr().err.count(said) == 1
    image._notice_12_bits.cache_clear()
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # two pixels of RGB in 16 bits
    line = zlib.compress(struct.pack(">B6H", 0, *[4095] * 6))
    data = chunk(b"IHDR", head) + chunk(b"IDAT", line) + chunk(b"IEND", b"")
    (tmp_path / "colour.png").write_bytes(image.PNG + data)
    assert read_row(tmp_path / "colour.png") == [15, 15]
    assert said in capsys.readouterr().err
    picture.save(tmp_path / "c.tif", tiffinfo={281: 4095})
    assert read_row(tmp_path / "c.tif") == [0, 64, 128, 255]
    assert np.asarray(load_rgb(Image.open(tmp_path / "c.tif")))[0, :, 0].tolist() == [
        0,
        64,
        128,
        255,
    ]
    Image.frombytes("I;16", (4, 1), struct.pack("<4H", 0, 9, 99, 1000)).save(
        tmp_path / "d.tif", tiffinfo={281: 1000}
    )
    assert read_row(tmp_path / "d.tif") == [0, 0, 0, 4]  # 1000 is a value, no range
    (tmp_path / "e.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 2048))
    assert read_row(tmp_path / "e.pgm") == [255, 128]


# Upright and wide, odd and even, smaller and larger than the crop, and 16 times longer than wide.
SIZES = [(1, 1), (7, 5), (224, 224), (256, 256), (232, 231), (1, 16), (31, 496), (1023, 64)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(90, 700, (24, 2)).tolist()]


@pytest.fixture
def saved(tmp_path):
    """Save an image without loss; returns its path."""
    return lambda image: image.save(tmp_path / "saved.png") or tmp_path / "saved.png"


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (224, 224), (65, 48)])
def test_the_centre_has_the_pixels_of_torchvision(saved, resize, crop):
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    for each in images + [load_rgb(path) for path in PHOTOS]:
        ours = load_centre(saved(each), {"resize": resize, "crop": crop})
        assert (ours.shape, ours.dtype) == ((crop, crop, 3), np.uint8)
        apart = np.abs(ours.astype(int) - np.asarray(theirs(each)))
        assert apart.max() <= 2, each.size
        assert (apart > 1).mean() < 1e-4, each.size


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_centre_is_that_of_the_image_upright(tmp_path, suffix, orientation):
    image, exif = noise(301, 241).resize((602, 482)), Image.Exif()
    exif[0x0112] = orientation
    image.save(path := tmp_path / f"a.{suffix}", exif=exif, quality=95)
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    ours = load_centre(path, {"resize": 256, "crop": 224}).astype(int)
    assert np.abs(ours - np.asarray(steps(load_rgb(path)))).max() <= 1


@pytest.mark.parametrize("width", ["0_5", "1_0", "1_5", "2_0"])
def test_images_are_prepared_as_the_published_weights_want_them(width):
    ours = default_preprocessing(f"shufflenet_v2_x{width}")
    theirs = models.get_model_weights(f"shufflenet_v2_x{width}").IMAGENET1K_V1.transforms()
    assert [[ours["resize"]], [ours["crop"]]] == [theirs.resize_size, theirs.crop_size]
    assert (ours["mean"], ours["std"]) == (theirs.mean, theirs.std)


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_decoder_shrinks_photographs_but_never_below_what_is_wanted(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.effect_noise((60, 40), 80).convert("RGB").resize((3000, 2000))
    photo.save(path := tmp_path / "photo.jpg", quality=95, exif=exif)
    decoded, draft = [], JpegImagePlugin.JpegImageFile.draft

    def spy(image, mode, size):
        result = draft(image, mode, size)
        decoded.append(image.size)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
        ours = load_centre(path, {"resize": 256, "crop": 224})
        for pixels, spare in ((1000, 1), (448, 1), (447, 1), (100, 1), (2000, 2)):
            load_crop(path, lambda w, h, side=pixels: (0, 0, side, side), 224, spare)
    halves = [3000 / width for width, _ in decoded]
    # 2000 / (2 x 256) = 3.9; then 1000 / 224 = 4.5, 2, 1.99, 0.4 and 2000 / (2 x 224) = 4.5.
    assert halves == [2, 4, 2, 1, 1, 4]
    steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    theirs = np.asarray(transforms.Compose(steps)(load_rgb(path)))
    assert np.abs(ours.astype(int) - theirs).mean() < 1


HUGE = """
import io, resource, sys
from PIL import Image, JpegImagePlugin
from shufflenet.reading import image
Image.MAX_IMAGE_PIXELS = None
Image.new("RGB", (16000, 12500), "red").save("a.jpg", quality=50)  # 200 megapixels, 600 MB
Image.MAX_IMAGE_PIXELS = 89478485
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_DATA, (450 << 20, 450 << 20))
pixels = image.load_centre("a.jpg", {"resize": 256, "crop": 224})
print(abs(pixels.astype(int) - (254, 0, 0)).max() < 3)
try:
    image.load_rgb("a.jpg")
except image.ImageError as error:
    print("pixels are too many" in str(error))
"""


def test_a_photograph_that_the_decoder_shrinks_may_have_any_size_in_bounded_memory(tmp_path):
    words = [sys.executable, "-c", HUGE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == "True\nTrue\n", run.stderr


LONG = """
import resource, sys
from shufflenet.reading import image
wide = image.Image.new("RGB", (100_000, 1))
wide.paste("red", (49_992, 0, 50_008, 1))
wide.save("wide.png")
wide.transpose(image.Image.Transpose.ROTATE_90).save("high.png")
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))  # 256 x 25,600,000 pixels take 26 GB
for name in ("wide.png", "high.png"):
    pixels = image.load_centre(name, {"resize": 256, "crop": 224})
    print({tuple(p) for p in pixels.reshape(-1, 3).tolist()})
"""


def test_a_line_of_100000_pixels_is_cut_to_its_middle_in_little_memory(tmp_path):
    words = [sys.executable, "-c", LONG]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == "{(255, 0, 0)}\n" * 2, run.stderr
