"""Drawing toy cats: faces of the twelve breeds and of other animals.

Tables say what each animal looks like; a few functions turn one row and a random generator into a picture. A shape is
a complex array of corners, x + iy, in head coordinates: origin between the eyes, x to the right, y down, and 1 is the
half-width of a plain head. A right half is mirrored into the left one by -conj.
"""

import colorsys
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from tinycats_core.config import CLASSES
from tinycats_core.data.animals import BLACK, BREEDS, GLOWS, OTHERS, SPOTS, STROKES, WHITE, Animal, Colour, Shape
from tinycats_core.errors import DataError

MIN_SIZE = 8  # pixels, as in DataConfig.image_size
OVERSAMPLING = 4  # drawn this much larger, then averaged down


def generate(per_class: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `per_class` pictures of each class of config.CLASSES, class by class.

    Picture i of class c depends on (seed, c, i) alone, so a longer run holds the pictures of a shorter one.

    Returns:
        images uint8 (N, 3, size, size) RGB and labels int64 (N,), N = per_class * 13.

    Raises:
        DataError: per_class is below 1, or size is below MIN_SIZE.
    """
    if per_class < 1:
        raise DataError(f"per_class is {per_class}; it must be at least 1 picture. Set it higher.")
    _check_size(size)
    labels = np.repeat(np.arange(len(CLASSES), dtype=np.int64), per_class)
    images = np.empty((len(labels), 3, size, size), np.uint8)
    for index, label in enumerate(labels.tolist()):
        rng = np.random.default_rng((seed, label, index % per_class))
        images[index] = np.asarray(draw(label, rng, size)).transpose(2, 0, 1)
    return images, labels


def draw(label: int, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one picture of class CLASSES[label], RGB, size x size pixels.

    Raises:
        DataError: no such class, or size is below MIN_SIZE.
    """
    if not 0 <= label < len(CLASSES):
        raise DataError(f"label is {label}; allowed: 0 to {len(CLASSES) - 1}. Give the index of a class.")
    _check_size(size)
    name = CLASSES[label]
    animal = _individual(BREEDS[name] if name in BREEDS else OTHERS[rng.integers(len(OTHERS))], rng)
    image = _background(rng, size * OVERSAMPLING)
    pen = _Pen(image, rng)
    _draw_body(pen, animal)
    if animal.ear != "floppy":
        _draw_ears(pen, animal)
    _draw_head(pen, animal, grid=min(size, 96))
    if animal.ear == "floppy":  # hangs in front of the cheeks
        _draw_ears(pen, animal)
    _draw_muzzle(pen, animal)
    _draw_eyes(pen, animal, pupil=rng.uniform(0.3, 0.62))
    return _lit(image.reduce(OVERSAMPLING), rng)


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise DataError(f"size is {size} pixels; a toy cat needs at least {MIN_SIZE}. Set data.image_size higher.")


def _individual(animal: Animal, rng: np.random.Generator) -> Animal:
    """Return one of its kind: a little lighter or darker, wider or slimmer, with other ears and eyes."""
    tone, most = (WHITE, 0.08) if rng.integers(2) else (BLACK, 0.05)
    return replace(
        animal,
        coat=_mix(animal.coat, tone, most * rng.uniform()),
        width=animal.width * rng.uniform(0.97, 1.03),
        ear_length=animal.ear_length * rng.uniform(0.93, 1.07),
        ear_lean=animal.ear_lean + rng.uniform(-5, 5),
        eye=animal.eye * rng.uniform(0.94, 1.06),
    )


def _background(rng: np.random.Generator, canvas: int) -> Image.Image:
    """Return a soft pastel gradient from top to bottom."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.16, 0.36), rng.uniform(0.76, 0.92)
    top = colorsys.hsv_to_rgb(hue, saturation, value)
    bottom = colorsys.hsv_to_rgb((hue + rng.uniform(-0.08, 0.08)) % 1, saturation * 0.8, value * 0.88)
    rows = 255 * np.linspace(top, bottom, canvas)[:, None]
    return Image.fromarray(np.broadcast_to(rows.astype(np.uint8), (canvas, canvas, 3)))


def _lit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the finished picture lit from one side, a little brighter or darker, warmer or cooler."""
    angle, across = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, image.width)
    slope = 0.07 * (np.cos(angle) * across[None, :] + np.sin(angle) * across[:, None])
    warmth = rng.uniform(-0.025, 0.025) * np.array([1.0, 0.0, -1.0])
    gain = (rng.uniform(0.94, 1.04) + slope)[..., None] + warmth
    return Image.fromarray((np.asarray(image) * gain).clip(0, 255).astype(np.uint8))


