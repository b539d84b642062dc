"""Progress bars on a terminal, for what takes more than two seconds. In a pipe or a log file there are none."""

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


@contextmanager
def fractions(what: str) -> Iterator[Callable[[float, str], None]]:
    """Yield a function of (fraction, note) that moves a bar."""
    with tqdm(
        total=1.0, desc=what, delay=PATIENCE, leave=False, disable=None, bar_format="{l_bar}{bar}| {elapsed}{postfix}"
    ) as bar:

        def move(fraction: float, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(min(max(fraction, 0.0), 1.0) - bar.n)

        yield move


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show how long a piece of work has taken so far, whose end cannot be foreseen."""
    ended = threading.Event()
    with tqdm(desc=what, leave=False, disable=None, delay=PATIENCE, bar_format="{desc}: {elapsed}") as clock:

        def tick() -> None:
            if not ended.wait(PATIENCE):
                while not ended.wait(1.0):
                    clock.refresh()

        watch = threading.Thread(target=tick, name="tinycats-clock", daemon=True)
        if not clock.disable:
            watch.start()
        try:
            yield
        finally:
            ended.set()
            if not clock.disable:
                watch.join()
