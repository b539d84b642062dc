"""The work of `benchmarks.cats128`: speeds, trainings of a given time, and what their images are worth."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cats128.rows import BASE, QUICK, Row
from tinycats_core.compute.costs import training_flops
from tinycats_core.config import ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data import groups
from tinycats_core.data.splits import Split
from tinycats_core.device import PRECISIONS, empty_cache, fast_arithmetic, matmul_peak, synchronize
from tinycats_core.errors import TrainingError
from tinycats_core.evaluation.gate import copy_bar
from tinycats_core.evaluation.memorization import copy_rate, copy_rates_of_training, neighbour_sheet
from tinycats_core.evaluation.metrics import Comparison, kid_subset, measure
from tinycats_core.evaluation.reference import Judge
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.sampling import labels_like, sample
from tinycats_core.pictures import contact_sheet
from tinycats_core.presets import merge
from tinycats_core.records import Weights
from tinycats_core.training.recipe import make_optimizer
from tinycats_core.training.state import LogWindow, Run
from tinycats_core.training.step import training_step

MODES = ("off", "blocks", "default", "reduce-overhead")  # off: eager; blocks: each block alone; the last one: CUDA graphs
GUIDANCES = (1.5, 3.0, 5.0)  # the validation images choose one
FAR = 10_000_000  # steps: a schedule that is still in its warm-up while speed is measured
WARM_UP = 0.05  # of the steps
Drawn = tuple[Tensor, Tensor]  # images uint8 (N, 3, S, S) and labels int64 (N,)
Averages = dict[int, dict[float, dict[str, Tensor]]]  # of the weights, by snapshot and decay


@dataclass
class Bench:
    """What all experiments share: the judge of the data set, the device, and the networks that are compiled already."""

    judge: Judge
    classifier: Weights | None  # the judge's feature extractor for toy cats; None for photos, which use Inception
    device: torch.device
    mode: str
    count: int  # images that are drawn to judge a training
    quick: bool
    compiled: dict[str, Run] = field(default_factory=dict)

    def start(self, row: Row, steps: int, mode: str | None = None) -> Run:
        """Return a row's training before its first step. Trainings of the same shape share one compiled network."""
        mode, classes = mode or self.mode, self.judge.dataset.classes
        images, labels = self.judge.images("train")
        base = merge(BASE, QUICK) if self.quick else BASE
        model = ModelConfig.model_validate(base["model"] | row.model | {"num_classes": len(classes)})
        settings = {"steps": steps, "warmup_steps": math.ceil(WARM_UP * steps), "compile": "off" if mode == "blocks" else mode}
        config = TrainConfig.model_validate(base["train"] | row.train | settings)
        key = f"{mode} {model} {config.batch_size} {config.augmentation}"
        if (kept := self.compiled.get(key)) is None:
            kept = Run.from_images(images, labels, classes, model, config, self.device)
            if mode == "blocks":
                for block in kept.net.blocks:
                    block.compile()
            self.compiled[key] = kept
            return kept
        fresh = Run.from_images(images, labels, classes, model, config.model_copy(update={"compile": "off"}), self.device)
        kept.net.load_state_dict(fresh.net.state_dict())
        shared = {"net": kept.net, "step_net": kept.step_net, "weights": kept.weights}
        return dataclasses.replace(fresh, config=config, optimizer=make_optimizer(kept.net, config), **shared)

    def forget(self) -> None:
        """Give back the memory of the networks."""
        self.compiled.clear()
        torch.compiler.reset()
        empty_cache(self.device)


