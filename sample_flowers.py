"""Draw a stand-in for the flower_photos data set, to try training where there is no network.

    python train.py --data-path sample

The five classes have the names and the folders of the real ones.  Background, light, focus, and the
number, size and place of the blooms are chosen alike for every class, and the classes share most of
their colours, so a network has to learn the shapes.  Accuracy here says nothing about photographs.
"""

import math
import random
import tempfile
from cmath import rect  # points are complex numbers: multiplying by rect(1, a) turns by a radians
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

Colour = tuple[int, ...]  # red, green and blue, 0 to 255
Form = list[complex]  # the corners of a polygon

FULL_TURN = 2 * math.pi
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # from one petal or seed to the next in many plants
UP, DOWN = -math.pi / 2, math.pi / 2  # y grows downwards

WHITE, CREAM, BLUSH, PINK = (246, 246, 240), (250, 238, 200), (246, 212, 226), (236, 130, 165)
RED, ORANGE, GOLD, YELLOW = (205, 25, 40), (245, 130, 35), (250, 185, 20), (252, 212, 40)
PURPLE, BROWN, GREENS = (150, 70, 160), (80, 48, 25), ((60, 110, 45), (85, 130, 60), (50, 95, 60))

BACKGROUNDS = (  # colour at the top and at the bottom; soft spots: number, width, height, contrast
    ((120, 160, 75), (50, 95, 40), 160, 0.02, 0.25, 45),  # grass
    ((95, 150, 225), (200, 220, 240), 8, 0.50, 0.12, 40),  # sky with clouds
    ((22, 30, 26), (44, 46, 38), 12, 0.20, 0.20, 15),  # the dark
    ((90, 125, 80), (70, 95, 60), 30, 0.25, 0.25, 80),  # a garden out of focus
    ((125, 95, 70), (85, 62, 45), 250, 0.05, 0.03, 40),  # soil
    ((200, 185, 165), (165, 150, 135), 25, 0.12, 2.0, 20),  # planks of a wall
)


def shade(colour: Colour, light: float) -> Colour:
    """Return the colour made darker (light below 1) or lighter (above 1)."""
    return tuple(min(255, int(light * value)) for value in colour)