class _Pen:
    """Fills shapes on a square canvas in one pose: tilt to ±11°, shift to ±5 %, zoom to ±7 %, and a slight turn."""

    def __init__(self, image: Image.Image, rng: np.random.Generator):
        self.image = image
        self.rotation = image.width * 0.325 * rng.uniform(0.93, 1.07) * np.exp(1j * np.radians(rng.uniform(-11, 11)))
        self.centre = image.width * complex(0.5 + rng.uniform(-0.05, 0.05), 0.575 + rng.uniform(-0.05, 0.05))
        self.turn = rng.uniform(-0.13, 0.13)

    def fill(self, shape: Shape, colour: Colour | int, depth: float, image: Image.Image | None = None) -> None:
        """Fill a closed shape. What stands out from the head (depth up to 1) moves with the turn."""
        pixels = (shape + self.turn * depth) * self.rotation + self.centre
        ImageDraw.Draw(image or self.image).polygon(pixels.view(float).tolist(), fill=colour)

    def both(self, shape: Shape, colour: Colour, depth: float, image: Image.Image | None = None) -> None:
        """Fill a shape and its mirror image."""
        self.fill(shape, colour, depth, image)
        self.fill(-shape.conj(), colour, depth, image)

    def locate(self, grid: int, depth: float) -> Shape:
        """Return the head coordinates (grid, grid), complex, of cells that cover the canvas."""
        cells = (np.arange(grid) + 0.5) * self.image.width / grid
        return (cells[None, :] + 1j * cells[:, None] - self.centre) / self.rotation - self.turn * depth


def _draw_body(pen: _Pen, animal: Animal) -> None:
    """Draw the shoulders, and the collar of long fur if there is one."""
    pen.fill(_oval(1.7j, 0.86, 1.1), _mix(animal.coat, BLACK, 0.16), depth=-0.3)
    if animal.ruff:
        pen.fill(_furred(0.45j, animal.ruff, 0.95), _mix(animal.coat, BLACK, 0.1), depth=-0.2)
        pen.fill(_furred(0.72j, animal.ruff * 0.66, 0.62), _mix(animal.coat, WHITE, 0.4), depth=-0.1)


def _draw_ears(pen: _Pen, animal: Animal) -> None:
    """Draw both ears: rim, outside, and the inside of those that stand."""
    outer = animal.ear_colour or animal.coat
    shape = _ear(animal)
    middle = shape.mean()
    pen.both((shape - middle) * 1.09 + middle, _mix(outer, BLACK, 0.3), depth=-0.25)
    pen.both(shape, outer, depth=-0.25)
    if animal.ear != "floppy":
        pen.both((shape - middle) * 0.66 + middle, animal.inner, depth=-0.25)
    if animal.tufts:
        tip = shape[np.argmin(shape.imag)]
        for end in (-0.04 - 0.16j, 0.1 - 0.16j):
            pen.both(_stroke(tip - 0.03 + 0.2j, tip, tip + end, 0.07), animal.mark, depth=-0.25)


def _draw_head(pen: _Pen, animal: Animal, grid: int) -> None:
    """Draw the head's outline and, inside it, the coat with its soft areas, marks and spots."""
    outline = _head(animal)
    pen.fill(outline * 1.045, _mix(animal.coat, BLACK, 0.34), depth=0)
    coat = _soft_coat(pen, animal, grid).resize(pen.image.size, Image.Resampling.BILINEAR)
    for mark in STROKES.get(animal.pattern, ()):
        pen.both(_stroke(*mark), animal.mark, 0.3, coat)
    for centre, radius in SPOTS.get(animal.pattern, ()):
        pen.both(_oval(centre, radius, radius * 0.85), animal.mark, 0.3, coat)
        if animal.pattern == "rosettes":
            pen.both(_oval(centre, radius * 0.48, radius * 0.4), _mix(animal.coat, animal.mark, 0.35), 0.3, coat)
    if animal.pattern == "blaze":  # a white V upside down, from the forehead to the cheeks
        pen.fill(np.array([-0.66j, 0.54 + 0.6j, 1.2j, -0.54 + 0.6j]), animal.light, 0.5, coat)
    mask = Image.new("L", pen.image.size)
    pen.fill(outline, 255, 0, mask)
    pen.image.paste(coat, mask=mask)