def speeds(bench: Bench, rows: Sequence[Row], modes: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Return the speed of the training step of each row in each mode, and how much of the device's matrix peak it uses."""
    precision = TrainConfig().precision
    found: dict[str, Any] = {}
    peak = 0.0
    for row in rows:
        for mode in modes:
            bench.forget()
            try:
                run, first = timed(bench, lambda row=row, mode=mode: warmed(bench, row, mode))
                rates = [rate(bench, run, steps) for _ in range(rounds)]
                dtype = run.autocast or torch.float32
                peak = peak or matmul_peak(bench.device, dtype)
                found[f"{row.name} {mode}"] = {
                    "images_per_s": statistics.median(rates),
                    "spread": [min(rates), max(rates)],
                    "share_of_matmul_peak": statistics.median(rates) * training_flops(run.net.config) / peak,
                    "first_steps_seconds": round(first, 1),
                    "parameters": sum(weight.numel() for weight in run.net.parameters()),
                    "loss": float(training_step(run)[0]),
                    "precision": PRECISIONS[run.autocast],
                    "memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if bench.device.type == "cuda" else None,
                }
            except Exception as error:  # the others are measured all the same
                found[f"{row.name} {mode}"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"{row.name} {mode}: {found[f'{row.name} {mode}']}", flush=True)
    return {"precision": precision, "matmul_peak_flops": peak, "ways": found}


def timed(bench: Bench, work: Callable[[], Run]) -> tuple[Run, float]:
    """Return what work returns, and its seconds."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    since = time.perf_counter()
    run = work()
    synchronize(bench.device)
    return run, time.perf_counter() - since


def warmed(bench: Bench, row: Row, mode: str | None = None) -> Run:
    """Return a training after its first steps, which compile."""
    run = bench.start(row, FAR, mode)
    with fast_arithmetic(bench.device):
        for _ in range(3):
            training_step(run)
    synchronize(bench.device)
    return run


def rate(bench: Bench, run: Run, steps: int) -> float:
    """Return images per second over some steps."""
    with fast_arithmetic(bench.device):
        since = time.perf_counter()
        for _ in range(steps):
            training_step(run)
        synchronize(bench.device)
    return steps * run.config.batch_size / (time.perf_counter() - since)


def profile(bench: Bench, row: Row, steps: int) -> dict[str, Any]:
    """Return where the time of a step goes: the kernels that take longest, and the share of the time that the device works."""
    run = warmed(bench, row)
    on_gpu = bench.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds, acc_events=True) as recorded:
        since = time.perf_counter()
        rate(bench, run, steps)
        seconds = time.perf_counter() - since
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in recorded.key_averages() if not on_gpu or str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1  # microseconds
    top = [
        {"name": event.key[:90], "share": round(getattr(event, name) / total, 4), "calls_per_step": event.count / steps}
        for event in events[:15]
    ]
    return {"mode": bench.mode, "step_ms": 1e3 * seconds / steps, "busy_ms": total / 1e3 / steps, "longest": top}


def exactness(bench: Bench, count: int) -> dict[str, Any]:
    """Return how far the judge's features on the device are from those on a CPU, as a share of their length."""
    images = bench.judge.images("train")[0][:count]
    layer = bench.judge.extractor.feature_layer
    on_device = bench.judge.extract_features(images)[layer].double()
    twin = Judge.load(bench.judge.dataset, bench.judge.config, bench.classifier, bench.judge.folder, "cpu")
    on_cpu = twin.extract_features(images)[layer].double()
    return {"images": count, "error": float((on_device - on_cpu).norm() / on_cpu.norm())}


def train_for(
    bench: Bench, row: Row, seconds: float, snapshots: int = 1
) -> tuple[Run, dict[int, dict[float, dict[str, Tensor]]], float]:
    """Train a row for a time. Returns the run, the averages of the weights by snapshot and decay, and the seconds.

    Compiling and the choice of the number of steps are not counted.
    """
    probe = warmed(bench, row)
    per_step = probe.config.batch_size / rate(bench, probe, 3 if bench.quick else 20)
    run = bench.start(row, max(10, round(seconds / per_step)))
    marks = {run.config.steps * number // snapshots for number in range(1, snapshots + 1)}
    averages: Averages = {}
    loss, since = torch.zeros(()), time.perf_counter()
    with fast_arithmetic(bench.device):
        while run.step < run.config.steps:
            loss, _ = training_step(run)
            if run.step in marks:
                averages[run.step] = {decay: {name: one.clone() for name, one in ema.items()} for decay, ema in run.emas.items()}
    synchronize(bench.device)
    if not math.isfinite(float(loss)):
        raise TrainingError(f"{row.name}: the loss is {float(loss)}; take another learning rate for this row")
    run.window = LogWindow()
    return run, averages, time.perf_counter() - since


def draw(bench: Bench, model: ModelConfig, weights: Mapping[str, Tensor], guidance: float, split: Split, count: int) -> Drawn:
    """Draw images of the classes of a split, in its proportions."""
    classes = len(bench.judge.dataset.classes)
    labels = labels_like(bench.judge.images(split)[1], count, classes)
    network = TinyDiT(model)
    network.load_state_dict(weights)
    network = network.to(bench.device).eval()
    settings = SampleConfig(guidance=guidance, batch_size=256)
    with fast_arithmetic(bench.device):
        return sample(network, labels, model.image_size, classes, settings, bench.device), labels


def judged(bench: Bench, drawn: Drawn, split: Split, group: str = groups.ALL) -> dict[str, Any]:
    """Measure the images of a group against those of a split."""
    judge, chosen = bench.judge, groups.members(drawn[1], bench.judge.dataset.classes, group)
    images, labels = drawn[0][chosen], drawn[1][chosen]
    features, subset = judge.extract_features(images), kid_subset(len(images), len(judge.group(split, group)[0]))
    of = Comparison(judge, judge.reference(split, group), images, labels, features, subset, asked=False)
    metrics = measure(of, sweep=True)
    kid = f"kid_{judge.extractor.name}"
    return {
        "kid": metrics[kid],
        "kid_low": metrics[f"{kid}_low"],
        "kid_high": metrics[f"{kid}_high"],
        "fid": metrics[judge.extractor.frechet_name],
        **{name: metrics[name] for name in ("precision", "recall", "density", "coverage", "copy_rate")},
    }


def try_row(bench: Bench, row: Row, seconds: float, snapshots: int = 1) -> dict[str, Any]:
    """Train a row for a time, and measure each snapshot on the validation images; the last one with every average and guidance.

    `best` are the average and the guidance with the lowest KID of those whose copy rate passes, or else of all. A row that
    fails has an `error` instead of figures: the others are measured all the same.
    """
    about = {"row": row.name, "what": row.what, "model": row.model, "train": row.train}
    try:
        found = _try_row(bench, row, seconds, snapshots)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(f"{row.name}: {found.get('error') or found['best']}", flush=True)
    return about | found


def _try_row(bench: Bench, row: Row, seconds: float, snapshots: int) -> dict[str, Any]:
    run, averages, took = train_for(bench, row, seconds, snapshots)
    config, model, train = run.config, run.net.config, bench.judge.images("train")[0]
    bar = copy_bar(copy_rates_of_training(train.to(bench.device)).copy_rate, bench.count, len(train))
    first, usual = config.ema_decays[0], GUIDANCES[1]
    tried: list[dict[str, Any]] = []
    pictures: list[Drawn] = []
    for step, of_step in averages.items():
        for decay, guidance in ((decay, guidance) for decay in of_step for guidance in GUIDANCES):
            if (decay, guidance) == (first, usual) or (step == config.steps and (decay == first or snapshots > 1)):
                drawn = draw(bench, model, of_step[decay], guidance, "val", bench.count)
                passes = step * config.batch_size / len(train)
                about = {"step": step, "passes": round(passes, 1), "ema_decay": decay, "guidance": guidance}
                tried.append(about | judged(bench, drawn, "val"))
                pictures.append(drawn)
    clean = [number for number, one in enumerate(tried) if one["copy_rate"] <= bar] or range(len(tried))
    chosen = min(clean, key=lambda number: tried[number]["kid"])
    best = tried[chosen]
    return {
        "seconds": round(took, 1),
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "images_per_s": config.steps * config.batch_size / took,
        "parameters": sum(weight.numel() for weight in run.net.parameters()),
        "copy_bar": bar,
        "best": best,
        "tried": tried,
        "weights": averages[best["step"]][best["ema_decay"]],
        "config": model,
        "sheet": contact_sheet(*pictures[chosen], bench.judge.dataset.classes, per_class=8),
    }


def final(bench: Bench, found: Mapping[str, Any], pictures: Path) -> dict[str, Any]:
    """Measure a training's choice once against the test images, and against the training images; save its grids and weights."""
    judge, best = bench.judge, found["best"]
    classes, (train, _) = judge.dataset.classes, judge.images("train")
    drawn = draw(bench, found["config"], found["weights"], best["guidance"], "test", 52 if bench.quick else 2_080)
    contact_sheet(*drawn, classes, per_class=8).save(pictures / "grid.jpg", quality=90)
    neighbour_sheet(*drawn, train, classes).save(pictures / "neighbours.jpg", quality=90)
    real = judge.images("test")
    return {
        "chosen": best,
        "images": len(drawn[0]),
        "test": judged(bench, drawn, "test"),
        "test_cats": judged(bench, drawn, "test", groups.CATS),
        "training": judged(bench, drawn, "train"),
        "real_copy_rate": copy_rate(real[0].to(bench.device), train.to(bench.device)),
        "real_fid_of_training_images": judged(bench, judge.images("train"), "test"),
    }
