"""Training of the generator: AdamW, mixed precision, EMA, and checkpoints from which the same command goes on.

Everything random in a step is a function of (seed, step), so a checkpoint needs no state of any random generator.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinycats_core.checkpoint import read_header, read_safetensors, save_generator, write_safetensors
from tinycats_core.config import ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data import load_split
from tinycats_core.errors import CheckpointError, ComputeError, TrainingError
from tinycats_core.files import check_writable, sha256_of, write_atomically, write_text
from tinycats_core.flow_matching import flow_matching_loss, sample_timesteps
from tinycats_core.grids import contact_sheet
from tinycats_core.model import TinyDiT
from tinycats_core.records import Checkpoint, Dataset
from tinycats_core.sampling import pick_device, sample, to_model_space

logger = logging.getLogger("tinycats.training")

CHECKPOINTS_KEPT = 5
SHIPPED = "ema.safetensors"
OnLog = Callable[[dict[str, Any]], None]


def train(
    dataset: Dataset,
    model: ModelConfig,
    train: TrainConfig,
    folder: Path,
    device: str = "auto",
    on_log: OnLog | None = None,
) -> Checkpoint:
    """Train a generator, or go on where the folder's last checkpoint stands, and return its EMA weights.

    The folder gets `ema.safetensors` (what is shipped), `log.jsonl` (a line a log interval), `checkpoints/` (the last
    five) and `samples/` (a grid from the EMA every `sample_every` steps). A finished folder is returned as it is.

    Args:
        on_log: called with each row of the log: step, steps, loss, lr, images_per_s, grad_norm, device_memory_mb.

    Raises:
        CheckpointError: the folder belongs to another architecture, configuration or data set.
        TrainingError: the loss is not finite, the device's memory does not suffice, or the disk is full.
    """
    check_writable(folder)
    identity = {
        "model": model.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "dataset": dataset.content,
    }
    shipped = folder / SHIPPED
    if shipped.is_file() and read_header(shipped, "generator")["step"] == train.steps:
        read_safetensors(shipped, "generator")  # a damaged file is an error, not a result
        _require_same(folder / "run.json", identity)
        return _record(shipped)
    _require_same(folder / "run.json", identity)
    run = Run.start(dataset, model, train, pick_device(device))
    _resume(run, folder, identity)
    with _stop_signals() as stop, tqdm(total=train.steps, initial=run.step, unit="step", disable=None) as bar:
        _loop(run, folder, identity, stop, bar, on_log)
    if run.step < train.steps:  # a signal came, and whoever handles it here let the program go on
        raise TrainingError(f"stopped at step {run.step} of {train.steps}; run the same command to go on")
    return save_shipped(run, shipped)


@dataclass
class Run:
    """Everything that changes while training, and the data it reads."""

    config: TrainConfig
    net: TinyDiT
    step_net: Callable[..., Tensor]  # the network as it is called in a step: compiled where asked for
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None
    device: torch.device
    images: Tensor  # uint8 (N, 3, S, S), on the device
    labels: Tensor  # int64 (N,), on the device
    classes: tuple[str, ...]
    dataset: str
    step: int = 0

    @classmethod
    def start(cls, dataset: Dataset, model: ModelConfig, config: TrainConfig, device: torch.device) -> "Run":
        images, labels = load_split(dataset, "train")
        if len(dataset.classes) != model.num_classes:
            raise TrainingError(
                f"the data set has {len(dataset.classes)} classes but model.num_classes is {model.num_classes}; make them equal"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = TinyDiT(model)
        net = net.to(device).train()
        net.gradient_checkpointing = config.gradient_checkpointing
        autocast = pick_precision(config.precision, device)
        return cls(
            config=config,
            net=net,
            step_net=torch.compile(net) if config.compile else net,
            ema={name: tensor.detach().clone() for name, tensor in net.state_dict().items()},
            optimizer=make_optimizer(net, config),
            scaler=torch.amp.GradScaler(device.type, enabled=autocast == torch.float16),
            autocast=autocast,
            device=device,
            images=images.to(device),
            labels=labels.to(device),
            classes=dataset.classes,
            dataset=dataset.content,
        )


def _loop(run: Run, folder: Path, identity: dict[str, Any], stop: dict[str, int], bar: tqdm, on_log: OnLog | None) -> None:
    """Step until `steps` are done or a signal asks to stop: log, draw and keep checkpoints on the way."""
    config = run.config
    losses: list[Tensor] = []  # on the device: reading them waits for it, so they are read once an interval
    norms: list[Tensor] = []
    since = time.perf_counter()
    while run.step < config.steps and "signal" not in stop:
        loss, norm = _guarded_step(run)
        losses.append(loss)
        norms.append(norm)
        bar.update()
        log, save, draw = (
            run.step == config.steps or run.step % every == 0
            for every in (config.log_every, config.checkpoint_every, config.sample_every)
        )
        if log or save or draw or "signal" in stop:
            _require_finite(losses, run.step, folder)
        if log:
            row = _log_row(run, losses, norms, time.perf_counter() - since)
            losses, norms, since = [], [], time.perf_counter()
            _append_line(folder / "log.jsonl", row)
            bar.set_postfix_str(_status(row))
            if bar.disable:
                logger.info("step %d/%d  %s", run.step, config.steps, _status(row))
            if on_log:
                on_log(row)
        if draw:
            _draw(run, folder)
        if save or "signal" in stop:
            save_checkpoint(run, folder, identity)
    if "signal" in stop:
        name = signal.Signals(stop["signal"]).name
        logger.warning("%s: stopped at step %d with a checkpoint; run the same command to go on", name, run.step)


def training_step(run: Run) -> tuple[Tensor, Tensor]:
    """Take one optimizer step over the effective batch. Returns loss and gradient norm as scalars on the device."""
    config, step = run.config, run.step
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    total = torch.zeros((), device=run.device)
    parts = draw_batch(run.images, run.labels, config, run.net.config.num_classes, step)
    for x_1, x_0, t, labels in zip(*(part.chunk(config.accumulation) for part in parts), strict=True):
        with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            loss = flow_matching_loss(run.step_net, x_1, x_0, t, labels, run.net.config.prediction)
        run.scaler.scale(loss / config.accumulation).backward()
        total += loss.detach() / config.accumulation
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), config.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    update_ema(run.ema, run.net.state_dict(), ema_decay(config.ema_decay, step))
    run.step += 1
    return total, norm.detach()


def draw_batch(images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_1, x_0, t and labels of a step's effective batch, a function of (config.seed, step) alone.

    Shapes: (B, 3, S, S) twice, (B,), (B,). Images are flipped with probability one half where `flip` is set; a label is
    replaced by the null class with probability `label_dropout`.
    """
    device = images.device
    indices = batch_indices(len(images), config.batch_size, step, config.seed).to(device)
    generator = torch.Generator(device).manual_seed(mix(config.seed, step))
    x_1 = to_model_space(images[indices])
    if config.flip:
        flipped = torch.rand(len(x_1), generator=generator, device=device) < 0.5
        x_1 = torch.where(flipped.view(-1, 1, 1, 1), x_1.flip(-1), x_1)
    dropped = torch.rand(len(x_1), generator=generator, device=device) < config.label_dropout
    kept = labels[indices].masked_fill(dropped, null)
    t = sample_timesteps(len(x_1), config.timesteps, config.timestep_mean, config.timestep_std, generator)
    x_0 = torch.randn(x_1.shape, generator=generator, device=device)
    return x_1, x_0, t, kept


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Return which images a step sees, (batch_size,): each epoch is a permutation of its own, none is cut short."""
    first = step * batch_size
    positions = range(first, first + batch_size)
    return torch.stack([_permutation(count, position // count, seed)[position % count] for position in positions])


@lru_cache(maxsize=4)
def _permutation(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, 1)))


def mix(*numbers: int) -> int:
    """Return a 63-bit seed that depends on every number and their order (SplitMix64's finaliser, folded)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of a step: it warms up as (1 + step) / (10 + step), so that short runs have a usable average."""
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Move the average towards the weights in place: ema ← decay · ema + (1 − decay) · weights."""
    averages, targets = list(ema.values()), [weights[name].detach() for name in ema]
    torch._foreach_lerp_(averages, targets, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def make_optimizer(net: TinyDiT, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW, fused, with weight decay on matrices only (Loshchilov & Hutter, 1711.05101)."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type, None for full precision. `auto`: bf16 where the GPU has it, else fp16; fp32 on a CPU.

    Raises:
        ComputeError: the precision is not to be had on this device.
    """
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return None
    if device.type == "cpu" and precision == "fp16":
        raise ComputeError("train.precision is 'fp16', which needs a GPU; on a CPU use 'auto', 'fp32' or 'bf16'")
    if precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.float16


def save_checkpoint(run: Run, folder: Path, identity: dict[str, Any]) -> Path:
    """Write everything that the run needs to go on; afterwards remove all but the last five. Raises TrainingError."""
    names = [name for name, _ in run.net.named_parameters()]
    state = run.optimizer.state
    tensors = {f"net/{name}": tensor for name, tensor in run.net.state_dict().items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in run.ema.items()}
    for name, parameter in zip(names, run.net.parameters(), strict=True):
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state[parameter].items()}
    header = {"kind": "training", "step": run.step, "scaler": run.scaler.state_dict(), "identity": identity}
    path = folder / "checkpoints" / f"step-{run.step:08d}.safetensors"
    try:
        write_safetensors(path, tensors, header)
    except (OSError, RuntimeError) as error:  # safetensors raises its own kind of error for a full disk
        last = next(iter(_checkpoints(folder)), None)
        raise TrainingError(
            f"the checkpoint of step {run.step} could not be written to {path.parent}: {error}. Free space and run "
            f"the same command: it goes on from {f'{last.name}' if last else 'the start'}."
        ) from None
    for old in _checkpoints(folder)[CHECKPOINTS_KEPT:]:
        old.unlink()
    return path


