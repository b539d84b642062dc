"""Training of the generator: AdamW, mixed precision, EMA, and checkpoints from which the same command goes on.

Everything random in a step is a function of (seed, step), so a checkpoint needs no state of any random generator.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tinycats_core import distributed, threads
from tinycats_core.checkpoint import read_header, read_safetensors, save_generator
from tinycats_core.config import ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data import load_split
from tinycats_core.device import (
    PRECISIONS,
    fast_arithmetic,
    has_compiler,
    is_out_of_memory,
    name_of,
    pick_device,
    pick_precision,
)
from tinycats_core.errors import ComputeError, TrainingError
from tinycats_core.files import check_writable, sha256_of, write_atomically
from tinycats_core.flow_matching import flow_matching_loss, sample_timesteps
from tinycats_core.grids import contact_sheet
from tinycats_core.model import TinyDiT
from tinycats_core.records import Checkpoint, Dataset
from tinycats_core.run_folder import FREE, RunFolder, find_checkpoint, require_same
from tinycats_core.sampling import sample, to_model_space
from tinycats_core.signals import stop_signals

logger = logging.getLogger("tinycats.training")

VERSION = 3  # of the recipe below: bump it when the same configuration trains other weights
RAW = "raw.safetensors"
COMPILE_PAYS_AFTER = 2_000  # steps; compiling takes about a minute
OnLog = Callable[[dict[str, Any]], None]


def train(
    dataset: Dataset,
    model: ModelConfig,
    train: TrainConfig,
    folder: Path,
    device: str = "auto",
    on_log: OnLog | None = None,
    processes: int = 1,
) -> Checkpoint:
    """Train a generator, or go on where the folder's last checkpoint stands, and return its EMA weights.

    The folder gets `ema.safetensors` (of the first decay), `ema-<decay>.safetensors` (of the others, the record's
    `averages`), `raw.safetensors` (the last weights, no average of them), `log.jsonl` (a line a log interval),
    `diary.jsonl` (each start, stop and incident), `checkpoints/` (the last five) and `samples/` (a grid from the EMA every
    `sample_every` steps). A finished folder is returned as it is; one of fewer steps goes on.

    Args:
        on_log: called with each row of the log: step, steps, loss, lr, images_per_s, grad_norm, skipped, device_memory_mb.
        processes: how many devices of this machine share the batch (`distributed.start`).

    Raises:
        CheckpointError: the folder or `resume_from` belongs to another architecture, configuration or data set, or
            `resume_from` does not exist.
        TrainingError: the loss is not finite, memory or disk do not suffice, or another process trains in the folder.
    """
    folder = Path(folder)
    check_writable(folder)
    identity = {
        "recipe": VERSION,
        "model": model.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "dataset": dataset.content,
    }
    run_folder, finished = RunFolder(folder), weight_paths(folder, train)
    if all(path.is_file() and read_header(path, "generator")["step"] == train.steps for path in finished):
        for path in finished:
            read_safetensors(path, "generator")  # a damaged file is an error, not a result
        run_folder.claim(identity)
        return _record(folder, train)
    if processes > 1:
        distributed.start(dataset, model, train, folder, device, processes, on_log)
        return _record(folder, train)
    with run_folder.hold() if distributed.rank() == 0 else nullcontext(), fast_arithmetic(pick_device(device)):
        return _train_here(dataset, model, train, run_folder, identity, pick_device(device), on_log)


def _train_here(
    dataset: Dataset,
    model: ModelConfig,
    train: TrainConfig,
    folder: RunFolder,
    identity: dict[str, Any],
    device: torch.device,
    on_log: OnLog | None,
) -> Checkpoint:
    leads = distributed.rank() == 0
    if leads:
        folder.claim(identity)
    run = Run.start(dataset, model, train, device)
    source = _resume(run, folder, identity)
    distributed.largest(0)  # the others have read the checkpoints before this one writes any
    if leads:
        folder.open_attempt(run.step, source, run.facts() | (found := threads.facts()))
        if device.type == "cpu" and (said := threads.warning(found)):
            logger.warning("%s", said)
        folder.cut_log(run.step)
    first, since, noted = run.step, time.perf_counter(), False
    try:
        with stop_signals() as stop, tqdm(total=train.steps, initial=run.step, unit="step", disable=None if leads else True) as bar:
            _fit_into_memory(run, folder)
            _loop(run, folder, identity, stop, bar, on_log if leads else None)
            if stop and leads:  # before the signal is delivered again, which may end the process
                noted = True
                folder.note("stop", run.step, cause=signal.Signals(stop["signal"]).name, **_spent(run, first, since))
        if run.step < train.steps:  # a signal came, and whoever handles it here let the program go on
            raise TrainingError(f"stopped at step {run.step} of {train.steps}; run the same command to go on")
        if leads:
            with _writing(run, folder):
                save_weights(run, folder.path)
    except BaseException as error:
        if leads and not noted:
            folder.note("stop", run.step, cause=str(error) or type(error).__name__, **_spent(run, first, since))
        raise
    if leads:
        folder.close(run.step, train.batch_size, run.step - first, time.perf_counter() - since, run.facts())
    distributed.largest(0)
    return _record(folder.path, train)


@dataclass
class Interval:
    """What the steps since the last row of the log have left behind."""

    losses: list[Tensor] = field(default_factory=list)  # on the device: reading one waits for it
    norms: list[Tensor] = field(default_factory=list)
    checked: int = 0  # how many of them were found finite
    steps: int = 0  # taken by this process
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Run:
    """Everything that changes while training, and the data it reads."""

    config: TrainConfig
    net: TinyDiT
    step_net: Callable[..., Tensor]  # the network as it is called in a step: compiled, or shared between ranks
    weights: dict[str, Tensor]  # of `net`, sharing its memory
    emas: dict[float, dict[str, Tensor]]  # for each decay
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None
    device: torch.device
    images: Tensor  # uint8 (N, 3, S, S), on the device
    labels: Tensor  # int64 (N,), on the device
    classes: tuple[str, ...]
    dataset: str
    micro_batch: int  # images that go through the network at a time
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    interval: Interval = field(default_factory=Interval)

    @classmethod
    def start(cls, dataset: Dataset, model: ModelConfig, config: TrainConfig, device: torch.device) -> "Run":
        images, labels = load_split(dataset, "train")
        if len(dataset.classes) != model.num_classes:
            raise TrainingError(
                f"the data set has {len(dataset.classes)} classes but model.num_classes is {model.num_classes}; make them equal"
            )
        return cls.from_images(images, labels, dataset.classes, model, config, device, dataset.content)

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        model: ModelConfig,
        config: TrainConfig,
        device: torch.device,
        dataset: str = "",
    ) -> "Run":
        """Return a run at step 0 over images uint8 (N, 3, S, S) and labels int64 (N,)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = TinyDiT(model)
        net = net.to(device).train()
        net.gradient_checkpointing = config.gradient_checkpointing
        autocast = pick_precision(config.precision, device)
        weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
        optimizer = make_optimizer(net, config)
        for parameter in net.parameters():  # made now, so that no later step needs more memory than the first one
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        step_net = net if distributed.ranks() == 1 else DistributedDataParallel(net, broadcast_buffers=False)
        share = -(-config.batch_size // distributed.ranks())
        return cls(
            config=config,
            net=net,
            step_net=torch.compile(step_net, mode=mode) if (mode := compile_mode(config, device)) else step_net,
            weights=weights,
            emas={decay: {name: tensor.clone() for name, tensor in weights.items()} for decay in config.ema_decays},
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=autocast == torch.float16),
            autocast=autocast,
            device=device,
            images=images.to(device),
            labels=labels.to(device),
            classes=classes,
            dataset=dataset,
            micro_batch=-(-share // config.accumulation),
        )

    def facts(self) -> dict[str, Any]:
        """Return where and how this runs, for the diary."""
        return {
            "device": name_of(self.device),
            "processes": distributed.ranks(),
            "precision": PRECISIONS[self.autocast],
            "torch": torch.__version__.split("+")[0],
        }


def _loop(run: Run, folder: RunFolder, identity: dict[str, Any], stop: dict[str, int], bar: tqdm, on_log: OnLog | None) -> None:
    """Step until `steps` are done or a signal asks to stop: log, draw and keep checkpoints on the way."""
    config, leads = run.config, distributed.rank() == 0
    while run.step < config.steps:
        try:
            if number := distributed.largest(stop.get("signal", 0)):
                stop.setdefault("signal", number)  # it may have reached another rank
                break
            _step_within_memory(run, folder)
        except distributed.RankLost:
            _save_last_words(run, folder, identity)
            raise
        bar.update()
        log, save, draw = (
            run.step == config.steps or run.step % every == 0
            for every in (config.log_every, config.checkpoint_every, config.sample_every)
        )
        if log or save or draw:
            _count_skipped(run, folder)
        if log:
            _log(run, folder, bar, on_log)
        if draw and leads:
            with _writing(run, folder):
                _draw(run, folder.path)
        if save and leads:
            save_checkpoint(run, folder, identity)
    if stop and leads:
        _count_skipped(run, folder)
        save_checkpoint(run, folder, identity)
        name = signal.Signals(stop["signal"]).name
        logger.warning("%s: stopped at step %d with a checkpoint; run the same command to go on", name, run.step)


def training_step(run: Run) -> tuple[Tensor, Tensor]:
    """Take one optimizer step over the effective batch. Returns loss and gradient norm as scalars on the device.

    Nothing here waits for a GPU. A step whose loss or gradient is not finite changes neither weights nor moments.
    """
    config, step = run.config, run.step
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    batch = draw_batch(run.images, run.labels, config, run.net.config.num_classes, step)
    share = config.batch_size // distributed.ranks()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    parts = list(zip(*(tensor[mine].split(run.micro_batch) for tensor in batch), strict=True))
    total = torch.zeros((), device=run.device)
    for number, (x_1, x_0, t, labels) in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last or distributed.ranks() == 1 else run.step_net.no_sync():  # pyright: ignore
            with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
                loss = flow_matching_loss(run.step_net, x_1, x_0, t, labels, run.net.config.prediction)
            weight = len(x_1) / share
            run.scaler.scale(loss * weight).backward()
        total += loss.detach() * weight
    distributed.average(total)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), config.clip).detach()
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)  # leaves a step out whose gradient overflowed, and lowers its scale
    else:
        bad = ~(total.isfinite() & norm.isfinite())
        run.optimizer.found_inf = bad.float()  # pyright: ignore  # how GradScaler tells a fused optimizer
        run.optimizer.step()
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    for decay, ema in run.emas.items():
        update_ema(ema, run.weights, ema_decay(decay, step))
    run.step += 1
    return total, norm


