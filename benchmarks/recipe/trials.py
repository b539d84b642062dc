"""An experiment of `benchmarks.recipe`: train on one core, draw, measure."""

import logging
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe.rows import BASE, Row
from tinycats_core.config import EvaluateConfig, ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data.splits import Split, load_split
from tinycats_core.device import fast_arithmetic
from tinycats_core.errors import TrainingError
from tinycats_core.evaluation.memorization import copy_rate
from tinycats_core.evaluation.metrics import Comparison, kid_subset, measure
from tinycats_core.evaluation.reference import Judge
from tinycats_core.files import make_folder
from tinycats_core.generator import sampling
from tinycats_core.generator.model import TinyDiT
from tinycats_core.pictures import contact_sheet
from tinycats_core.records import Dataset, Weights
from tinycats_core.training.augmentation import without_label_layer
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

CPU = torch.device("cpu")
GUIDANCES = (1.5, 3.0, 5.0)  # the validation split chooses one
WARM_UP = 0.02  # of the steps


@dataclass(frozen=True)
class Task:
    """The work of one process: train once, then draw and measure for each row that shares the training."""

    rows: tuple[Row, ...]
    seed: int
    steps: int  # of the base; other rows train for the same time
    count: int
    dataset: Dataset
    classifier: Weights | None  # the feature extractor for toy cats; None for photos, which use Inception
    scratch: Path
    pictures: Path  # the beginning of the pictures' names
    same_steps: bool = False  # train as many steps as the base instead of for the same time


def one_thread() -> None:
    """Keep this process to one core."""
    torch.set_num_threads(1)
    logging.getLogger("tinycats").setLevel(logging.WARNING)


def work(task: Task) -> list[dict[str, Any]]:
    """Train once, and measure each row on the validation split."""
    judge = load_judge(task)
    run, seconds = train_row(task.rows[0], task)
    trained = {"seed": task.seed, **facts(run, seconds), "dataset": task.dataset.content[:12]}
    return [{"row": row.name, **trained, **evaluate(judge, task, row, run, "val")} for row in task.rows]


def play(task: Task) -> dict[str, Any]:
    """Train once, choose average and guidance on the validation split, and measure once on the test split."""
    judge, (row,) = load_judge(task), task.rows
    started = time.perf_counter()
    run, seconds = train_row(row, task)
    wall = time.perf_counter() - started
    tried = [
        replace(row, weights=str(decay), sample=row.sample | {"guidance": guidance}) for decay in run.emas for guidance in GUIDANCES
    ]
    sweep = [{"ema_decay": float(one.weights), **one.sample, **evaluate(judge, task, one, run, "val")} for one in tried]
    best = min(range(len(sweep)), key=lambda number: sweep[number]["kid"])
    final = evaluate(judge, task, tried[best], run, "test")
    return {**final, **facts(run, seconds), "wall_seconds": round(wall), "chosen": sweep[best], "sweep": sweep}


def facts(run: Run, seconds: float) -> dict[str, Any]:
    """Return the steps, images, time and parameters of a training."""
    return {
        "steps": run.step,
        "images": run.step * run.config.batch_size,
        "seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in run.net.parameters()),
    }


def load_judge(task: Task) -> Judge:
    """Load the judge of a task's data set."""
    config = EvaluateConfig(extractor="breed" if task.classifier else "inception")
    return Judge.load(task.dataset, config, task.classifier, task.scratch / "evaluations", "cpu")


def evaluate(judge: Judge, task: Task, row: Row, run: Run, split: Split) -> dict[str, Any]:
    """Measure a row's images against a split. Those of the first seed are saved as a picture."""
    dataset = task.dataset
    train = load_split(dataset, "train")[0]
    real, real_labels = load_split(dataset, split)
    labels = sampling.labels_like(real_labels, task.count, len(dataset.classes))
    images = draw_row(row, run, labels)
    features, subset = judge.extract_features(images), kid_subset(len(images), len(real))
    metrics = measure(Comparison(judge, judge.reference(split), images, labels, features, subset, asked=False), sweep=True)
    if task.seed == 0:
        make_folder(task.pictures.parent)
        sheet = contact_sheet(images, labels, dataset.classes, per_class=6, scale=2)
        sheet.save(f"{task.pictures}-{row.name}-{split}.png")
    extractor = judge.extractor
    return {
        "kid": metrics[f"kid_{extractor.name}"],
        "kid_std": metrics[f"kid_{extractor.name}_std"],
        "fid": metrics[extractor.frechet_name],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
        "copy_rate": metrics["copy_rate"],
        "copy_rate_real": copy_rate(real, train),
        "counts": {"train": len(train), split: len(real), "generated": len(images)},
    }


def train_row(row: Row, task: Task) -> tuple[Run, float]:
    """Train a row for the time of `task.steps` steps of the base. Returns the run and its processor time in s."""
    own, base = (1.0, 1.0) if task.same_steps else step_times(row, task)
    run = start(row, max(10, round(task.steps * base / own)), task.seed, task.dataset)
    since, loss = time.process_time(), torch.zeros(())
    with fast_arithmetic(CPU):
        while run.step < run.config.steps:
            loss, _ = training_step(run)
            if run.step % 5_000 == 0:
                print(f"{row.name}: step {run.step:,} of {run.config.steps:,}", file=sys.stderr, flush=True)
    if not math.isfinite(float(loss)):
        raise TrainingError(f"{row.name}, seed {task.seed}: the loss is {float(loss)}; take another learning rate for this row")
    return run, time.process_time() - since


def step_times(row: Row, task: Task) -> tuple[float, float]:
    """Return the processor time of a step of a row and of the base, in s: medians over turns, so that both have the same load."""
    rows = (row, Row("base", ""))
    runs = [start(one, 10_000, task.seed, task.dataset) for one in rows]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 + min(30, task.steps // 4)):
        for run, seconds in zip(runs, times, strict=True):
            with fast_arithmetic(CPU):
                since = time.process_time()
                for _ in range(3):
                    training_step(run)
                if turn > 1:  # the first ones warm up
                    seconds.append((time.process_time() - since) / 3)
    return statistics.median(times[0]), statistics.median(times[1])


def base_step(task: Task) -> float:
    """Return the processor time of a step of the base, in s."""
    return step_times(Row("base", ""), task)[1]


def start(row: Row, steps: int, seed: int, dataset: Dataset) -> Run:
    """Return a row's training before its first step."""
    images, labels = load_split(dataset, "train")
    model = ModelConfig.model_validate(BASE["model"] | row.model | {"num_classes": len(dataset.classes)})
    settings = {"steps": steps, "warmup_steps": round(WARM_UP * steps), "seed": seed}
    config = TrainConfig.model_validate({"precision": "fp32"} | BASE["train"] | row.train | settings)
    return Run.from_images(images, labels, dataset.classes, model, config, CPU)


def draw_row(row: Row, run: Run, labels: Tensor) -> Tensor:
    """Draw an image for each label with the weights of a row."""
    config = run.net.config
    network = TinyDiT(config)
    averages = {"raw": without_label_layer(run.weights), "ema": next(iter(run.emas.values()))} | {
        str(decay): ema for decay, ema in run.emas.items()
    }
    network.load_state_dict(averages[row.weights])
    with fast_arithmetic(CPU):
        settings = SampleConfig.model_validate(BASE["sample"] | row.sample)
        return sampling.sample(network.eval(), labels, config.image_size, config.num_classes, settings)
