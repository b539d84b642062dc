"""Who takes part in `benchmarks.training`, how they take turns, and where the time of a step goes."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
from diffusers.training_utils import EMAModel  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.common import without_paths
from tinycats_core.compute import speed
from tinycats_core.compute.shapes import best_way
from tinycats_core.config import CLASSES, ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data import toy_drawing
from tinycats_core.device import cores, fast_arithmetic, has_compiler, matmul_peak, synchronize
from tinycats_core.generator.sampling import sample
from tinycats_core.training import loop, state
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

PHOTO = (500, 375)  # pixels, as photos of pets typically are
PREFETCH = 2  # batches a worker reads ahead: DataLoader's own setting
LONG = 24 * 3600.0  # seconds of a training
WARM_UP = 1  # steps at the beginning of each turn

Step = Callable[[], Any]  # takes one training step and returns its loss, a number or a scalar on the device


@dataclass
class Data:
    """The same toy cats as JPEG files and as tensors on the device."""

    folder: Path  # a folder a class, <class>/<number>.jpg
    images: Tensor  # uint8 (N, 3, S, S)
    labels: Tensor  # int64 (N,)


@dataclass
class Entry:
    """Who takes part: `turn` makes everything ready and yields the step that is measured."""

    name: str
    batch_size: int
    parameters: int
    turn: Callable[[int], AbstractContextManager[Step]]  # of the number of steps that will be asked for
    reads_ahead: int = 0  # batches that are there already when a turn begins
    rates: list[float] = field(default_factory=list)  # images/s of each round
    first_step_seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan  # mean of the last round
    peak_memory_mb: float = 0.0  # of a GPU
    error: str | None = None

    @property
    def images_per_s(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rates)


@dataclass
class Variant(Entry):
    """One way to run our step."""

    run: Run = field(kw_only=True)

    def figures(self) -> dict[str, Any]:
        """Return what is reported of it; for one that failed, why."""
        if self.error is not None:
            return {"error": self.error}
        seconds = {"compile_seconds": self.first_step_seconds} if self.run.step_net is not self.run.net else {}
        return {"images_per_s": self.images_per_s, **seconds, "loss_first": self.first_loss, "loss_last": self.last_loss}


def draw_data(folder: Path, per_class: int, device: torch.device) -> Data:
    """Draw toy cats as large as photos, write them as JPEG files, and keep them at 128 px as the data stage would.

    Their files are smaller than those of most photos and decode a little faster, which is to the peer's advantage.
    """
    width, height = PHOTO
    small = transforms.Compose([transforms.Resize(128), transforms.CenterCrop(128), transforms.PILToTensor()])
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng([label, number])
            square = toy_drawing.draw(label, rng, width)
            photo = square.crop((0, (width - height) // 2, width, (width + height) // 2))
            photo.save(folder / name / f"{number}.jpg", quality=90)
            images.append(small(photo))
            labels.append(label)
    return Data(folder, torch.stack(images).to(device), torch.tensor(labels, device=device))


def enter_ours(data: Data, model: ModelConfig, batch_size: int, device: torch.device, quick: bool) -> list[Variant]:
    """Return the variants of our step. The first one is the network as it is written."""
    settings: dict[str, dict[str, Any]] = {"eager": {}}
    if device.type == "cuda":
        settings |= {} if quick else {f"compile-{mode}": {"compile": mode} for mode in ("default", "reduce-overhead")}
    elif not quick:
        settings["bf16"] = {"precision": "bf16"}
        if has_compiler(device):
            settings |= {"compile-default": {"compile": "default"}}
            settings |= {"compile-default-bf16": {"compile": "default", "precision": "bf16"}}
    return [_enter(name, data, model, batch_size, device, changes) for name, changes in settings.items()]


def choose(ours: list[Variant], model: ModelConfig, device: torch.device) -> tuple[Variant, dict[str, float]]:
    """Return the variant that a long training on a CPU takes, and the images/s that `auto` measures to choose it, by name."""
    rows = {}
    for variant in ours:
        config = variant.run.config
        precision = "fp32" if config.precision == "auto" else config.precision
        with fast_arithmetic(device):
            rows[variant.name] = speed.measure_way(model, variant.batch_size, precision, config.compile, device)
    best = best_way(list(rows.values()), LONG)
    return next(variant for variant in ours if rows[variant.name] is best), {name: row.images_per_s for name, row in rows.items()}


def _enter(name: str, data: Data, model: ModelConfig, batch_size: int, device: torch.device, changes: dict[str, Any]) -> Variant:
    config = TrainConfig.model_validate({"batch_size": batch_size, "compile": "off", "warmup_steps": 0} | changes)
    run = Run.from_images(data.images, data.labels, CLASSES, model, config, device)

    def step() -> Tensor:
        loss, norm = training_step(run)
        run.window.losses.append(loss)  # as the loop of `train` does for its log
        run.window.norms.append(norm)
        return loss

    @contextmanager
    def turn(_: int) -> Iterator[Step]:
        with fast_arithmetic(device):
            yield step
        run.window = state.LogWindow()

    return Variant(name, batch_size, sum(p.numel() for p in run.net.parameters()), turn, run=run)


class Peer:
    """A training loop as one writes it around diffusers' DiT, with everything at its own defaults."""

    def __init__(self, model: ModelConfig, device: torch.device):
        torch.manual_seed(0)
        self.device = device
        self.net: Any = DiTTransformer2DModel(
            num_attention_heads=model.heads,
            attention_head_dim=model.width // model.heads,
            in_channels=3,
            out_channels=3,
            num_layers=model.depth,
            sample_size=model.image_size,
            patch_size=model.patch_size,
            num_embeds_ada_norm=model.num_classes,
        )
        self.net.to(device).train()
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.ema: Any = EMAModel(self.net.parameters())

    def step(self, x_1: Tensor, labels: Tensor) -> float:
        """Train on images (B, 3, S, S) in [−1, 1] and labels (B,). Returns the loss."""
        x_0 = torch.randn_like(x_1)
        t = torch.rand(len(x_1), device=self.device)
        shape = (-1, 1, 1, 1)
        x_t = t.view(shape) * x_1 + (1 - t.view(shape)) * x_0
        with torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext():
            velocity = self.net(x_t, timestep=1000 * t, class_labels=labels).sample
            loss = F.mse_loss(velocity.float(), x_1 - x_0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())
        return loss.item()


