"""Measure how fast training is beside another busy program, and what that costs on an idle machine.

    python -m benchmarks.busy [--spin 200 --spin 1000]

Takes training steps of the smoke preset's network, each turn in a fresh process: as `tinycats_core.threads` sets it up and with
PyTorch's own setting, alone and beside a loop that keeps one core busy. Rates are medians of the rounds. `disturbance` is what
programs other than these took meanwhile, in cores: repeat the benchmark where it is not close to 0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.common import ROOT, command_line, positive, report
from tinycats_core import threads

BUSY_SHARE = 0.40  # of its own speed on an idle machine, at least
DISTURBED = 0.2  # cores that programs other than these may take, in the median turn, for the figures to count
QUIET_COST = 0.05  # of the speed with PyTorch's own setting, at most
CHILD = """
import json, sys, time
import torch
from tinycats_core import threads
from tinycats_core.config import CLASSES
from tinycats_core.presets import resolve
from tinycats_core.device import fast_arithmetic
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

warm_up, seconds = map(float, sys.argv[1:])
config, cpu = resolve("smoke"), torch.device("cpu")
shape = (512, 3, config.model.image_size, config.model.image_size)
images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
run = Run.from_images(images, torch.arange(len(images)) % len(CLASSES), CLASSES, config.model, config.train, cpu)

def rate(seconds):
    first, started = run.step, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        training_step(run)
    return (run.step - first) * config.train.batch_size / spent

with fast_arithmetic(cpu):
    rate(warm_up)
    images_per_s = rate(seconds)
print(json.dumps({"images_per_s": images_per_s, **threads.facts()}))
"""
DEFAULT_SPIN = 300_000  # of GNU OpenMP, by its manual
LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the benchmark, however that ends
    for _ in range(10**6):
        pass
"""


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where both bars are met on an idle machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=7, help="how often everybody takes a turn (default: 7)")
    parser.add_argument("--seconds", type=positive, default=4, help="that a turn is measured for (default: 4)")
    parser.add_argument(
        "--spin", type=positive, action="append", default=[], metavar="COUNT", help="measure this GOMP_SPINCOUNT, too; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, under a minute")
    given = parser.parse_args(arguments)
    rounds, warm_up, seconds = (1, 0.2, 1) if given.quick else (given.rounds, 1.0, given.seconds)
    settings = ["chosen", "default", *dict.fromkeys(f"{threads.SPIN_COUNT}={count}" for count in given.spin)]
    turns = [(setting, busy) for setting in settings for busy in (False, True)]
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for number in range(rounds):
        for setting, busy in turns[number % len(turns) :] + turns[: number % len(turns)]:  # nobody always has the first turn
            found[setting, busy].append(take_turn(setting, busy, warm_up, seconds))
            print(f"round {number + 1}: {setting}, {'busy' if busy else 'quiet'}: {found[setting, busy][-1]}", flush=True)
    figures: dict[str, Any] = summarise(found) | {"rounds": rounds, "seconds": seconds}
    report("busy", figures, given)
    disturbed = figures["disturbance"] is not None and figures["disturbance"]["median"] > DISTURBED
    if disturbed:
        print("error: the machine was not idle, so these figures say little; repeat this when it is", file=sys.stderr)
    good = figures["busy_share"] >= BUSY_SHARE and figures["quiet_cost"] <= QUIET_COST and not disturbed
    return 0 if given.quick or good else 1


def take_turn(setting: str, busy: bool, warm_up: float, seconds: float) -> dict[str, Any]:
    """Return images/s in a fresh process, the facts of its threads, and how many cores other programs took."""
    waiting = {
        "chosen": {threads.SPIN_COUNT: str(threads.SPIN), threads.MARK: str(threads.SPIN)},  # as a child process inherits it
        "default": {threads.SPIN_COUNT: str(DEFAULT_SPIN)},
    }
    ours = waiting.get(setting) or dict([setting.split("=")])
    settings = (threads.SPIN_COUNT, threads.WAIT_POLICY, threads.MARK)
    environment = {name: value for name, value in os.environ.items() if name not in settings} | ours
    command = [sys.executable, "-c", CHILD, str(warm_up), str(seconds)]
    started, before, mine = time.monotonic(), threads.used(), sum(os.times()[:4])
    with busy_core() if busy else nullcontext():
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    after, mine, wall = threads.used(), sum(os.times()[:4]) - mine, time.monotonic() - started
    others = None if before is None or after is None else round(max(0.0, after - before - mine) / wall, 2)
    return json.loads(done.stdout.splitlines()[-1]) | {"others": others}


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep a core busy for as long as this lasts."""
    loop = subprocess.Popen([sys.executable, "-c", LOOP])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def summarise(found: dict[tuple[str, bool], list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians, shares and the worst round of each setting, and by what they were disturbed."""
    rates = {turn: [made["images_per_s"] for made in rows] for turn, rows in found.items()}
    medians = {turn: statistics.median(values) for turn, values in rates.items()}
    quiet, busy = medians["chosen", False], medians["chosen", True]
    shares = [busy / quiet for quiet, busy in zip(rates["chosen", False], rates["chosen", True], strict=True)]
    costs = [1 - chosen / default for chosen, default in zip(rates["chosen", False], rates["default", False], strict=True)]
    others = [made["others"] for rows in found.values() for made in rows if made["others"] is not None]
    chosen = found["chosen", False][0]
    return {
        "quiet_images_per_s": quiet,
        "busy_images_per_s": busy,
        "busy_share": busy / quiet,
        "quiet_cost": 1 - quiet / medians["default", False],
        "worst_busy_share": min(shares),
        "worst_quiet_cost": max(costs),
        "default_quiet_images_per_s": medians["default", False],
        "default_busy_images_per_s": medians["default", True],
        "default_busy_share": medians["default", True] / medians["default", False],
        "threads": chosen["threads"],
        "spin": chosen["spin"],
        "spin_adapts": chosen["spin_adapts"],
        "images_per_s": {f"{setting}, {'busy' if busy else 'quiet'}": values for (setting, busy), values in rates.items()},
        "disturbance": {"median": statistics.median(others), "most": max(others)} if others else None,
    }


if __name__ == "__main__":
    sys.exit(main())
