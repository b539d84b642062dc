"""The animals that toycats draws: a row of colours and shapes for each class."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Shape = NDArray[np.complex128]
BLACK, WHITE, PINK = (24, 20, 22), (255, 255, 255), (232, 150, 150)
BLUE, GREEN, COPPER, GOLD = (66, 136, 232), (134, 200, 84), (242, 146, 34), (222, 186, 70)


@dataclass(frozen=True)
class Animal:
    """What an animal's face looks like. Lengths in head coordinates, angles in degrees."""

    coat: Colour
    light: Colour  # muzzle and pale fur
    mark: Colour  # pattern
    iris: Colour
    nose: Colour = PINK
    width: float = 1.0  # half-width and half-height of the head
    height: float = 0.86
    wedge: float = 0.15  # how much the head narrows towards the chin
    fluff: float = 0.0  # length of the fur that stands out from the cheeks
    ruff: float = 0.0  # size of the collar of long fur
    ear: str = "pointed"  # pointed | round | floppy
    ear_length: float = 0.7
    ear_width: float = 0.42  # half-width at the base
    ear_lean: float = 18.0  # outwards from upright
    ear_colour: Colour | None = None  # None: as the coat
    inner: Colour = (226, 164, 152)  # of the ear
    tufts: bool = False  # of long hair on the ear tips
    eye: float = 0.27  # half-width
    eye_open: float = 0.9  # height of the eye by its width
    eye_slant: float = 8.0  # outer corner up
    nose_y: float = 0.3
    muzzle: float = 0.36  # half-width
    whiskers: bool = True
    pattern: str = "solid"  # a key of GLOWS, STROKES or SPOTS


