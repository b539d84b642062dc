"""Measure, in seconds, how fast this machine trains, draws and extracts features."""

import logging
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from tinycats_core import threads
from tinycats_core.compute.costs import training_flops
from tinycats_core.compute.shapes import (
    COMPILE_FROM,
    CPU_PRECISIONS,
    REFERENCE,
    Shape,
    Speed,
    Speeds,
    best_way,
    candidates,
    choose,
    training_seconds,
)
from tinycats_core.config import BudgetConfig, ComputeConfig, ModelConfig, ReleaseConfig, SampleConfig, TrainConfig
from tinycats_core.device import fast_arithmetic, has_compiler, is_out_of_memory, machine, pick_device, synchronize, versions
from tinycats_core.evaluation import extractors
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.sampling import sample
from tinycats_core.training.state import Run, fastest_mode
from tinycats_core.training.step import training_step

logger = logging.getLogger("tinycats.budget")

MOST_SECONDS = 10.0  # of measuring, but for compiling
TURN, STEPS = 0.4, 5  # seconds and steps of a measurement, at least
PHOTOS = 256  # random images, which take as long as photos
DRAWN, JUDGED = 32, 16  # images
BREED_FEATURES = 300.0  # images/s of the breed classifier on two cores that train at REFERENCE; assumed
COMPILE_FROM_ON_GPU = 600.0  # seconds of training
WORTH_MEASURING = 1e14  # FLOPs of a training on a CPU: about twenty minutes on two cores


def facts(compute: ComputeConfig) -> dict[str, Any]:
    """Return what measured speeds belong to: the processor or GPU, its cores, the threads, and the version of PyTorch."""
    found = machine()
    kept = {name: found[name] for name in ("cpu", "cores", "gpu")}
    threads = compute.threads or found["torch_threads"]
    return {**kept, "threads": threads, **versions("torch"), "device": pick_device(compute.device).type}


def is_needed(config: ReleaseConfig) -> bool:
    """Return whether speed decides anything: within a budget of minutes, and for `auto` in a long training on a CPU.

    A GPU has a precision of its own, and compiles by `state.compile_mode`.
    """
    if config.budget.minutes is not None:
        return True
    model, train, compute = config.model, config.train, config.compute
    here = compute.where == "local" and compute.processes == 1 and pick_device(compute.device).type == "cpu"
    flops = train.steps * train.batch_size * training_flops(model)
    return here and "auto" in (train.precision, train.compile) and flops >= WORTH_MEASURING


def measure(
    model: ModelConfig,
    train: TrainConfig,
    sample: SampleConfig,
    extractor: str | None,
    budget: BudgetConfig,
    compute: ComputeConfig,
    hand: Collection[str],
) -> Speeds:
    """Measure the networks that may be trained, in the ways in which they may be computed. Takes seconds; compiling, minutes.

    A network that would take too long to measure here is left out, as it would be too slow to train; never the first one.

    Args:
        extractor: the feature extractor that will judge, None if its speed is of no interest.
        hand: the settings that a person gives.

    Raises:
        ComputeError: the device, the precision or the compiler is not available.
        EvaluationError: the feature extractor is not available.
    """
    device, since = pick_device(compute.device), time.perf_counter()
    shapes = candidates(model, train, budget, hand)
    with threads.limited(compute.threads), fast_arithmetic(device):
        rows = list(_eager(shapes, train, device, since))
        drawing = _drawing(sample, rows[0], device)
        features = _features_per_s(extractor, rows[0], device)
    expected = training_seconds(train, budget, rows[0].images_per_s)
    shape, way = choose(shapes, rows, expected)
    if compute.threads is None and compute.processes == 1 and device.type == "cpu":
        rows += _fewer_threads(shape, way, device)
    if train.compile == "auto" and expected >= (COMPILE_FROM if device.type == "cpu" else COMPILE_FROM_ON_GPU):
        with threads.limited(best_way([row for row in rows if row.model == shape.model], expected).threads):
            rows += _compiled(shape, train, device, compute.processes)
    in_order = [row for shape in shapes for row in rows if row.model == shape.model]
    return Speeds(rows=tuple(in_order), drawing=drawing, features_per_s=features, seconds=time.perf_counter() - since)


