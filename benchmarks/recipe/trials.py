"""How an experiment of `benchmarks.recipe` is carried out: train on one core, draw, judge."""

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
from tinycats_core.evaluation import fidelity
from tinycats_core.evaluation.memorization import copy_rate
from tinycats_core.evaluation.reference import Judge
from tinycats_core.files import make_folder
from tinycats_core.generator import sampling
from tinycats_core.generator.model import TinyDiT
from tinycats_core.pictures import contact_sheet
from tinycats_core.records import Dataset, Weights
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

CPU = torch.device("cpu")
GUIDANCES = (1.5, 3.0, 5.0)  # of which the validation split chooses
WARM_UP = 0.02  # of the steps


@dataclass(frozen=True)
class Task:
    """What one process does: train once, then draw and judge for each row that shares the training."""

    rows: tuple[Row, ...]
    seed: int
    steps: int  # of the base; other rows take as many as take the same time
    count: int
    dataset: Dataset
    classifier: Weights | None  # the judge's eyes on toy cats; photos are seen by Inception
    scratch: Path
    pictures: Path  # what the pictures' names begin with


def one_thread() -> None:
    """Keep this process to one core."""
    torch.set_num_threads(1)
    logging.getLogger("tinycats").setLevel(logging.WARNING)


def work(task: Task) -> list[dict[str, Any]]:
    """Train once, and judge for each row on the validation split."""
    judge = appoint(task)
    run, seconds = train_row(task.rows[0], task)
    trained = {"seed": task.seed, **facts(run, seconds), "dataset": task.dataset.content[:12]}
    return [{"row": row.name, **trained, **look(judge, task, row, run, "val")} for row in task.rows]


def play(task: Task) -> dict[str, Any]:
    """Train once, choose average and guidance on the validation split, and look once at the test split."""
    judge, (row,) = appoint(task), task.rows
    started = time.perf_counter()
    run, seconds = train_row(row, task)
    wall = time.perf_counter() - started
    tried = [
        replace(row, weights=str(decay), sample=row.sample | {"guidance": guidance}) for decay in run.emas for guidance in GUIDANCES
    ]
    sweep = [{"ema_decay": float(one.weights), **one.sample, **look(judge, task, one, run, "val")} for one in tried]
    best = min(range(len(sweep)), key=lambda number: sweep[number]["kid"])
    found = look(judge, task, tried[best], run, "test")
    return {**found, **facts(run, seconds), "wall_seconds": round(wall), "chosen": sweep[best], "sweep": sweep}


def facts(run: Run, seconds: float) -> dict[str, Any]:
    """Return what a training took."""
    return {
        "steps": run.step,
        "images": run.step * run.config.batch_size,
        "seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in run.net.parameters()),
    }


def appoint(task: Task) -> Judge:
    """Return the judge of a task's data set."""
    config = EvaluateConfig(extractor="breed" if task.classifier else "inception")
    return Judge.appoint(task.dataset, config, task.classifier, task.scratch / "evaluations", "cpu")


def look(judge: Judge, task: Task, row: Row, run: Run, split: Split) -> dict[str, Any]:
    """Return what is measured of a row's images against a split; those of the first seed are kept as a picture."""
    dataset = task.dataset
    train = load_split(dataset, "train")[0]
    real, real_labels = load_split(dataset, split)
    labels = sampling.labels_like(real_labels, task.count, len(dataset.classes))
    made = draw_row(row, run, labels)
    seen, known = judge.see(made), judge.reference(split)
    metrics = fidelity.compare(seen, known, judge.eyes, judge.config, fidelity.kid_subset(len(made), len(real)))
    if task.seed == 0:
        make_folder(task.pictures.parent)
        sheet = contact_sheet(made, labels, dataset.classes, per_class=6, scale=2)
        sheet.save(f"{task.pictures}-{row.name}-{split}.png")
    eyes = judge.eyes.name
    return {
        "kid": metrics[f"kid_{eyes}"],
        "kid_std": metrics[f"kid_{eyes}_std"],
        "fid": metrics["fid_inception" if eyes == "inception" else f"fd_{eyes}"],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
        "copy_rate": copy_rate(made, train),
        "copy_rate_real": copy_rate(real, train),
        "counts": {"train": len(train), split: len(real), "generated": len(made)},
    }


def train_row(row: Row, task: Task) -> tuple[Run, float]:
    """Train for as many steps as take the time of `task.steps` steps of the base. Returns run and processor time in s."""
    own, base = step_times(row, task)
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
    """Return the processor time of a step of a row and of the base, in s: medians over turns, so that both see the same load."""
    rows = (row, Row("base", ""))
    runs = [start(one, 10_000, task.seed, task.dataset) for one in rows]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 + min(30, task.steps // 4)):
        for run, found in zip(runs, times, strict=True):
            with fast_arithmetic(CPU):
                since = time.process_time()
                for _ in range(3):
                    training_step(run)
                if turn > 1:  # the first ones warm up
                    found.append((time.process_time() - since) / 3)
    return statistics.median(times[0]), statistics.median(times[1])


def base_step(task: Task) -> float:
    """Return the processor time of a step of the base, in s."""
    return step_times(Row("base", ""), task)[1]


def start(row: Row, steps: int, seed: int, dataset: Dataset) -> Run:
    """Return a row's training at its beginning."""
    images, labels = load_split(dataset, "train")
    model = ModelConfig.model_validate(BASE["model"] | row.model | {"num_classes": len(dataset.classes)})
    settings = {"steps": steps, "warmup_steps": round(WARM_UP * steps), "seed": seed, "precision": "fp32"}
    config = TrainConfig.model_validate(BASE["train"] | row.train | settings)
    return Run.from_images(images, labels, dataset.classes, model, config, CPU)


def draw_row(row: Row, run: Run, labels: Tensor) -> Tensor:
    """Draw an image for each label from the weights that a row samples with."""
    config = run.net.config
    network = TinyDiT(config)
    averages = {"raw": run.weights, "ema": next(iter(run.emas.values()))} | {str(decay): ema for decay, ema in run.emas.items()}
    network.load_state_dict(averages[row.weights])
    with fast_arithmetic(CPU):
        settings = SampleConfig.model_validate(BASE["sample"] | row.sample)
        return sampling.sample(network.eval(), labels, config.image_size, config.num_classes, settings)
