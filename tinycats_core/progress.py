"""Progress bars on a terminal, for what takes more than two seconds. In a pipe or a log file there are none."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

PATIENCE = 2.0  # seconds before a bar appears

T = TypeVar("T")


def steps(parts: Sequence[T], what: str) -> Iterator[T]:
    """Yield the parts of a piece of work, with a bar that says what it is."""
    return iter(tqdm(parts, what, delay=PATIENCE, leave=False, disable=None))


def fractions(what: str) -> Callable[[float, str], None]:
    """Return a function of (fraction, note) that moves a bar; the bar goes with the fraction 1."""
    layout = "{l_bar}{bar}| {elapsed}{postfix}"
    bar = tqdm(total=1.0, desc=what, delay=PATIENCE, leave=False, disable=None, bar_format=layout)

    def move(fraction: float, note: str = "") -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(min(max(fraction, 0.0), 1.0) - bar.n)
        if fraction >= 1:
            bar.close()

    return move


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show how long a piece of work has taken so far, if nothing tells how much of it is left."""
    ended = threading.Event()

    def tick() -> None:
        if ended.wait(PATIENCE):
            return
        with tqdm(desc=what, leave=False, bar_format="{desc}: {elapsed}") as clock:
            clock.start_t -= PATIENCE
            while not ended.wait(1.0):
                clock.refresh()

    watch = threading.Thread(target=tick, name="tinycats-clock", daemon=True)
    if sys.stderr.isatty():
        watch.start()
    try:
        yield
    finally:
        ended.set()
        if watch.is_alive():
            watch.join()
