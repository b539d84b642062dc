"""Augmentation where there are few photos: KID to photos that were not trained on, and copy rate, as a training goes on.

    python -m benchmarks.augmentation --photos FOLDER              # every augmentation
    python -m benchmarks.augmentation --photos FOLDER basic full   # some

Each training sees the same few cats, as one class; all other cats of the folder are held out. Without --photos the cats are
drawn. The figure to compare is `kid` of `best`: the lowest KID among the snapshots whose copy rate is within the bar.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import course
from benchmarks.common import command_line, positive, report

KINDS = ("none", "basic", "medium", "full")


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.augmentation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    course.add_options(parser, steps=7_200)
    parser.add_argument("--snapshots", type=positive, default=8, help="evenly spaced steps that are measured (default: 8)")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.kinds} - {*KINDS}):
        parser.error(f"{', '.join(unknown)}: no such augmentation; there are {', '.join(KINDS)}")
    if given.quick:
        given = argparse.Namespace(**vars(given) | course.QUICK | {"snapshots": 2})
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        task = course.prepare_task(given, Path(scratch))
        rows = [measure(task, kind) for kind in KINDS if kind in given.kinds or not given.kinds]
    report("augmentation", {"best": {row["augmentation"]: row["best"] for row in rows}, "rows": rows}, given)
    return 0


def measure(task: course.Task, kind: str) -> dict[str, Any]:
    """Train with an augmentation, once for each seed, and return its figures by step."""
    runs = []
    for seed in range(task.given.seeds):
        order, few = course.shuffled(task, seed), task.given.few
        train = task.train(seed, augmentation=kind, snapshots=task.given.snapshots)
        cats = course.Cats(seen=order[:few], unseen=order[few:])
        runs.append(course.follow(task, train, cats, train.snapshot_steps(), f"augmentation-{kind}"))
    return {"augmentation": kind, **course.summary(runs)}


if __name__ == "__main__":
    sys.exit(main())
