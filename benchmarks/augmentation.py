"""Augmentation where there are few photos: KID to photos that were not trained on, and copy rate, as a training goes on.

    python -m benchmarks.augmentation --photos FOLDER              # every augmentation
    python -m benchmarks.augmentation --photos FOLDER basic full   # some

Each training sees the same few cats, as one class; all other cats of the folder are held out. Without --photos the cats are
drawn. The figure to compare is `kid` of `best`: the lowest KID among the snapshots whose copy rate is within the bar.
"""

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, TINY, command_line, positive, report

if TYPE_CHECKING:
    from torch import Tensor

    from tinycats_core.config import ReleaseConfig
    from tinycats_core.evaluation.reference import Judge
    from tinycats_core.training.state import Run

KINDS = ("none", "basic", "medium", "full")
PICTURES = RESULTS / "pictures"  # not in git
QUICK = {"few": 40, "steps": 20, "snapshots": 2, "seeds": 1, "count": 32, "size": 16, "photos": None}


@dataclass(frozen=True)
class Task:
    """What all trainings share: settings, judge, and all cats, uint8 (N, 3, S, S), with their features (N, D)."""

    given: argparse.Namespace
    config: "ReleaseConfig"
    judge: "Judge"
    images: "Tensor"
    features: "Tensor"


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.augmentation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--photos", type=Path, help="a folder of photos: cat/<Breed>/* and other/*, or one folder a class")
    parser.add_argument("--few", type=positive, default=40, help="photos to train on (default: 40)")
    parser.add_argument("--steps", type=positive, default=7_200, help="of each training (default: 7200)")
    parser.add_argument("--snapshots", type=positive, default=8, help="evenly spaced steps that are measured (default: 8)")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each, with other photos (default: 2)")
    parser.add_argument("--count", type=positive, default=512, help="images that are drawn for each figure (default: 512)")
    parser.add_argument("--size", type=positive, default=32, help="of the images; a patch is an eighth of it (default: 32)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: auto)")
    parser.add_argument("--quick", action="store_true", help="a few steps on drawn cats, under a minute")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.kinds} - {*KINDS}):
        parser.error(f"{', '.join(unknown)}: no such augmentation; there are {', '.join(KINDS)}")
    if given.quick:
        given = argparse.Namespace(**vars(given) | QUICK)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        task = prepare_task(given, Path(scratch))
        rows = [measure_kind(task, kind) for kind in KINDS if kind in given.kinds or not given.kinds]
    report("augmentation", {"best": {row["augmentation"]: row["best"] for row in rows}, "rows": rows}, given)
    return 0


def prepare_task(given: argparse.Namespace, scratch: Path) -> Task:
    """Prepare the data and the judge, and extract the features of every cat. Raises TinycatsError if there are too few cats."""
    import torch

    from tinycats_core.data import groups
    from tinycats_core.data.preparation import prepare
    from tinycats_core.data.splits import load_split
    from tinycats_core.errors import DataError
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.reference import Judge
    from tinycats_core.presets import resolve

    shape = (TINY["model"] if given.quick else {}) | {"image_size": given.size, "patch_size": max(1, given.size // 8)}
    photos = {"folder": given.photos, "corrupt_files": "skip"} if given.photos else TINY["data"]
    judged = {} if given.photos else {"extractor": "breed", "samples": 64}
    overrides = {"data": photos | {"image_size": given.size}, "model": shape, "evaluate": judged}
    config = resolve("photos" if given.photos else "smoke", overrides)
    dataset = prepare(config.data, scratch / "data")
    eyes = config.classifier.model_copy(update={"epochs": 1, "batch_size": 32})
    classifier = None if given.photos else train_classifier(dataset, eyes, scratch / "classifier", "cpu")
    judge = Judge.load(dataset, config.evaluate, classifier, scratch / "evaluations", given.device)
    splits = [load_split(dataset, name) for name in ("train", "val", "test")]
    images = torch.cat([pictures[groups.members(labels, dataset.classes, groups.CATS)] for pictures, labels in splits])
    if len(images) < 2 * given.few or given.few < 3:
        raise DataError(f"--few is {given.few}; allowed: 3 to {len(images) // 2}, half of the {len(images)} cats")
    return Task(given, config, judge, images, layer(judge, images))


def layer(judge: "Judge", images: "Tensor") -> "Tensor":
    """Return the features of images that KID is measured in, (N, D)."""
    return judge.extract_features(images)[judge.extractor.feature_layer]


def measure_kind(task: Task, kind: str) -> dict[str, Any]:
    """Train with an augmentation, once for each seed, and return its figures by step."""
    runs = [follow(task, kind, seed) for seed in range(task.given.seeds)]
    bar = statistics.fmean(run["copy_bar"] for run in runs)
    steps = [mean_of(list(found), bar) for found in zip(*(run["steps"] for run in runs), strict=True)]
    row = {"augmentation": kind, "steps": steps, "runs": runs}
    row["best"] = min((step for step in steps if not step["copies"]), key=lambda step: step["kid"], default=None)
    print({"augmentation": kind, "best": row["best"]}, file=sys.stderr, flush=True)
    return row


def mean_of(found: list[dict[str, Any]], bar: float) -> dict[str, Any]:
    """Return the means over the seeds at one step, and of KID the 95 % interval of both its sources of error."""
    kids = [one["kid"] for one in found]
    error = statistics.fmean(one["kid_std"] ** 2 for one in found) + (statistics.variance(kids) if len(kids) > 1 else 0.0)
    rate = statistics.fmean(one["copy_rate"] for one in found)
    interval = 1.96 * math.sqrt(error / len(found))
    return {
        "step": found[0]["step"],
        "kid": statistics.fmean(kids),
        "kid_interval": interval,
        "copy_rate": rate,
        "copies": rate > bar,
    }


def follow(task: Task, kind: str, seed: int) -> dict[str, Any]:
    """Train once on the cats that the seed chooses, and measure the EMA weights at each snapshot."""
    import torch

    from tinycats_core.device import fast_arithmetic, pick_device
    from tinycats_core.evaluation.gate import copy_bar
    from tinycats_core.evaluation.memorization import copy_rate
    from tinycats_core.training.state import Run
    from tinycats_core.training.step import training_step

    given, device = task.given, pick_device(task.given.device)
    order = torch.randperm(len(task.images), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[: given.few], order[given.few :]
    settings = {"steps": given.steps, "passes": None, "warmup_steps": given.steps // 50, "snapshots": given.snapshots, "seed": seed}
    train = task.config.train.model_copy(update={**settings, "augmentation": kind, "compile": "off"})
    model = task.config.model.model_copy(update={"num_classes": 1})
    run = Run.from_images(task.images[seen], torch.zeros(given.few, dtype=torch.int64), ("cat",), model, train, device)
    real = copy_rate(task.images[unseen], task.images[seen])
    steps, seconds = [], 0.0
    for snapshot in train.snapshot_steps():
        since = time.perf_counter()
        with fast_arithmetic(device):
            while run.step < snapshot:
                loss, _ = training_step(run)
            loss.item()  # waits for a GPU
        seconds += time.perf_counter() - since
        steps.append({"step": run.step, **judge_run(task, run, seen, unseen, f"{kind}-{run.step}" if seed == 0 else None)})
        print({"augmentation": kind, "seed": seed, **steps[-1]}, file=sys.stderr, flush=True)
    bar = copy_bar(real, given.count, len(unseen))
    return {"seed": seed, "seconds": round(seconds, 1), "copy_rate_real": real, "copy_bar": bar, "steps": steps}


def judge_run(task: Task, run: "Run", seen: "Tensor", unseen: "Tensor", picture: str | None) -> dict[str, Any]:
    """Return KID to the held-out cats and copy rate of what the EMA weights draw, and save a sheet of it."""
    import torch

    from tinycats_core.config import SampleConfig
    from tinycats_core.evaluation.distances import kernel_distance
    from tinycats_core.evaluation.memorization import copy_rate
    from tinycats_core.evaluation.metrics import kid_subset
    from tinycats_core.files import make_folder
    from tinycats_core.generator.model import TinyDiT
    from tinycats_core.generator.sampling import sample
    from tinycats_core.pictures import contact_sheet

    network = TinyDiT(run.net.config).to(run.device)
    network.load_state_dict(next(iter(run.emas.values())))
    labels = torch.zeros(task.given.count, dtype=torch.int64)
    images = sample(network.eval(), labels, run.net.config.image_size, 1, SampleConfig(guidance=1.0), run.device)
    if picture:
        make_folder(PICTURES)
        contact_sheet(images, labels, ("cat",), per_class=32, scale=2).save(PICTURES / f"augmentation-{picture}.png")
    subset = kid_subset(len(images), len(unseen))
    kid = kernel_distance(layer(task.judge, images), task.features[unseen], task.config.evaluate.kid_subsets, subset, 0)
    return {"kid": kid.value, "kid_std": kid.std, "copy_rate": copy_rate(images, task.images[seen])}


if __name__ == "__main__":
    sys.exit(main())