def _step_within_memory(run: Run, folder: RunFolder) -> None:
    """Take a step; where memory does not suffice, take it again with half as many images at a time."""
    while (done := _try_step(run)) is None:
        _halve_micro_batch(run, folder)
    run.interval.losses.append(done[0])
    run.interval.norms.append(done[1])
    run.interval.steps += 1


def _try_step(run: Run) -> tuple[Tensor, Tensor] | None:
    """Return what `training_step` does, or None where memory did not suffice."""
    try:
        return training_step(run)
    except RuntimeError as error:
        short = is_out_of_memory(error)
        if distributed.is_connection_lost(error):
            raise distributed.RankLost(f"another rank is gone ({str(error).splitlines()[0]})") from None
        if short and distributed.ranks() > 1:  # the others wait for this rank's gradients, so it cannot take the step again
            raise _too_little_memory(run, run.config.accumulation * 2) from None
        if not short:
            raise
    return None


def _fit_into_memory(run: Run, folder: RunFolder) -> None:
    """Find, before several ranks start, how many images at a time fit into the memory of each of them."""
    if distributed.ranks() == 1:
        return
    while not _fits(run):
        _halve_micro_batch(run, folder if distributed.rank() == 0 else None)
    run.micro_batch = -distributed.largest(-run.micro_batch)