def enter_peers(data: Data, model: ModelConfig, batch_size: int, device: torch.device) -> list[Entry]:
    """Return the peer with its images in memory, and the peer that reads JPEG files."""
    memory, loader = Peer(model, device), Peer(model, device)
    workers = 8 if device.type == "cuda" else min(2, cores())
    parameters = sum(p.numel() for p in memory.net.parameters())

    @contextmanager
    def memory_turn(_: int) -> Iterator[Step]:
        def step() -> float:
            chosen = torch.randint(len(data.images), (batch_size,), device=device)
            x_1 = data.images[chosen].float() / 127.5 - 1
            flipped = torch.rand(batch_size, device=device) < 0.5
            x_1 = torch.where(flipped.view(-1, 1, 1, 1), x_1.flip(-1), x_1)
            return memory.step(x_1, data.labels[chosen])

        yield step

    files = ImageFolder(
        str(data.folder),
        transforms.Compose(
            [
                transforms.Resize(model.image_size),
                transforms.CenterCrop(model.image_size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        ),
    )

    @contextmanager
    def loader_turn(steps: int) -> Iterator[Step]:
        # Each turn has workers of its own, so that they do not decode while others are measured. They never run out of
        # work in it: there is more to read than is asked for.
        count = (steps + workers * PREFETCH) * batch_size
        batches = iter(
            DataLoader(
                files,
                batch_size,
                sampler=RandomSampler(files, replacement=True, num_samples=count),
                num_workers=workers,
                prefetch_factor=PREFETCH,
                persistent_workers=True,
                pin_memory=device.type == "cuda",
            )
        )

        def step() -> float:
            x_1, labels = next(batches)
            return loader.step(x_1.to(device, non_blocking=True), labels.to(device, non_blocking=True))

        yield step

    return [
        Entry("peer_memory", batch_size, parameters, memory_turn),
        Entry("peer_dataloader", batch_size, parameters, loader_turn, reads_ahead=workers * PREFETCH),
    ]


def take_turns(
    entries: list[Entry], rounds: int, steps: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Let everybody take a step, and then turns. Returns the FLOP/s of matrix products in each round, ours and PyTorch's own.

    A variant of ours that fails is out, with its error kept; a peer that fails ends the benchmark.
    """
    resident: dict[str, float] = {}
    for entry in entries:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        _try(entry, lambda entry=entry: _first_step(entry, device))
        resident[entry.name] = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    ours, default = [], []
    for _ in range(rounds):
        with fast_arithmetic(device):
            ours.append(matmul_peak(device, dtype))
        for entry in entries:
            if entry.error is None:
                _try(entry, lambda entry=entry: _turn(entry, steps, device))
        default.append(matmul_peak(device, dtype))
    return ours, default


def _try(entry: Entry, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception as error:
        if not isinstance(entry, Variant):
            raise
        lines = str(error).splitlines() or [""]
        entry.error = f"{type(error).__name__}: {without_paths(lines[0])[:300]}"


def _first_step(entry: Entry, device: torch.device) -> None:
    with entry.turn(1) as step:
        started = time.perf_counter()
        loss = float(step())
        synchronize(device)
        entry.first_step_seconds = time.perf_counter() - started
    entry.first_loss = _finite(loss, entry)


def _turn(entry: Entry, steps: int, device: torch.device) -> None:
    warm_up = WARM_UP + entry.reads_ahead
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
    with entry.turn(warm_up + steps) as step:
        for _ in range(warm_up):
            step()
        synchronize(device)
        started = time.perf_counter()
        losses = [step() for _ in range(steps)]
        synchronize(device)
        seconds = time.perf_counter() - started
    entry.rates.append(steps * entry.batch_size / seconds)
    entry.last_loss = _finite(statistics.mean(map(float, losses)), entry)
    if device.type == "cuda":
        entry.peak_memory_mb = (torch.cuda.max_memory_allocated() - others) / 2**20


def _finite(loss: float, entry: Entry) -> float:
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss of {entry.name} is {loss}")
    return loss


def seconds_of_a_grid(run: Run, folder: Path, quick: bool) -> float:
    """Return how long the grid takes that training draws now and then; with `quick`, a fortieth of it, times forty."""
    with fast_arithmetic(run.device):
        started = time.perf_counter()
        if quick:  # a quarter of the images, one of ten steps
            config = run.net.config
            labels = torch.arange(config.num_classes)
            settings = SampleConfig(sampler="heun", steps=1)
            sample(run.net, labels, config.image_size, config.num_classes, settings, run.device)
        else:
            loop.draw_sheet(run, folder)
        synchronize(run.device)
    return (time.perf_counter() - started) * (40 if quick else 1)


def seconds_of_a_checkpoint(run: Run, folder: Path) -> float:
    """Return how long a checkpoint takes until it is on the disk that holds temporary files."""
    started = time.perf_counter()
    state.save_checkpoint(run, RunFolder(folder), {})
    return time.perf_counter() - started


def host_syncs(run: Run) -> int | None:
    """Return how often a step of ours waits for the GPU, which should be never; None on a CPU."""
    if run.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profile(run: Run, steps: int) -> str:
    """Return torch.profiler's table of the operations that take longest in a training step."""
    on_gpu = run.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with fast_arithmetic(run.device):
        training_step(run)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                training_step(run)
            synchronize(run.device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