def _soft_coat(pen: _Pen, animal: Animal, grid: int) -> Image.Image:
    """Return the coat without sharp marks, grid x grid pixels: round shading and the pattern's soft areas."""
    at = pen.locate(grid, depth=0.3)
    x, y = abs(at.real), at.imag
    rim = ((x / animal.width) ** 2 + (y / animal.height) ** 2).clip(0, 1.2) ** 2
    field = (1.04 - 0.17 * rim)[..., None] * animal.coat
    for name, cx, cy, rx, ry, strength in GLOWS.get(animal.pattern, ()):
        weight = strength * np.exp(-((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) ** 2)).clip(0, 1 / strength)
        field += weight[..., None] * (getattr(animal, name) - field)
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def _draw_muzzle(pen: _Pen, animal: Animal) -> None:
    """Draw muzzle, mouth, whiskers and nose."""
    nose, puff = 1j * animal.nose_y, animal.muzzle
    pen.both(_oval(nose + puff * 0.42 + 0.24j, puff * 0.62, puff * 0.52), animal.light, depth=0.8)
    pen.fill(_oval(nose + 0.36j, puff * 0.5, puff * 0.46), animal.light, depth=0.8)
    mouth = _stroke(nose + 0.12j, nose + 0.04 + 0.36j, nose + puff * 0.62 + 0.26j, 0.035)
    pen.both(mouth, _mix(animal.light, BLACK, 0.62), depth=0.95)
    for rise in (-0.06j, 0.12j) if animal.whiskers else ():
        root = nose + puff * 0.7 + 0.2j + rise * 0.4
        pen.both(_stroke(root, nose + 0.8 + 0.08j + rise, nose + 1.12 + 0.14j + rise, 0.018), WHITE, depth=0.4)
    tip = np.array([-0.4 * puff - 0.03j, -0.07j, 0.4 * puff - 0.03j, 0.15j])
    pen.fill(nose + tip, animal.nose, depth=1)


def _draw_eyes(pen: _Pen, animal: Animal, pupil: float) -> None:
    """Draw both eyes; `pupil` is its width by the eye's. The glint is on the same side in both."""
    a, b = animal.eye, animal.eye * animal.eye_open
    x = (0.18 + 0.88 * a) * (0.6 + 0.4 * animal.width)
    almond = 2 * max(0.0, 1 - animal.eye_open)
    pen.both(_oval(x, a * 1.16, b * 1.18, -animal.eye_slant, almond), _mix(animal.mark, BLACK, 0.75), depth=0.5)
    pen.both(_oval(x, a, b, -animal.eye_slant, almond), animal.iris, depth=0.5)
    pen.both(_oval(x + 0.42j * b, a * 0.62, b * 0.4), _mix(animal.iris, WHITE, 0.3), depth=0.5)
    pen.both(_oval(x, a * pupil, b * 0.88), BLACK, depth=0.55)
    for side in (-x, x):
        pen.fill(_oval(side - 0.3 * a - 0.36j * b, a * 0.26, a * 0.26), WHITE, depth=0.55)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return colour a with `share` of colour b in it."""
    red, green, blue = (round(p * (1 - share) + q * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


CIRCLE: dict[int, Shape] = {corners: np.exp(2j * np.pi * np.arange(corners) / corners) for corners in (28, 60, 96)}


def _oval(centre: complex, rx: float, ry: float, angle: float = 0.0, almond: float = 0.0) -> Shape:
    """Return an ellipse (28,), turned by `angle` degrees; `almond` above 0 sharpens its left and right ends."""
    circle = CIRCLE[28]
    shape = rx * circle.real + 1j * ry * circle.imag * abs(circle.imag) ** almond
    return centre + shape * np.exp(1j * np.radians(angle))


def _furred(centre: complex, rx: float, ry: float) -> Shape:
    """Return an ellipse (60,) whose edge is locks of fur."""
    circle = CIRCLE[60] * np.tile([1.0, 1.06, 1.12, 1.04], 15)
    return centre + rx * circle.real + 1j * ry * circle.imag


def _stroke(start: complex, control: complex, end: complex, width: float) -> Shape:
    """Return a brush stroke (16,) along a quadratic curve, thin at both ends and twice `width` in the middle."""
    t = np.linspace(0, 1, 8)
    path = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    along = (1 - t) * (control - start) + t * (end - control)
    side = 1j * along / abs(along) * width * (0.35 + 0.65 * np.sin(np.pi * t))
    return np.concatenate([path + side, (path - side)[::-1]])


def _head(animal: Animal) -> Shape:
    """Return the head's outline (96,): an ellipse that narrows below by `wedge`, with locks of fur at the cheeks."""
    x, y = CIRCLE[96].real, CIRCLE[96].imag
    below = y.clip(0)
    cheeks = np.exp(-(((abs(x) - 0.85) / 0.3) ** 2) - ((y - 0.4) / 0.45) ** 2)
    fur = 1 + animal.fluff * cheeks * np.tile([0.0, 0.6, 1.2, 1.8, 1.0, 0.3], 16)
    narrow, long = 1 - animal.wedge * below**1.2, 1 + 0.12 * animal.wedge * below
    return fur * (animal.width * x * narrow + 1j * animal.height * y * long)


def _ear(animal: Animal) -> Shape:
    """Return the right ear's outline, a triangle with bowed sides or an ellipse."""
    length, base = animal.ear_length, animal.ear_width
    if animal.ear == "pointed":
        t = np.linspace(0, 1, 7)
        right = base * (1 - t + 0.16 * np.sin(np.pi * t)) - 1j * length * t
        shape = np.concatenate([right, -right[-2::-1].conj()])
    else:
        shape = _oval(-0.5j * length, base, length * 0.56)
    root = 0.56 * complex(animal.width, -animal.height)
    return root + shape * np.exp(1j * np.radians(animal.ear_lean))