def save_shipped(run: Run, path: Path) -> Checkpoint:
    """Write the EMA weights as the file that is sampled, exported and published."""
    facts = {"ema_decay": run.config.ema_decay, "images_seen": run.step * run.config.batch_size, "dataset": run.dataset}
    return save_generator(path, run.ema, run.net.config, run.classes, run.step, facts)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a training folder's log."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _record(path: Path) -> Checkpoint:
    header = read_header(path, "generator")
    return Checkpoint(path=path, sha256=sha256_of(path), kind="generator", step=header["step"], facts=header["facts"])


def _guarded_step(run: Run) -> tuple[Tensor, Tensor]:
    try:
        return training_step(run)
    except torch.OutOfMemoryError:
        size, parts = run.config.batch_size, run.config.accumulation
        raise TrainingError(
            f"out of device memory at step {run.step} with {size // parts} images at a time; set train.accumulation to "
            f"{parts * 2} (the effective batch of {size} stays), or train.gradient_checkpointing to true"
        ) from None


def _require_finite(losses: list[Tensor], step: int, folder: Path) -> None:
    if not losses:
        return
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        bad = step - len(losses) + finite.index(False) + 1
        last = next(iter(_checkpoints(folder)), None)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TrainingError(f"the loss is not finite at step {bad}; {kept}. Lower train.lr or train.clip and start anew.")


