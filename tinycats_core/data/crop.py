"""Which square of a photo is cut out: the central one, or the one that keeps the subject."""

from collections.abc import Sequence
from typing import NamedTuple

EDGE = 1.0  # pixels that a box may reach beyond the photo: its edges may have been rounded


class Box(NamedTuple):
    """A rectangle around a subject, in pixels of the upright photo."""

    left: float
    top: float
    right: float
    bottom: float
    where: str = ""  # it is written down, for messages
    drawn_on: tuple[int, int] | None = None  # width and height of the picture that it was drawn on; None: unknown

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


def sort_out(boxes: Sequence[Box], width: int, height: int) -> tuple[list[Box], tuple[str, ...]]:
    """Return the boxes that fit an upright photo of width x height, and what is wrong with the others."""
    faults = [_fault_of(box, width, height) for box in boxes]
    return [box for box, fault in zip(boxes, faults, strict=True) if not fault], tuple(fault for fault in faults if fault)


def _fault_of(box: Box, width: int, height: int) -> str | None:
    if box.drawn_on and box.drawn_on != (width, height):
        return f"{box.where}: drawn on {box.drawn_on[0]}x{box.drawn_on[1]}, the photo is {width}x{height}"
    if min(box.left, box.top) < -EDGE or box.right > width + EDGE or box.bottom > height + EDGE:
        edges = ", ".join(f"{edge:g}" for edge in box[:4])
        return f"{box.where}: {edges} is outside of the photo of {width}x{height}"
    return None


def centering(boxes: Sequence[Box], width: int, height: int) -> tuple[float, float]:
    """Return where the largest square of a photo lies: (x, y), each from 0 (left, top) to 1; (0.5, 0.5) is the centre.

    The square keeps as much as possible of the first box. Of the places that do, it takes those that keep most of the next
    box, and so on; of what is left, the one nearest to the centre. So a square that keeps everything at the centre stays
    there, and one that is shorter than an animal lies within it, as near to the centre as that allows.
    """
    side = min(width, height)
    return (
        _place([(box.left, box.right) for box in boxes], width, side),
        _place([(box.top, box.bottom) for box in boxes], height, side),
    )


def _place(intervals: Sequence[tuple[float, float]], length: int, side: int) -> float:
    """Return the place along one axis, as a share of the room that the square has."""
    room = length - side
    if not room:
        return 0.5
    low, high = 0.0, float(room)
    for start, end in intervals:
        # What the square keeps of an interval rises to these places, is level between them, and falls after them.
        first, last = sorted((start, end - side))
        low, high = _nearest(first, low, high), _nearest(last, low, high)
    return _nearest(room / 2, low, high) / room


def _nearest(place: float, low: float, high: float) -> float:
    return min(max(place, low), high)


def square_of(boxes: Sequence[Box], width: int, height: int) -> Box:
    """Return the square that is cut out, in pixels of the upright photo."""
    side = min(width, height)
    x, y = centering(boxes, width, height)
    left, top = x * (width - side), y * (height - side)
    return Box(left, top, left + side, top + side)


def kept(box: Box, square: Box) -> float:
    """Return the share of a box's area that lies within a square."""
    inside = Box(max(box.left, square.left), max(box.top, square.top), min(box.right, square.right), min(box.bottom, square.bottom))
    return inside.area / box.area