def measure_way(model: ModelConfig, batch_size: int, precision: str, compile: str, device: torch.device) -> Speed:
    """Return the speed of a training step: the median of a few, and what the first one took longer. Raises ComputeError."""
    train = TrainConfig.model_validate({"batch_size": batch_size, "precision": precision, "compile": compile})
    generator = torch.Generator().manual_seed(0)
    shape = (PHOTOS, 3, model.image_size, model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    classes = tuple(map(str, range(model.num_classes)))
    run = Run.from_images(images, torch.arange(PHOTOS) % model.num_classes, classes, model, train, device)

    def step() -> None:
        training_step(run)
        synchronize(device)

    first = _seconds(step)
    times = [_seconds(step)]  # the second one warms up
    while len(times) < STEPS - 1 or sum(times) < TURN:
        times.append(_seconds(step))
    median = statistics.median(times[1:])
    return Speed(
        model=model,
        batch_size=batch_size,
        precision=precision,
        compile=compile,
        threads=torch.get_num_threads(),
        images_per_s=batch_size / median,
        compile_seconds=max(0.0, first - median) if compile != "off" else 0.0,
    )


def _eager(shapes: Sequence[Shape], train: TrainConfig, device: torch.device, since: float) -> Iterator[Speed]:
    """Yield the speed of each shape in each precision, not compiled unless a person asks for it."""
    compile, precisions = "off" if train.compile == "auto" else train.compile, _precisions(train, device)
    best = 0.0  # FLOP/s so far
    for shape in shapes:
        flops, left = training_flops(shape.model) * shape.batch_size, MOST_SECONDS - (time.perf_counter() - since)
        if device.type == "cpu" and best and STEPS * len(precisions) * flops / best > left:
            return
        try:
            for precision in precisions:
                row = measure_way(shape.model, shape.batch_size, precision, compile, device)
                best = max(best, row.images_per_s * training_flops(row.model))
                yield row
        except RuntimeError as error:
            if not is_out_of_memory(error) or shape is shapes[0]:
                raise
            return


def _precisions(train: TrainConfig, device: torch.device) -> tuple[str, ...]:
    """Return the precisions to choose from. A GPU has one of its own."""
    return CPU_PRECISIONS if train.precision == "auto" and device.type == "cpu" else (train.precision,)


def _fewer_threads(shape: Shape, way: Speed, device: torch.device) -> Iterator[Speed]:
    """Yield the speed on a half and a quarter of the threads: small networks gain nothing from many."""
    for count in (way.threads // 2, way.threads // 4):
        if count >= 2:
            with threads.limited(count), fast_arithmetic(device):
                yield measure_way(shape.model, shape.batch_size, way.precision, way.compile, device)


def _compiled(shape: Shape, train: TrainConfig, device: torch.device, processes: int) -> Iterator[Speed]:
    if not has_compiler(device):
        return
    for precision in _precisions(train, device):
        logger.info("compiling the training step in %s, to measure it: on a CPU this takes a minute or two", precision)
        with fast_arithmetic(device):
            yield measure_way(shape.model, shape.batch_size, precision, fastest_mode(device, processes), device)


def _drawing(setting: SampleConfig, plain: Speed, device: torch.device) -> float:
    """Return what an image takes to be drawn, as a multiple of what it takes to train on one."""
    network, labels = TinyDiT(plain.model).to(device).eval(), torch.arange(DRAWN) % plain.model.num_classes

    def draw() -> None:
        sample(network, labels, plain.model.image_size, plain.model.num_classes, setting, device)

    draw()
    return _seconds(draw) / DRAWN * plain.images_per_s


def _features_per_s(extractor: str | None, plain: Speed, device: torch.device) -> float:
    if extractor != "inception":
        return BREED_FEATURES * min(1.0, plain.images_per_s / REFERENCE)
    network = extractors.load_inception("cpu" if device.type == "mps" else device)
    images = torch.zeros(JUDGED, 3, plain.model.image_size, plain.model.image_size, dtype=torch.uint8)
    extractors.extract(network, images, JUDGED)  # the first call for a shape prepares it
    return JUDGED / _seconds(lambda: extractors.extract(network, images, JUDGED))


def _seconds(act: Callable[[], object]) -> float:
    since = time.perf_counter()
    act()
    return time.perf_counter() - since