def _log_row(run: Run, losses: list[Tensor], norms: list[Tensor], seconds: float) -> dict[str, Any]:
    on_gpu = run.device.type == "cuda"
    norm = float(torch.stack(norms).mean())
    return {
        "step": run.step,
        "steps": run.config.steps,
        "loss": float(torch.stack(losses).mean()),
        "lr": learning_rate(run.config, run.step - 1),
        "images_per_s": round(len(losses) * run.config.batch_size / seconds, 1),
        "grad_norm": norm if math.isfinite(norm) else None,  # fp16 may overflow in single steps, which are skipped
        "device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
    }


def _status(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['images_per_s']:.0f} images/s"


def _draw(run: Run, folder: Path) -> None:
    """Draw four images a class from the EMA, with the same noise every time."""
    model = TinyDiT(run.net.config).to(run.device).eval()
    model.load_state_dict(run.ema)
    labels = torch.arange(model.config.num_classes).repeat_interleave(4)
    images = sample(
        model,
        labels,
        model.config.image_size,
        model.config.num_classes,
        SampleConfig(sampler="heun", steps=10),
        run.device,
    )
    sheet = contact_sheet(images, labels, run.classes, per_class=4, scale=max(1, 64 // model.config.image_size))
    path = folder / "samples" / f"step-{run.step:08d}.png"
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _resume(run: Run, folder: Path, identity: dict[str, Any]) -> None:
    """Put the newest readable checkpoint into the run, and cut the log back to it."""
    for path in _checkpoints(folder):
        try:
            tensors, header = read_safetensors(path, "training")
        except CheckpointError as error:
            logger.warning("%s Using the one before.", error)
            continue
        if header["identity"] != identity:
            raise CheckpointError(f"{path} belongs to another run. Use another folder, or delete {folder}.")
        _restore(run, tensors, header)
        logger.info("resumed from %s at step %d of %d", path.name, run.step, run.config.steps)
        break
    rows = [row for row in read_log(folder) if row["step"] <= run.step]
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _restore(run: Run, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    run.net.load_state_dict(part("net/"))
    for name, tensor in part("ema/").items():
        run.ema[name].copy_(tensor)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        for name, tensor in part(f"optimizer/{key}/").items():
            run.optimizer.state[run.net.get_parameter(name)][key] = tensor.to(run.device)
    run.scaler.load_state_dict(header["scaler"])
    run.step = header["step"]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def _require_same(path: Path, identity: dict[str, Any]) -> None:
    """Keep what the folder is for in run.json; refuse a folder that is for something else."""
    if not path.is_file():
        write_text(path, json.dumps(identity, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    different = [
        f"{part}.{field} is {found[part].get(field)!r} there and {identity[part].get(field)!r} here"
        for part in ("model", "train")
        for field in identity[part].keys() | found[part].keys()
        if found[part].get(field) != identity[part].get(field)
    ]
    if found["dataset"] != identity["dataset"]:
        different.append(f"the data set is {found['dataset'][:12]} there and {identity['dataset'][:12]} here")
    if different:
        raise CheckpointError(f"{path.parent} holds another run: {'; '.join(sorted(different))}. Use another folder or delete it.")


def _append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


@contextmanager
def _stop_signals() -> Iterator[dict[str, int]]:
    """Turn SIGINT and SIGTERM into a request to stop after the step; deliver them again afterwards."""
    stop: dict[str, int] = {}
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only, and who runs it decides what they do
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        for number in handled:
            signal.signal(number, lambda number, frame: stop.setdefault("signal", number))
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "signal" in stop:
        signal.raise_signal(stop["signal"])
