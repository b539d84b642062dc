"""The course of a training with few cats: KID to cats that it never saw, and copy rate, at some of its steps.

`benchmarks.augmentation` and `benchmarks.start_from` compare trainings by it.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, TINY, positive

if TYPE_CHECKING:
    from torch import Tensor

    from tinycats_core.config import ModelConfig, ReleaseConfig, TrainConfig
    from tinycats_core.evaluation.reference import Judge
    from tinycats_core.training.state import Run

PICTURES = RESULTS / "pictures"  # not in git
QUICK = {"few": 40, "steps": 20, "seeds": 1, "count": 32, "size": 16, "photos": None}


@dataclass(frozen=True)
class Task:
    """What all trainings share: settings, judge, all cats, uint8 (N, 3, S, S), with their features (N, D), and all others."""

    given: argparse.Namespace
    config: "ReleaseConfig"
    judge: "Judge"
    images: "Tensor"
    features: "Tensor"
    others: "Tensor"

    @property
    def model(self) -> "ModelConfig":
        """The network, of one class."""
        return self.config.model.model_copy(update={"num_classes": 1})

    def train(self, seed: int, **settings: Any) -> "TrainConfig":
        """Return the settings of a training, of `--steps` if none are given."""
        steps = settings.get("steps", self.given.steps)
        fixed = {"steps": steps, "passes": None, "warmup_steps": steps // 50, "seed": seed, "compile": "off"}
        return self.config.train.model_copy(update=fixed | settings)


@dataclass(frozen=True)
class Cats:
    """Which cats a training sees, and which it is measured against: indices into those of the task."""

    seen: "Tensor"
    unseen: "Tensor"


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options that all comparisons of courses have."""
    parser.add_argument("--photos", type=Path, help="a folder of photos: cat/<Breed>/* and other/*, or one folder a class")
    parser.add_argument("--few", type=positive, default=40, help="photos to train on (default: 40)")
    parser.add_argument("--steps", type=positive, default=steps, help=f"of each training (default: {steps})")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each, with other photos (default: 2)")
    parser.add_argument("--count", type=positive, default=512, help="images that are drawn for each figure (default: 512)")
    parser.add_argument("--size", type=positive, default=32, help="of the images; a patch is an eighth of it (default: 32)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: auto)")
    parser.add_argument("--quick", action="store_true", help="a few steps on drawn cats, under a minute")


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
    pictures, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    images = pictures[groups.members(labels, dataset.classes, groups.CATS)]
    others = pictures[groups.members(labels, dataset.classes, groups.OTHER)]
    if len(images) < 2 * given.few or given.few < 3:
        raise DataError(f"--few is {given.few}; allowed: 3 to {len(images) // 2}, half of the {len(images)} cats")
    return Task(given, config, judge, images, layer(judge, images), others)


def layer(judge: "Judge", images: "Tensor") -> "Tensor":
    """Return the features of images that KID is measured in, (N, D)."""
    return judge.extract_features(images)[judge.extractor.feature_layer]


def shuffled(task: Task, seed: int) -> "Tensor":
    """Return the indices of all cats in the order of a seed."""
    import torch

    return torch.randperm(len(task.images), generator=torch.Generator().manual_seed(seed))


def follow(task: Task, train: "TrainConfig", cats: Cats, measured: Sequence[int], name: str) -> dict[str, Any]:
    """Train on the cats that are seen, and measure the EMA weights at some of the steps.

    Returns:
        The figures of each step, and the bar on the copy rate, which follows from that of the unseen cats.
    """
    from tinycats_core.evaluation.gate import copy_bar
    from tinycats_core.evaluation.memorization import copy_rate

    run = start_run(task, train, task.images[cats.seen])
    real = copy_rate(task.images[cats.unseen], task.images[cats.seen])
    steps, seconds = [], 0.0
    for step in measured:
        seconds += train_to(run, step)
        steps.append({"step": step, **judge_run(task, run, cats, f"{name}-{step}" if train.seed == 0 else None)})
        print({"training": name, "seed": train.seed, **steps[-1]}, file=sys.stderr, flush=True)
    bar = copy_bar(real, task.given.count, len(cats.unseen))
    return {"seed": train.seed, "seconds": round(seconds, 1), "copy_rate_real": real, "copy_bar": bar, "steps": steps}


def start_run(task: Task, train: "TrainConfig", images: "Tensor") -> "Run":
    """Return a training on images as one class, at step 0."""
    import torch

    from tinycats_core.device import pick_device
    from tinycats_core.training.state import Run

    labels = torch.zeros(len(images), dtype=torch.int64)
    return Run.from_images(images, labels, ("cat",), task.model, train, pick_device(task.given.device))


def train_to(run: "Run", step: int) -> float:
    """Train as far as a step, and return the seconds that it took."""
    from tinycats_core.device import fast_arithmetic
    from tinycats_core.training.step import training_step

    since = time.perf_counter()
    with fast_arithmetic(run.device):
        while run.step < step:
            loss, _ = training_step(run)
            if run.step == step:
                loss.item()  # waits for a GPU
    return time.perf_counter() - since


def judge_run(task: Task, run: "Run", cats: Cats, picture: str | None) -> dict[str, Any]:
    """Return KID to the unseen cats and copy rate of what the EMA weights draw, and save a sheet of it."""
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
        contact_sheet(images, labels, ("cat",), per_class=32, scale=2).save(PICTURES / f"{picture}.png")
    subset = kid_subset(len(images), len(cats.unseen))
    kid = kernel_distance(layer(task.judge, images), task.features[cats.unseen], task.config.evaluate.kid_subsets, subset, 0)
    return {"kid": kid.value, "kid_std": kid.std, "copy_rate": copy_rate(images, task.images[cats.seen])}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the seeds at each step, and the best step: that of the lowest KID among those without copies."""
    bar = statistics.fmean(run["copy_bar"] for run in runs)
    steps = [_mean(list(found), bar) for found in zip(*(run["steps"] for run in runs), strict=True)]
    best = min((step for step in steps if not step["copies"]), key=lambda step: step["kid"], default=None)
    return {"best": best, "steps": steps, "runs": runs}


def _mean(found: list[dict[str, Any]], bar: float) -> dict[str, Any]:
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