def _fits(run: Run) -> bool:
    size, channels = run.net.config.image_size, 3
    try:
        with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            x = torch.zeros(run.micro_batch, channels, size, size, device=run.device)
            numbers = torch.zeros(run.micro_batch, device=run.device)
            run.net(x, numbers, numbers.long()).float().square().mean().backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        run.optimizer.zero_grad(set_to_none=True)
    return True


def _halve_micro_batch(run: Run, folder: RunFolder | None) -> None:
    """Halve what goes through the network at a time; the effective batch stays. Raises TrainingError at one image."""
    run.optimizer.zero_grad(set_to_none=True)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if run.micro_batch == 1:
        raise _too_little_memory(run, None)
    before, run.micro_batch = run.micro_batch, -(-run.micro_batch // 2)
    logger.warning(
        "out of memory at step %d with %d images at a time: going on with %d, the effective batch of %d stays",
        *(run.step, before, run.micro_batch, run.config.batch_size),
    )
    if folder is not None:
        folder.note("out_of_memory", run.step, images_at_a_time=run.micro_batch, before=before)


def _too_little_memory(run: Run, accumulation: int | None) -> TrainingError:
    advice = f"set train.accumulation to {accumulation}" if accumulation else "make the model or model.image_size smaller"
    return TrainingError(
        f"out of memory at step {run.step} with {run.micro_batch} image{'s' * (run.micro_batch > 1)} at a time; {advice}, or "
        "set train.gradient_checkpointing to true"
    )


def draw_batch(images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_1, x_0, t and labels of a step's effective batch, a function of (config.seed, step) alone.

    Shapes: (B, 3, S, S) twice, (B,), (B,). Images are flipped with probability one half where `flip` is set; a label is
    replaced by the null class with probability `label_dropout`.
    """
    device = images.device
    indices = batch_indices(len(images), config.batch_size, step, config.seed, device)
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


def batch_indices(count: int, batch_size: int, step: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which images a step sees, (batch_size,): each epoch is a permutation of its own, none is cut short."""
    position, end, parts = step * batch_size, (step + 1) * batch_size, []
    while position < end:
        epoch, first = divmod(position, count)
        parts.append(_permutation(count, epoch, seed, device)[first : first + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _permutation(count: int, epoch: int, seed: int, device: torch.device | str) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, 1))).to(device)


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
    averages, targets = list(ema.values()), [weights[name] for name in ema]
    torch._foreach_lerp_(averages, targets, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def make_optimizer(net: TinyDiT, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW, fused, with weight decay on matrices only (Loshchilov & Hutter, 1711.05101)."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def compile_mode(config: TrainConfig, device: torch.device) -> str | None:
    """Return the mode for `torch.compile`, None where the network runs as it is written.

    `auto` compiles on a GPU, for runs that are long enough to win back the minute that it takes.

    Raises:
        ComputeError: compiling was asked for, and there is no compiler.
    """
    ready = has_compiler(device)
    if config.compile == "auto":
        return "default" if device.type == "cuda" and ready and config.steps >= COMPILE_PAYS_AFTER else None
    if config.compile == "off":
        return None
    if not ready:
        raise ComputeError(f"train.compile is {config.compile!r}, which needs a C++ compiler here; install g++, or set it to 'off'")
    return config.compile


def save_checkpoint(run: Run, folder: RunFolder, identity: dict[str, Any]) -> Path:
    """Write everything that the run needs to go on; afterwards remove all but the last five. Raises TrainingError."""
    state = run.optimizer.state
    tensors = {f"net/{name}": tensor for name, tensor in run.weights.items()}
    for decay, ema in run.emas.items():
        tensors |= {f"ema/{decay}/{name}": tensor for name, tensor in ema.items()}
    for name, parameter in run.net.named_parameters():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state[parameter].items()}
    for name, values in (("losses", run.interval.losses), ("norms", run.interval.norms)):
        tensors[f"interval/{name}"] = torch.stack(values) if values else torch.zeros(0)
    header = {
        "scaler": run.scaler.state_dict(),
        "micro_batch": run.micro_batch * distributed.ranks(),
        "skipped": run.skipped,
        "identity": identity,
    }
    return folder.keep(run.step, tensors, header)


def average_paths(folder: Path, config: TrainConfig) -> dict[float, Path]:
    """Return where the EMA weights of each decay lie in a training's folder."""
    first, *others = config.ema_decays
    return {first: folder / "ema.safetensors", **{decay: folder / f"ema-{decay}.safetensors" for decay in others}}


def weight_paths(folder: Path, config: TrainConfig) -> list[Path]:
    """Return every weights file of a finished training: the averages', and that of the last weights."""
    return [*average_paths(folder, config).values(), folder / RAW]


def save_weights(run: Run, folder: Path) -> None:
    """Write the EMA weights of each decay, and the raw ones."""
    facts = {"images_seen": run.step * run.config.batch_size, "dataset": run.dataset}
    for decay, path in average_paths(folder, run.config).items():
        save_generator(path, run.emas[decay], run.net.config, run.classes, run.step, {"ema_decay": decay, **facts})
    save_generator(folder / RAW, run.weights, run.net.config, run.classes, run.step, {"ema_decay": None, **facts})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a training folder's log."""
    return RunFolder(folder).log()


def _record(folder: Path, config: TrainConfig) -> Checkpoint:
    def one(path: Path) -> Checkpoint:
        header = read_header(path, "generator")
        return Checkpoint(path=path, sha256=sha256_of(path), kind="generator", step=header["step"], facts=header["facts"])

    first, *averages, raw = map(one, weight_paths(folder, config))
    return first.model_copy(update={"averages": tuple(averages), "raw": raw})


def _count_skipped(run: Run, folder: RunFolder) -> None:
    """Look whether the steps since the last look were finite. Raises TrainingError when too many were not."""
    interval = run.interval
    if interval.checked == len(interval.losses):
        return
    losses, norms = torch.stack(interval.losses[interval.checked :]), torch.stack(interval.norms[interval.checked :])
    good = losses.isfinite()
    if not run.scaler.is_enabled():  # in fp16 a gradient overflows now and then, and the scaler sees to it
        good &= norms.isfinite()
    interval.checked = len(interval.losses)
    bad = [run.step - len(good) + 1 + number for number in (~good).nonzero().flatten().tolist()]
    if not bad:
        return
    run.skipped += len(bad)
    steps = f"step{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:5]))}{' …' * (len(bad) > 5)}"
    if distributed.rank() == 0:
        folder.note("skipped", run.step, steps=bad[:100], total=run.skipped)
    if run.skipped > run.config.max_skipped_steps:
        last = folder.last_good()
        raise TrainingError(
            f"the loss is not finite at {steps}; {run.skipped} such steps, train.max_skipped_steps allows "
            f"{run.config.max_skipped_steps}; the last good checkpoint is {last}. Lower train.lr or train.clip and start anew."
        )
    logger.warning("the loss is not finite at %s: left out, %d so far", steps, run.skipped)


def _log(run: Run, folder: RunFolder, bar: tqdm, on_log: OnLog | None) -> None:
    """Write a row of the log, show it, and begin a new interval."""
    row = _log_row(run)
    run.interval = Interval()
    if distributed.rank() > 0:
        return
    with _writing(run, folder):
        folder.append_to_log(row)
    bar.set_postfix_str(status(row))
    if bar.disable:
        logger.info("step %d/%d  %s", run.step, run.config.steps, status(row))
    if on_log:
        on_log(row)


def _log_row(run: Run) -> dict[str, Any]:
    interval = run.interval
    losses, norms = torch.stack(interval.losses), torch.stack(interval.norms)
    finite = losses.isfinite() & norms.isfinite()
    seconds = time.perf_counter() - interval.since
    return {
        "step": run.step,
        "steps": run.config.steps,
        "loss": float(losses[finite].mean()) if finite.any() else None,
        "lr": learning_rate(run.config, run.step - 1),
        "images_per_s": round(interval.steps * run.config.batch_size / seconds, 1),
        "grad_norm": float(norms[finite].mean()) if finite.any() else None,
        "skipped": run.skipped,
        "device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if run.device.type == "cuda" else None,
    }


def status(row: dict[str, Any]) -> str:
    """Return a row of the log in a few words."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return f"loss {loss}  lr {row['lr']:.1e}  {row['images_per_s']:.0f} images/s"


def _draw(run: Run, folder: Path) -> None:
    """Draw four images a class from the EMA, with the same noise every time."""
    with torch.random.fork_rng(devices=[]):
        model = TinyDiT(run.net.config)
    model.load_state_dict(run.emas[run.config.ema_decays[0]], assign=True)
    labels = torch.arange(model.config.num_classes).repeat_interleave(4)
    images = sample(
        model.eval(),
        labels,
        model.config.image_size,
        model.config.num_classes,
        SampleConfig(steps=10, batch_size=min(64, run.micro_batch)),
        run.device,
    )
    sheet = contact_sheet(images, labels, run.classes, per_class=4, scale=max(1, 64 // model.config.image_size))
    path = folder / "samples" / f"step-{run.step:08d}.png"
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _resume(run: Run, folder: RunFolder, identity: dict[str, Any]) -> str | None:
    """Put the newest readable checkpoint into the run, else the one of `resume_from`. Returns its name, None for a start."""
    leads = distributed.rank() == 0
    if (found := folder.newest(tell=leads)) is not None:
        path, tensors, header = found
        require_same(
            header["identity"], identity, f"{path} belongs to another run", f"Use another folder, or delete {folder.path}."
        )
    elif run.config.resume_from is not None:
        path = find_checkpoint(run.config.resume_from)
        tensors, header = read_safetensors(path, "training")
        what, advice = f"train.resume_from is {path}, which belongs to another run", "Give one of this run, or leave it out."
        require_same(header["identity"], identity, what, advice, FREE | {"resume_from"})
    else:
        return None
    _restore(run, tensors, header)
    logger.info("resumed from %s at step %d of %d", path.name, run.step, run.config.steps)
    before = TrainConfig.model_validate(header["identity"]["train"])
    if before.steps < run.config.steps and leads:
        rates = [learning_rate(config, run.step) for config in (before, run.config)]
        rate = f"{rates[0]:.2e} in the shorter run's schedule and {rates[1]:.2e} in this one's"
        logger.warning(
            "lengthened from %d to %d steps: the learning rate after step %d is %s", before.steps, run.config.steps, run.step, rate
        )
        folder.note("lengthened", run.step, steps_before=before.steps, steps=run.config.steps, lr_before=rates[0], lr=rates[1])
    return path.name


def _restore(run: Run, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    run.net.load_state_dict(part("net/"))
    for decay, ema in run.emas.items():
        for name, tensor in part(f"ema/{decay}/").items():
            ema[name].copy_(tensor)
    for name, parameter in run.net.named_parameters():
        for key, value in run.optimizer.state[parameter].items():
            value.copy_(tensors[f"optimizer/{key}/{name}"])
    run.scaler.load_state_dict(header["scaler"])
    run.step, run.skipped = header["step"], header["skipped"]
    run.micro_batch = min(run.micro_batch, -(-header["micro_batch"] // distributed.ranks()))
    losses, norms = (list(tensors[f"interval/{name}"].to(run.device).unbind()) for name in ("losses", "norms"))
    run.interval = Interval(losses, norms, checked=len(losses))


def _save_last_words(run: Run, folder: RunFolder, identity: dict[str, Any]) -> None:
    """Write a checkpoint though another rank is gone: rank 0, or whichever takes its place first."""
    if run.device.type == "cuda":
        return  # the GPU may wait for the lost rank for ever; the last checkpoint stands
    try:
        with folder.hold() if distributed.rank() else nullcontext():
            save_checkpoint(run, folder, identity)
    except TrainingError as error:
        logger.warning("%s", error)


@contextmanager
def _writing(run: Run, folder: RunFolder) -> Iterator[None]:
    """Say which checkpoint is left when a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{folder.path} cannot be written at step {run.step}: {error.strerror or error}. Free space and run the same "
            f"command: it goes on from {folder.last_good()}."
        ) from None


def _spent(run: Run, first: int, since: float) -> dict[str, Any]:
    return {"steps": run.step - first, "seconds": round(time.perf_counter() - since, 3)}
