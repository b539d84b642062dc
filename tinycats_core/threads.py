"""PyTorch's threads on a CPU: how long they spin while they wait for each other, and whether the machine is busy.

After each operation the threads wait for the slowest of them. GNU OpenMP, which PyTorch brings on Linux, lets a waiting thread
spin for milliseconds before it sleeps, which is fastest on an idle machine. Beside another busy program the thread that is
waited for often has no core, because a spinning one occupies it, and training becomes many times slower. So the spin is

- bounded in every process (`bound_spin`), so far as that costs no speed on an idle machine, and
- as good as off while other programs need the cores during a training (`sharing`).

Both change when a thread sleeps and not what it computes. The number of threads is left as it is: it changes the order of sums,
and so the last bits of a loss. A person's own setting of the spin wins. `python -m benchmarks.busy` measures all of this.
"""

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("tinycats.training")

SPIN = 10_000  # turns of the waiting loop, some hundred microseconds; OpenMP's own are 300,000
SPIN_COUNT, WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # what GNU OpenMP reads while it is loaded, and only then
MARK = "TINYCATS_SPINCOUNT"  # tells a child process that its setting comes from here and not from a person
WINDOW = 0.1  # seconds over which the load is measured; the system counts in hundredths
LOOK_EVERY = 1.0  # seconds, while a training runs
CALM = 3  # readings in a row without other work, after which the threads may spin again
MARGIN = 0.5  # cores of other work that threads and other programs may lack before the machine is called busy

_too_late = False  # whether OpenMP was loaded in this process before the spin was bounded


def bound_spin() -> None:
    """Bound the spin of PyTorch's threads in this process and its children, unless a person has set how they wait.

    Has no effect on this process once PyTorch is loaded, and none where OpenMP is not GNU's.
    """
    global _too_late
    if sys.platform == "linux" and SPIN_COUNT not in os.environ and WAIT_POLICY not in os.environ:
        _too_late = "torch" in sys.modules or _is_loaded("/libgomp.so.1")  # PyTorch takes one that is there under this name
        os.environ[SPIN_COUNT] = os.environ[MARK] = str(SPIN)


def facts() -> dict[str, Any]:
    """Return how PyTorch's threads work here and now. Takes a tenth of a second.

    `threads` is their number; `spin` the setting in force by which they wait, None if that is PyTorch's default;
    `spin_set_by` is `tinycats`, `environment` or `PyTorch default`; `load` the cores that other programs take of those that
    this process may use, and `busy` whether these are missing to the threads; both are None if the system does not say.
    `spin_adapts` tells whether `sharing` has an effect.
    """
    import torch  # here: the package is imported before PyTorch, for `bound_spin` to have an effect

    threads, load = torch.get_num_threads(), others()
    spin, set_by = _setting()
    return {
        "threads": threads,
        "spin": spin,
        "spin_set_by": set_by,
        "spin_adapts": _openmp() is not None,
        "load": load,
        "busy": None if load is None else _lack_cores(threads, load),
    }


def warning(facts: dict[str, Any]) -> str | None:
    """Return what a busy machine means for a training on its CPU, in a sentence; None if it is not busy."""
    if not facts["busy"]:
        return None
    return (
        f"the machine is busy: other programs take {facts['load']:.1f} of {len(_cores())} cores, and this training runs on "
        f"{facts['threads']} threads, each of which waits for the slowest. It will be slower than on an idle machine, often by "
        f"half or more; the result is the same"
    )


@contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Let PyTorch compute on this many threads for as long as this lasts; on as many as before for None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def sharing() -> Iterator[None]:
    """Let PyTorch's threads hardly spin while other programs need the cores, for as long as this lasts.

    GNU OpenMP turns to a short spin (of 100, says its manual) while it manages more threads than there are cores. So when the
    machine is busy a thread of ours lets it start as many as there are cores, which sleep. They take no part in any
    computation: PyTorch's own team of threads stays the same.

    Has no effect where OpenMP is not GNU's, where a person has set how threads wait, or where the system does not tell its load.
    """
    import torch

    openmp, threads = _openmp(), torch.get_num_threads()
    if openmp is None or used() is None or threads == 1:  # a single one waits for nobody
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(openmp, threads, ended), name="tinycats-load", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(openmp: ctypes.CDLL, threads: int, ended: threading.Event) -> None:
    """Look at the load until the end, and keep sleeping threads while the machine is busy."""
    release: threading.Event | None = None
    level = logging.INFO  # the first time; the load may come and go every few seconds
    calm, before, pause = 0, reading(), WINDOW  # the first look is a short one
    while not ended.wait(pause):
        pause, after = LOOK_EVERY, reading()
        load = between(before, after)
        before = after
        calm = 0 if load is None or _lack_cores(threads, load) else calm + 1
        if release is None and calm == 0 and load is not None:
            release = threading.Event()
            threading.Thread(target=_keep_sleepers, args=(openmp, release), name="tinycats-sleepers", daemon=True).start()
            logger.log(
                level, "other programs take %.1f of %d cores: threads that wait for others sleep meanwhile", load, len(_cores())
            )
        elif release is not None and calm >= CALM:
            release.set()
            release = None
            logger.log(level, "the cores are free again: threads that wait for others stay awake, which is faster")
            level = logging.DEBUG
    if release is not None:
        release.set()


def _keep_sleepers(openmp: ctypes.CDLL, release: threading.Event) -> None:
    """Have OpenMP manage a sleeping thread for each core, until released: they belong to this thread and end with it."""
    nothing = ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p)  # a function of C that does nothing: no thread needs Python
    openmp.GOMP_parallel(nothing, None, ctypes.c_uint(len(_cores()) + 1), ctypes.c_uint(0))
    release.wait()


def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP that PyTorch uses; None if it is another, or if a person has set how threads wait."""
    if _setting()[1] == "environment":
        return None
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        paths = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
        [path] = [path for path in paths if len(paths) == 1 or "/torch" in path]
        library = ctypes.CDLL(path)  # the one that is loaded, not another one
        return library if hasattr(library, "GOMP_parallel") else None
    except (OSError, ValueError):
        return None


def others(seconds: float = WINDOW) -> float | None:
    """Return how many of this process's cores other programs take, measured for this long; None if the system does not say."""
    before = reading()
    time.sleep(seconds)
    return between(before, reading())


def reading() -> tuple[float, float | None, float]:
    """Return the time, what all programs have used of this process's cores, and what this process has used, in seconds."""
    return time.monotonic(), used(), time.process_time()


def between(before: tuple[float, float | None, float], after: tuple[float, float | None, float]) -> float | None:
    """Return how many cores other programs took between two readings."""
    if before[1] is None or after[1] is None:
        return None
    load = (after[1] - before[1] - (after[2] - before[2])) / (after[0] - before[0])
    return round(min(max(0.0, load), len(_cores())), 2)


def _lack_cores(threads: int, load: float) -> bool:
    """Return whether threads and other programs need more cores than there are."""
    return threads + load > len(_cores()) + MARGIN


def used() -> float | None:
    """Return the seconds that all programs have used of this process's cores so far, None if the system does not say."""
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()]
        ticks = {row[0]: list(map(int, row[1:9])) for row in rows if row[0].startswith("cpu")}
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(sum(row) - row[3] - row[4] for row in (ticks[f"cpu{core}"] for core in _cores())) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, KeyError, IndexError, ValueError):
        return None  # not Linux, or a sandbox that hides it


def _cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _setting() -> tuple[str | None, str]:
    """Return the settings in force by which threads wait, and who made them."""
    found = {name: os.environ[name] for name in (WAIT_POLICY, SPIN_COUNT) if name in os.environ}
    if not found or _too_late or not _is_loaded("libgomp"):
        return None, "PyTorch default"
    ours = found == {SPIN_COUNT: os.environ.get(MARK)}
    return ", ".join(f"{name}={value}" for name, value in found.items()), "tinycats" if ours else "environment"


def _is_loaded(library: str) -> bool:
    """Return whether a library with this in its path is loaded in this process."""
    try:
        return library in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