BREEDS: dict[str, Animal] = {
    "Abyssinian": Animal(
        (212, 124, 60), (248, 214, 166), (138, 68, 30), GOLD, (196, 100, 84), wedge=0.3, ear_length=0.92,
        ear_width=0.46, ear_lean=24, eye=0.25, pattern="ticked",
    ),
    "Bengal": Animal(
        (232, 172, 84), (255, 236, 200), (78, 42, 20), GREEN, (190, 100, 84), wedge=0.22, ear_length=0.6,
        ear_width=0.36, pattern="rosettes",
    ),
    "Birman": Animal(
        (246, 232, 206), (96, 68, 54), (82, 56, 44), BLUE, (60, 42, 40), fluff=0.1, ruff=0.95, ear_length=0.62,
        ear_colour=(82, 56, 44), inner=(150, 112, 98), pattern="mask",
    ),
    "Bombay": Animal(
        (44, 42, 50), (72, 70, 82), (26, 24, 30), COPPER, (22, 20, 24), width=1.02, height=0.92,
        ear_length=0.64, inner=(92, 74, 80), eye=0.3, eye_open=1.0, pattern="gloss",
    ),
    "British_Shorthair": Animal(
        (112, 124, 146), (136, 148, 168), (92, 102, 124), COPPER, (84, 84, 98), width=1.14, height=1.0, wedge=0.04,
        ear_length=0.5, ear_width=0.34, ear_lean=28, inner=(164, 148, 158), eye=0.29, eye_open=1.0, muzzle=0.44,
    ),
    "Egyptian_Mau": Animal(
        (204, 206, 210), (240, 240, 242), (44, 44, 50), GREEN, (196, 112, 104), wedge=0.28, ear_length=0.8,
        ear_lean=16, eye=0.28, pattern="spots",
    ),
    "Maine_Coon": Animal(
        (160, 114, 70), (240, 218, 182), (68, 42, 26), GOLD, (188, 104, 92), width=0.98, wedge=0.1, fluff=0.15,
        ruff=1.15, ear_length=0.9, ear_width=0.38, ear_lean=10, tufts=True, eye=0.25, muzzle=0.42, pattern="tabby",
    ),
    "Persian": Animal(
        (250, 240, 222), (255, 252, 244), (226, 206, 180), COPPER, (222, 134, 130), width=1.14, height=0.94,
        wedge=-0.05, fluff=0.17, ruff=1.2, ear_length=0.48, ear_width=0.29, ear_lean=36, eye=0.3, eye_open=1.02,
        eye_slant=0, nose_y=0.14, muzzle=0.42, pattern="flat",
    ),
    "Ragdoll": Animal(
        (242, 234, 222), (255, 252, 248), (158, 118, 94), BLUE, (232, 152, 150), width=1.05, fluff=0.08, ruff=1.0,
        ear_length=0.58, ear_colour=(158, 118, 94), inner=(214, 170, 156), eye=0.28, pattern="blaze",
    ),
    "Russian_Blue": Animal(
        (146, 164, 194), (176, 192, 216), (120, 138, 170), GREEN, (112, 116, 140), width=0.94, wedge=0.42,
        ear_length=0.86, ear_width=0.42, ear_lean=20, inner=(206, 180, 192), eye=0.28, eye_slant=12, muzzle=0.3,
    ),
    "Siamese": Animal(
        (248, 236, 212), (58, 42, 38), (52, 36, 34), BLUE, (40, 28, 28), width=0.92, height=0.92, wedge=0.52,
        ear_length=0.98, ear_width=0.52, ear_lean=32, ear_colour=(52, 36, 34), inner=(112, 80, 76), eye=0.26,
        eye_open=0.74, eye_slant=18, nose_y=0.38, muzzle=0.27, pattern="mask",
    ),
    "Sphynx": Animal(
        (242, 190, 174), (250, 212, 198), (204, 130, 120), (126, 190, 182), (220, 128, 128), width=0.92, wedge=0.36,
        ear_length=1.02, ear_width=0.5, ear_lean=26, inner=(226, 140, 134), eye=0.3, eye_open=0.88, eye_slant=14,
        muzzle=0.32, whiskers=False, pattern="wrinkles",
    ),
}  # fmt: skip
DOG = Animal(
    (206, 152, 96), (255, 246, 230), (255, 244, 226), (96, 60, 36), BLACK, ear="floppy", ear_length=0.9, ear_width=0.28,
    ear_lean=155, ear_colour=(122, 76, 44), eye=0.17, eye_open=1.1, nose_y=0.24, muzzle=0.48, whiskers=False,
    pattern="stripe",
)  # fmt: skip
BEAR = Animal(
    (142, 94, 60), (226, 190, 146), (142, 94, 60), (60, 36, 24), BLACK, width=1.09, wedge=0.0, ear="round",
    ear_length=0.55, ear_width=0.34, ear_lean=28, inner=(206, 160, 122), eye=0.14, eye_open=1.15, nose_y=0.22,
    muzzle=0.44, whiskers=False,
)  # fmt: skip
RABBIT = Animal(
    (218, 204, 192), (252, 246, 240), (170, 150, 138), (90, 50, 46), (240, 140, 150), width=0.96, wedge=0.0,
    ear="round", ear_length=1.05, ear_width=0.24, ear_lean=5, inner=(246, 180, 184), eye=0.17, eye_open=1.2,
)  # fmt: skip
FOX = Animal(
    (232, 112, 40), (255, 250, 242), (60, 36, 32), (120, 72, 30), BLACK, width=1.08, wedge=0.55, fluff=0.1,
    ear_length=0.8, ear_colour=(150, 66, 28), inner=(60, 40, 38), eye=0.17, eye_open=1.0, nose_y=0.5, muzzle=0.24,
    whiskers=False, pattern="fox",
)  # fmt: skip
INK = (48, 45, 50)
DALMATIAN = replace(DOG, coat=(246, 244, 240), light=WHITE, mark=INK, ear_colour=INK, pattern="dots")
PANDA = replace(BEAR, coat=(248, 248, 246), light=WHITE, mark=INK, ear_colour=INK, inner=(70, 66, 72), pattern="panda")
OTHERS = (DOG, DALMATIAN, BEAR, PANDA, RABBIT, FOX)

