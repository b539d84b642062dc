"""PyTorch's threads on a CPU: how long they wait for each other by spinning, and whether the machine is busy.

After each operation the threads wait for the slowest of them. GNU OpenMP, which PyTorch brings on Linux, lets a waiting thread spin
for milliseconds before it sleeps. Beside another busy program the thread that is waited for often has no core, because the
spinning one occupies it. A bounded spin frees that core after microseconds. It changes when threads sleep, not what they compute.

The number of threads is left as it is: it changes the order of sums, and so the last bits of a loss.
`python -m benchmarks.busy` measures the choice.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

SPIN = 1000  # turns of the waiting loop: some tens of microseconds
SPIN_COUNT, WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # what GNU OpenMP reads while it is loaded, and only then
MARK = "TINYCATS_SPINCOUNT"  # tells a child process that its setting comes from here and not from a person
WINDOW = 0.1  # seconds over which the load is measured; the system counts in hundredths
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

    `threads` is their number; `spin` the setting in force by which they wait, None where that is PyTorch's default;
    `spin_set_by` is `tinycats`, `environment` or `PyTorch default`; `load` the cores that other programs take of those that
    this process may use, and `busy` whether these are missing to the threads; both are None where the system does not say.
    """
    import torch  # here: the package is imported before PyTorch, for `bound_spin` to have an effect

    threads, load = torch.get_num_threads(), others()
    spin, set_by = _setting()
    return {
        "threads": threads,
        "spin": spin,
        "spin_set_by": set_by,
        "load": load,
        "busy": None if load is None else threads + load > len(_cores()) + MARGIN,
    }


def warning(facts: dict[str, Any]) -> str | None:
    """Return what a busy machine means for a training on its CPU, in a sentence; None where it is not busy."""
    if not facts["busy"]:
        return None
    return (
        f"the machine is busy: other programs take {facts['load']:.1f} of {len(_cores())} cores, and this training runs on "
        f"{facts['threads']} threads, each of which waits for the slowest. It will be slower than on an idle machine, often by "
        f"half or more; the result is the same"
    )


def others(seconds: float = WINDOW) -> float | None:
    """Return how many of this process's cores other programs take, measured for this long; None where the system does not say."""
    started, before, own = time.monotonic(), used(), time.process_time()
    time.sleep(seconds)
    after, own, seconds = used(), time.process_time() - own, time.monotonic() - started
    return None if before is None or after is None else round(min(max(0.0, after - before - own) / seconds, len(_cores())), 2)


def used() -> float | None:
    """Return the seconds that all programs have used of this process's cores so far, None where the system does not say."""
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
