"""Draw a stand-in for the flower_photos data set, to try training where there is no network."""

import argparse
import math
import random
import tempfile
from cmath import rect  # points are complex numbers: times rect(1, a) turns them by a radians
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageOps

# Petals, grounds and light have the same colours in every class: a network must learn shapes.
COLOURS = ("white", "gold", "orange", "lightpink")
GROUNDS = ("darkolivegreen", "olivedrab", "steelblue", "lightsteelblue", "rosybrown", "dimgray")
CANVAS = 384  # pixels; a bloom is drawn on a square of this size, then resized

# Outlines of petals from 0 to 1: a circle made narrow at its start, and the same the other way.
CIRCLE = [rect(1, math.pi * k / 10) for k in range(20)]
ROUND = [(1 + point.real) / 2 * complex(1, point.imag) for point in CIRCLE]
POINTED = [1 - point for point in ROUND]

# Rings of petals from the back: usual number, outline, length, width, colour if not the bloom's.
NESTED = (0.48, 0.39, 0.3, 0.21, 0.12)
RINGS = {
    "daisy": [(13, ROUND, 0.48, 0.09, None), (24, ROUND, 0.17, 0.03, "gold")],
    "dandelion": [(75 * length, ROUND, length, 0.03, None) for length in NESTED],
    "roses": [(5, ROUND, length, 0.75 * length, None) for length in NESTED],
    "sunflowers": [(28, POINTED, 0.48, 0.14, None), (40, ROUND, 0.25, 0.03, "saddlebrown")],
    "tulips": [(number, POINTED, 0.92, 0.35, None) for number in (4, 3, 2)],
}


def draw_bloom(name: str, rng: random.Random) -> Image.Image:
    """Return one flower of a class on a transparent square."""
    bloom = Image.new("RGBA", (CANVAS, CANVAS))
    draw, bloom_colour = ImageDraw.Draw(bloom), rng.choice(COLOURS)
    # A tulip is seen from the side: its petals fan out from the foot of the canvas.
    start, arc = (0.5 + 1j, 0.7) if name == "tulips" else (0.5 + 0.5j, 2 * math.pi)
    for usual_number, outline, length, width, ring_colour in RINGS[name]:
        number = round(usual_number * rng.uniform(0.8, 1.2))
        first = -math.pi / 2 - arc / 2 + rng.uniform(0, arc / number)  # -pi / 2 is up
        for k in range(number):
            turn = rect(1, first + k * arc / number)
            petal = [start + turn * complex(length * p.real, width * p.imag) for p in outline]
            corners = [(CANVAS * p.real, CANVAS * p.imag) for p in petal]
            light = rng.uniform(0.7, 1)
            fill = [int(light * v) for v in ImageColor.getrgb(ring_colour or bloom_colour)]
            draw.polygon(corners, tuple(fill), outline="saddlebrown")
    return bloom.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC)


def soft_spots(rng: random.Random, cells: int, size: int, *colours: str) -> Image.Image:
    """Return a square of soft spots, cells to a row, of shades between two colours."""
    spots = Image.frombytes("L", (cells, cells), rng.randbytes(cells**2))
    return ImageOps.colorize(spots.resize((size, size), Image.Resampling.BICUBIC), *colours)


def draw_picture(name: str, rng: random.Random, size: int) -> Image.Image:
    """Return a picture of a class, size x size pixels; every choice comes from rng."""
    picture = soft_spots(rng, rng.randint(2, 6), size, *rng.sample(GROUNDS, 2))
    draw = ImageDraw.Draw(picture)
    count = rng.choice((1, 1, 1, 2))
    for _ in range(count):
        x, y = int(size * rng.uniform(0.3, 0.7)), int(size * rng.uniform(0.3, 0.7))
        foot = x + size * rng.uniform(-0.2, 0.2)
        draw.line((x, y, foot, size), fill="darkolivegreen", width=size // 25)
        width = int(size * rng.uniform(0.6, 1) / count**0.4)
        bloom = draw_bloom(name, rng).resize((width, int(width * rng.uniform(0.7, 1))))
        picture.paste(bloom, (x - width // 2, y - width // 2), bloom)
    return ImageChops.multiply(picture, soft_spots(rng, 3, size, "darkgray", "white"))


def draw_sample_flowers(root: str | Path, per_class=80, seed=0, size=256) -> Path:
    """Draw the data set in the folder root and return it; a folder that exists is left alone."""
    root = Path(root)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside root and renamed when complete, so that a half-drawn set never bears its name.
    with tempfile.TemporaryDirectory(prefix=".", dir=root.parent) as scratch:
        for name in RINGS:
            folder = Path(scratch, "drawn", name)
            folder.mkdir(parents=True)
            for index in range(per_class):
                picture = draw_picture(name, random.Random(f"{seed}-{name}-{index}"), size)
                picture.save(folder / f"{name}_{index:03d}.jpg", quality=90)
        return Path(scratch, "drawn").rename(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="data/sample", help="(%(default)s)")
    parser.add_argument("--per-class", type=int, default=80, help="images per class (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    args = parser.parse_args()
    print(draw_sample_flowers(args.folder, args.per_class, args.seed, args.size))