# Soft areas of the coat: colour, centre, radii and strength.
GLOWS: dict[str, tuple[tuple[str, float, float, float, float, float], ...]] = {
    "ticked": (("mark", 0, -0.7, 0.5, 0.42, 0.55), ("light", 0.42, 0.0, 0.38, 0.4, 0.7)),
    "rosettes": (("light", 0.48, 0.2, 0.36, 0.26, 0.6),),
    "spots": (("light", 0.48, 0.15, 0.36, 0.3, 0.6),),
    "tabby": (("mark", 0, -0.75, 0.6, 0.36, 0.35), ("light", 0.44, 0.12, 0.34, 0.26, 0.5)),
    "mask": (("mark", 0, 0.2, 0.66, 0.62, 1.0),),
    "blaze": (("mark", 0.62, -0.12, 0.5, 0.6, 1.0),),
    "gloss": (("light", 0, -0.6, 0.5, 0.16, 0.9), ("light", 0.72, 0.3, 0.2, 0.3, 0.6)),
    "flat": (("mark", 0, 0.1, 0.3, 0.34, 0.5), ("mark", 0.78, 0.5, 0.3, 0.3, 0.4)),
    "wrinkles": (("mark", 0.7, 0.35, 0.24, 0.24, 0.4),),
    "panda": (("mark", 0.42, 0.02, 0.28, 0.34, 1.2),),
    "fox": (("light", 0.5, 0.45, 0.46, 0.34, 1.3),),
    "stripe": (("mark", 0, -0.2, 0.2, 1.0, 1.3),),
}

# Sharp marks: start, control point, end, and the width in the middle.
FOREHEAD_M = (
    (0.1 - 0.86j, 0.13 - 0.6j, 0.04 - 0.34j, 0.075),
    (0.36 - 0.8j, 0.36 - 0.58j, 0.22 - 0.4j, 0.075),
    (0.0 - 0.34j, 0.08 - 0.5j, 0.24 - 0.4j, 0.05),
)
EYE_LINES = ((0.66 - 0.02j, 0.84 - 0.02j, 0.98 + 0.12j, 0.05), (0.62 + 0.22j, 0.78 + 0.32j, 0.92 + 0.42j, 0.05))
TICKS = (0.5 - 0.52j, 0.68 - 0.38j, 0.82 - 0.16j, 0.56 - 0.34j, 0.86 + 0.1j, 0.7 + 0.3j, 0.5 + 0.46j, 0.36 + 0.62j)
STROKES: dict[str, tuple[tuple[complex, complex, complex, float], ...]] = {
    "ticked": (
        (0.1 - 0.8j, 0.11 - 0.62j, 0.07 - 0.46j, 0.035),
        (0.3 - 0.76j, 0.29 - 0.6j, 0.22 - 0.48j, 0.035),
        *((tick, tick + 0.02 - 0.05j, tick + 0.03 - 0.11j, 0.022) for tick in TICKS),
    ),
    "rosettes": (FOREHEAD_M[0], EYE_LINES[1]),
    "spots": (*FOREHEAD_M, *EYE_LINES),
    "tabby": (
        *FOREHEAD_M,
        *EYE_LINES,
        (0.58 - 0.68j, 0.6 - 0.5j, 0.5 - 0.38j, 0.07),
        (0.78 - 0.4j, 0.8 - 0.3j, 0.68 - 0.22j, 0.06),
    ),
    "wrinkles": (
        (0.0 - 0.62j, 0.24 - 0.66j, 0.44 - 0.56j, 0.045),
        (0.0 - 0.46j, 0.22 - 0.5j, 0.42 - 0.4j, 0.045),
        (0.09 - 0.36j, 0.05 - 0.2j, 0.1 - 0.06j, 0.04),
        (0.5 + 0.34j, 0.6 + 0.4j, 0.56 + 0.56j, 0.04),
    ),
}

# Spots: centre and radius; those of rosettes have a golden heart.
SPOTS: dict[str, tuple[tuple[complex, float], ...]] = {
    "rosettes": ((0.32 - 0.58j, 0.13), (0.64 - 0.42j, 0.13), (0.84 - 0.06j, 0.12), (0.74 + 0.26j, 0.1)),
    "spots": ((0.6 - 0.5j, 0.075), (0.8 - 0.26j, 0.07), (0.52 - 0.68j, 0.06), (0.56 + 0.42j, 0.06), (-0.62j, 0.06)),
    "dots": ((0.3 - 0.6j, 0.1), (0.66 - 0.42j, 0.07), (-0.36j, 0.06), (0.72 + 0.3j, 0.08), (0.5 + 0.52j, 0.05)),
}
