"""Does it pay to start from a base? KID to photos that were not trained on, and copy rate, from scratch and from bases.

    python -m benchmarks.start_from --photos FOLDER              # from scratch, and from every base
    python -m benchmarks.start_from --photos FOLDER cats         # from scratch, and from one
    python -m benchmarks.start_from --photos FOLDER --base-steps 20000

Of the cats of the folder, few are trained on, as one class. Half of the rest make the base `cats`; the images of `other`, such as
dogs, make the base `other`; both together make `all`. Every training is measured against the other half, which no training sees.
Without --photos the cats are drawn. `total_steps` are those of a training and its base together; `reached` is the first
measured step at which KID is no higher than the best one from scratch, without copies.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks import course
from benchmarks.common import command_line, positive, report

if TYPE_CHECKING:
    from torch import Tensor

    from tinycats_core.config.training import BaseRelease

BASES = ("cats", "other", "all")
SCRATCH = "scratch"
HALVINGS = 5  # the steps that are measured: all of them, a half, a quarter, …


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start_from", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bases", nargs="*", metavar="BASE", help=f"of {', '.join(BASES)} (default: all of them)")
    course.add_options(parser, steps=4_800)
    parser.add_argument("--base-steps", type=positive, default=4_800, help="of the training of a base (default: 4800)")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.bases} - {*BASES}):
        parser.error(f"{', '.join(unknown)}: no such base; there are {', '.join(BASES)}")
    if given.quick:
        given = argparse.Namespace(**vars(given) | course.QUICK | {"base_steps": 20})
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch, patch.dict(os.environ, {"TINYCATS_HOME": scratch}):
        task = course.prepare_task(given, Path(scratch))
        names = [SCRATCH, *(base for base in BASES if base in given.bases or not given.bases)]
        found = compare(task, names)
    report("start_from", found, given)
    return 0


def compare(task: course.Task, names: list[str]) -> dict[str, Any]:
    """Return the figures of each start."""
    rows = {name: measure(task, name) for name in names}
    best = rows[SCRATCH]["best"]
    for row in rows.values():
        steps = [step["step"] for step in row["steps"] if best and step["kid"] <= best["kid"] and not step["copies"]]
        row["reached"] = min(steps, default=None)
    return {
        "best": {name: row["best"] for name, row in rows.items()},
        "reached": {name: row["reached"] for name, row in rows.items()},
        "rows": list(rows.values()),
    }


def measure(task: course.Task, start: str) -> dict[str, Any]:
    """Train from a start, once for each seed, and return its figures by step."""
    steps, before, runs, images = task.given.steps, 0 if start == SCRATCH else task.given.base_steps, [], 0
    measured = sorted({max(1, steps >> number) for number in range(HALVINGS)})
    for seed in range(task.given.seeds):
        order, few = course.shuffled(task, seed), task.given.few
        middle = (few + len(order)) // 2
        cats, train = course.Cats(seen=order[:few], unseen=order[middle:]), task.train(seed)
        if start != SCRATCH:
            seen = images_of(start, task, order[few:middle])
            images, base = len(seen), train_base(task, seen, seed)
            train = train.model_copy(update={"start_from": str(base)})
        runs.append(course.follow(task, train, cats, measured, f"start-from-{start}"))
    row = {"start": start, "base_steps": before, "base_images": images, **course.summary(runs)}
    for step in row["steps"]:
        step["total_steps"] = step["step"] + before
    return row


def images_of(base: str, task: course.Task, cats: "Tensor") -> "Tensor":
    """Return the images that a base is trained on. Raises DataError if there are none."""
    import torch

    from tinycats_core.errors import DataError

    images = {"cats": task.images[cats], "other": task.others, "all": torch.cat([task.images[cats], task.others])}[base]
    if not len(images):
        raise DataError(f"the base {base} has no images: the folder has no class `other`. Name another base.")
    return images


def train_base(task: course.Task, images: "Tensor", seed: int) -> "BaseRelease":
    """Train a base, and put its EMA weights where a training starts from them."""
    from tinycats_core.config.training import BaseRelease
    from tinycats_core.files import home
    from tinycats_core.generator.weights import save_generator
    from tinycats_core.training.base_weights import keep

    run = course.start_run(task, task.train(seed, steps=task.given.base_steps), images)
    course.train_to(run, task.given.base_steps)
    path = home("training") / "base.safetensors"
    weights = save_generator(path, next(iter(run.emas.values())), task.model, run.classes, run.step)
    base = BaseRelease("base", str(seed), weights.sha256)
    keep(path, base)
    return base


if __name__ == "__main__":
    sys.exit(main())