def stray(rng: random.Random, colour: Colour, reach: int) -> Colour:
    """Return a colour near this one: lighter or darker by up to reach, and of a nearby hue."""
    light = rng.randint(-reach, reach)
    near = (value + light + rng.randint(-reach // 2, reach // 2) for value in colour)
    return tuple(min(255, max(0, value)) for value in near)


def outline(peak: float, fullness: float, steps: int = 5) -> Form:
    """Return the outline of a petal, one long and one wide, that starts at 0 and points right."""
    along = (step / steps for step in range(steps + 1))
    side = [complex(t, 0.5 * abs(math.sin(math.pi * t**peak)) ** fullness) for t in along]
    return side + [point.conjugate() for point in reversed(side)]


BLUNT, POINTED, LEAF = outline(1.8, 0.6), outline(1.2, 1.1), outline(0.8, 1.0)
CIRCLE = [rect(1, k * FULL_TURN / 15) for k in range(15)]
STAR = [rect((0.15, 0.03)[k % 2], k * FULL_TURN / 14) for k in range(14)]


@dataclass
class Bloom:
    """One flower on the canvas, drawn in its own units: its middle is 0, its petals end at 1."""

    draw: ImageDraw.ImageDraw
    rng: random.Random
    middle: complex  # pixels
    radius: float  # pixels
    squash: float  # height over width: below 1 for a flower that looks up or down
    turn: float  # radians

    def shape(self, points: Form, colour: Colour) -> None:
        """Fill a polygon."""
        scale = rect(self.radius, self.turn)
        placed = [self.middle + scale * complex(p.real, p.imag * self.squash) for p in points]
        self.draw.polygon([(p.real, p.imag) for p in placed], fill=colour)

    def disc(self, centre: complex, radius: float, colour: Colour) -> None:
        """Fill a circle."""
        self.shape([centre + radius * p for p in CIRCLE], colour)

    def petal(
        self, form: Form, angle: float, length: float, width: float, colour: Colour, at: complex = 0
    ) -> None:
        """Draw a petal or a leaf with a darker rim; it starts at a point and leaves at an angle."""
        colour, turn = shade(colour, self.rng.uniform(0.88, 1.06)), rect(1, angle)
        for wide, light in ((width, 0.78), (0.72 * width, 1)):
            points = [at + turn * complex(length * p.real, wide * p.imag) for p in form]
            self.shape(points, shade(colour, light))

    def leaves(self, most: int, width: float) -> None:
        """Draw some leaves that look out from behind the flower."""
        for _ in range(self.rng.randint(0, most)):
            angle = self.rng.uniform(0, FULL_TURN)
            self.petal(LEAF, angle, 1.6, width, self.rng.choice(GREENS))

    def ring(self, form: Form, count: int, width: float, colour: Colour, length: float = 1) -> None:
        """Draw petals all the way round, no two quite alike."""
        start = self.rng.uniform(0, FULL_TURN)
        for k in range(count):
            angle = start + FULL_TURN * (k + self.rng.uniform(-0.2, 0.2)) / count
            self.petal(form, angle, length * self.rng.uniform(0.9, 1.05), width, colour)

    def seeds(self, count: int, radius: float, colour: Colour) -> None:
        """Fill a disc with dots, in the spirals that seeds make."""
        for k in range(count):
            dot = rect(radius * math.sqrt(k / count), k * GOLDEN_ANGLE)
            points = [dot + 0.03 * p for p in CIRCLE[::3]]
            self.shape(points, shade(colour, self.rng.uniform(0.7, 1.3)))


def daisy(bloom: Bloom, colour: Colour) -> None:
    """Draw narrow blunt petals around a small yellow middle."""
    count, middle = bloom.rng.randint(11, 17), bloom.rng.uniform(0.24, 0.32)
    bloom.ring(BLUNT, count, 3.6 / count, shade(colour, 0.86))
    bloom.ring(BLUNT, count, 3.6 / count, colour)
    bloom.disc(0, middle, shade(GOLD, 0.85))
    bloom.seeds(40, 0.9 * middle, GOLD)


def dandelion(bloom: Bloom, colour: Colour) -> None:
    """Draw a dense head of thin petals, or the ball of seeds that it turns into."""
    if bloom.rng.random() < 0.6:
        for length in (1.0, 0.85, 0.68, 0.5, 0.3):
            count = int(14 + 22 * length)
            bloom.ring(BLUNT, count, 0.13, shade(colour, 1.1 - 0.2 * length), length)
    else:
        bloom.squash = 1  # a ball is round from every side
        for k in range(90):
            tip = rect(0.95 * math.sqrt((k + 0.5) / 90), k * GOLDEN_ANGLE)
            bloom.shape([0, tip, 1.02 * tip], shade(WHITE, 0.72))
            bloom.shape([tip + rect(1, k) * p for p in STAR], shade(WHITE, 0.8 + 0.2 * abs(tip)))
        bloom.seeds(30, 0.13, (130, 105, 70))


def rose(bloom: Bloom, colour: Colour) -> None:
    """Draw round petals inside one another, each with a bright rim and a shadow within."""
    bloom.leaves(4, 0.6)
    start = bloom.rng.uniform(0, FULL_TURN)
    for k in range(22):
        size = 1 - k / 24
        out = rect(size, start + k * GOLDEN_ANGLE)
        for part, radius, light in ((0.45, 0.55, 0.85), (0.42, 0.52, 0.7), (0.37, 0.47, 0.5)):
            bloom.disc(part * out, radius * size, shade(colour, light + 0.27 * size))


def sunflower(bloom: Bloom, colour: Colour) -> None:
    """Draw pointed petals around a wide brown middle."""
    bloom.leaves(3, 0.8)
    count, middle = bloom.rng.randint(15, 22), bloom.rng.uniform(0.42, 0.54)
    bloom.ring(POINTED, count, 5 / count, shade(colour, 0.82))
    bloom.ring(POINTED, count, 5 / count, colour)
    bloom.disc(0, middle, shade(BROWN, 0.6))
    bloom.seeds(90, 0.95 * middle, shade(BROWN, 1.3))
    bloom.disc(0, 0.35 * middle, shade(BROWN, 0.8))


def tulip(bloom: Bloom, colour: Colour) -> None:
    """Draw a cup seen from the side, between long leaves."""
    bloom.squash = bloom.rng.uniform(1, 1.3)
    for side in (-1, 1):
        angle = UP + side * bloom.rng.uniform(0.15, 0.6)
        bloom.petal(LEAF, angle, 2.6, 0.4, bloom.rng.choice(GREENS), at=3j)
    for lean, width, light in ((0, 0.9, 0.62), (-0.3, 0.85, 0.8), (0.3, 0.85, 0.86), (0, 0.9, 1)):
        bloom.petal(LEAF, UP + lean, 1.75, width, shade(colour, light), at=0.9j)


FLOWERS: dict[str, tuple[Callable[[Bloom, Colour], None], tuple[Colour, ...]]] = {
    "daisy": (daisy, (WHITE, WHITE, CREAM, BLUSH)),
    "dandelion": (dandelion, (YELLOW, GOLD)),
    "roses": (rose, (RED, PINK, WHITE, YELLOW, ORANGE)),
    "sunflowers": (sunflower, (YELLOW, YELLOW, GOLD, (250, 160, 30))),
    "tulips": (tulip, (RED, PINK, WHITE, YELLOW, ORANGE, PURPLE)),
}


def spread(colours: Iterable[Colour], width: int, size: int) -> Image.Image:
    """Return a square picture that goes smoothly through a grid of colours, width to a row."""
    grid = Image.frombytes("RGB", (width, width), bytes(v for colour in colours for v in colour))
    return grid.resize((size, size), Image.Resampling.BICUBIC)


def draw_background(rng: random.Random, size: int) -> Image.Image:
    """Return a soft background of size x size pixels."""
    top, bottom, spots, width, height, contrast = rng.choice(BACKGROUNDS)
    small = size // rng.choice((4, 6, 10))  # enlarging it at the end puts it out of focus
    ground = spread((stray(rng, colour, 15) for colour in (top, top, bottom, bottom)), 2, small)
    draw = ImageDraw.Draw(ground, "RGBA")
    for _ in range(spots):
        x, y = rng.uniform(0, small), rng.uniform(0, small)
        w, h = (small * side * rng.uniform(0.3, 0.7) for side in (width, height))
        colour = stray(rng, top if y < small / 2 else bottom, contrast)
        draw.ellipse((x - w, y - h, x + w, y + h), fill=(*colour, 170))
    ground = ground.filter(ImageFilter.GaussianBlur(1))
    return ground.resize((size, size), Image.Resampling.BILINEAR)


def draw_picture(name: str, rng: random.Random, size: int) -> Image.Image:
    """Return an RGB picture of a class, size x size pixels; every choice comes from rng."""
    flower, colours = FLOWERS[name]
    colour = stray(rng, rng.choice(colours), 12)
    large = 2 * size  # halved at the end, which makes the edges smooth
    canvas = draw_background(rng, large)
    draw = ImageDraw.Draw(canvas)
    count = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 5))
    places: list[complex] = []
    for _ in range(count):  # of eight places take the one farthest from the blooms so far
        offers = [complex(rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.75)) for _ in range(8)]
        places.append(max(offers, key=lambda at: min((abs(at - p) for p in places), default=0)))
    for place in sorted(places, key=lambda at: at.imag):  # the lower, the nearer
        radius = large * rng.uniform(0.28, 0.42) / count**0.4
        squash, turn = rng.uniform(0.65, 1), rng.uniform(-0.6, 0.6)
        bloom = Bloom(draw, rng, large * place, radius, squash, turn)
        if flower is tulip or rng.random() < 0.7:
            bloom.petal(LEAF, DOWN, 8, 0.2, rng.choice(GREENS))  # the stem
        flower(bloom, colour)
    picture = canvas.reduce(2)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 2) * size / 256))
    warmth = rng.randint(-25, 25)
    light = (220 + warmth, 220, 220 - warmth)  # and unevenly spread: shade, or a darker rim
    lights = spread((stray(rng, light, 30) for _ in range(9)), 3, size)
    picture = ImageChops.multiply(picture, lights)
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.85, 1.35))


def draw_sample_flowers(
    root: str | Path, per_class: int = 80, seed: int = 0, size: int = 256
) -> Path:
    """Draw the data set, unless it is there already.

    Args:
        root: Folder of the data set.  If it exists it is left alone, whatever it was drawn with.
        per_class: Number of pictures of each of the five classes.
        seed: The same seed gives the same files, byte for byte, with the same version of Pillow.
        size: Width and height of a picture in pixels.

    Returns:
        The folder, which holds a folder of JPEG files for each class.
    """
    root = Path(root)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside root and renamed when complete, so that a half-drawn set never bears its name.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workplace:
        drawn = Path(workplace) / root.name
        for name in FLOWERS:
            (drawn / name).mkdir(parents=True)
            for index in range(per_class):
                picture = draw_picture(name, random.Random(f"{seed}-{name}-{index}"), size)
                picture.save(drawn / name / f"{name}_{index:03d}.jpg", quality=90)
        try:
            drawn.rename(root)
        except OSError:  # another process may have been quicker, and its set is as good
            if not root.is_dir():
                raise
    return root
