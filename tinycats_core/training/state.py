"""The state of a training: what a checkpoint holds, how it is written and restored, and the weights that are left."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tinycats_core.config import OTHER, ModelConfig, TrainConfig
from tinycats_core.data.groups import members, require_other
from tinycats_core.data.splits import load_split
from tinycats_core.device import PRECISIONS, has_compiler, name_of, pick_precision
from tinycats_core.errors import ComputeError, TrainingError
from tinycats_core.files import sha256_of
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.weights import save_generator
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.tensors import read_header, read_safetensors
from tinycats_core.training import ranks
from tinycats_core.training.augmentation import LABELS, without_label_layer
from tinycats_core.training.base_weights import adopt
from tinycats_core.training.recipe import Groups, learning_rate, make_optimizer
from tinycats_core.training.run_folder import FREE, RunFolder, find_checkpoint, require_same

logger = logging.getLogger("tinycats.training")

RAW = "raw.safetensors"
COMPILE_PAYS_AFTER = 2_000  # steps; compiling takes about a minute


@dataclass
class LogWindow:
    """Losses and gradient norms of the steps since the last row of the log."""

    losses: list[Tensor] = field(default_factory=list)  # on the device: reading one waits for it
    norms: list[Tensor] = field(default_factory=list)
    checked: int = 0  # how many of them were checked
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
    groups: Groups | None  # on the device, if train.other_share is set
    classes: tuple[str, ...]
    dataset: str
    micro_batch: int  # images that go through the network at a time
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    window: LogWindow = field(default_factory=LogWindow)

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
            net = TinyDiT(model, LABELS[config.augmentation])
        if config.base:
            adopt(net, classes, config.base)
        net = net.to(device).train()
        net.gradient_checkpointing = config.gradient_checkpointing
        autocast = pick_precision(config.precision, device)
        weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
        optimizer = make_optimizer(net, config)
        _allocate_moments(optimizer, net)
        step_net = net if ranks.world_size() == 1 else DistributedDataParallel(net, broadcast_buffers=False)
        share = -(-config.batch_size // ranks.world_size())
        mode = compile_mode(config, device, ranks.world_size())
        return cls(
            config=config,
            net=net,
            step_net=torch.compile(step_net, mode=mode) if mode else step_net,
            weights=weights,
            emas={
                decay: {name: tensor.clone() for name, tensor in without_label_layer(weights).items()}
                for decay in config.ema_decays
            },
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=autocast == torch.float16),
            autocast=autocast,
            device=device,
            images=images.to(device),
            labels=labels.to(device),
            groups=_groups(labels, classes, config, device),
            classes=classes,
            dataset=dataset,
            micro_batch=-(-share // config.accumulation),
        )

    def facts(self) -> dict[str, Any]:
        """Return where and how this runs, for the diary."""
        return {
            "device": name_of(self.device),
            "processes": ranks.world_size(),
            "precision": PRECISIONS[self.autocast],
            "torch": torch.__version__.split("+")[0],
        }


def _groups(labels: Tensor, classes: tuple[str, ...], config: TrainConfig, device: torch.device) -> Groups | None:
    """Return the indices of the cats and of `other`; None if they are seen as they come. Raises ConfigError, TrainingError."""
    if config.other_share is None:
        return None
    require_other(classes, "train.other_share", config.other_share)
    other = members(labels, classes, OTHER)
    if not (other.any() and (~other).any()):
        raise TrainingError(
            f"train.other_share is {config.other_share:g}, but {int(other.sum())} of {len(labels)} training images are of the "
            f"class {OTHER!r}; both groups need images. Add some, or leave train.other_share out."
        )
    return (~other).nonzero().flatten().to(device), other.nonzero().flatten().to(device)


def _allocate_moments(optimizer: torch.optim.Optimizer, net: TinyDiT) -> None:
    """Allocate AdamW's moments now, so that no later step needs more memory than the first one."""
    for parameter in net.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def compile_mode(config: TrainConfig, device: torch.device, processes: int = 1) -> str | None:
    """Return the mode for `torch.compile`, None for no compilation.

    `auto` compiles on a GPU, for runs that are long enough to regain the minute that it takes.

    Raises:
        ComputeError: the configuration demands compilation, and there is no compiler.
    """
    ready = has_compiler(device)
    if config.compile == "auto":
        pays = device.type == "cuda" and ready and config.steps >= COMPILE_PAYS_AFTER
        return fastest_mode(device, processes) if pays else None
    if config.compile == "off":
        return None
    if not ready:
        raise ComputeError(f"train.compile is {config.compile!r}, which needs a C++ compiler here; install g++, or set it to 'off'")
    return config.compile


def fastest_mode(device: torch.device, processes: int) -> str:
    """Return the fastest mode of `torch.compile`: on one GPU with CUDA graphs, which several that exchange gradients rule out."""
    return "reduce-overhead" if device.type == "cuda" and processes == 1 else "default"


def save_checkpoint(run: Run, folder: RunFolder, identity: dict[str, Any]) -> Path:
    """Write everything that the run needs to resume, then remove all but the last five checkpoints. Raises TrainingError."""
    state = run.optimizer.state
    tensors = {f"net/{name}": tensor for name, tensor in run.weights.items()}
    for decay, ema in run.emas.items():
        tensors |= {f"ema/{decay}/{name}": tensor for name, tensor in ema.items()}
    for name, parameter in run.net.named_parameters():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state[parameter].items()}
    for name, values in (("losses", run.window.losses), ("norms", run.window.norms)):
        tensors[f"interval/{name}"] = torch.stack(values) if values else torch.zeros(0)
    header = {
        "scaler": run.scaler.state_dict(),
        "micro_batch": run.micro_batch * ranks.world_size(),
        "skipped": run.skipped,
        "identity": identity,
    }
    return folder.keep(run.step, tensors, header)


def average_paths(folder: Path, config: TrainConfig, step: int) -> dict[float, Path]:
    """Return the path of the EMA weights of each decay, as they are at a step, in a training's folder."""
    first, *others = config.ema_decays
    names = {first: "ema.safetensors", **{decay: f"ema-{decay}.safetensors" for decay in others}}
    return {decay: folder / _at(step, config, name) for decay, name in names.items()}


def raw_path(folder: Path, config: TrainConfig) -> Path:
    """Return the path of the last weights, without averaging."""
    return folder / _at(config.last_step, config, RAW)


def _at(step: int, config: TrainConfig, name: str) -> str:
    """Return the name of weights as they are at a step: only those of the whole training have no step in it."""
    return name if step == config.steps else f"step-{step:08d}-{name}"


def weight_paths(folder: Path, config: TrainConfig) -> dict[Path, int]:
    """Return the paths of all weights of a finished training, and the step of each.

    The averages come first, those of the last step before those of earlier snapshots, then the raw weights. A snapshot of
    before the step at which a run was lengthened, or resumed from another folder, is not there and is left out.
    """
    last, *earlier = reversed(config.snapshot_steps())
    kept = {path: step for step in earlier for path in average_paths(folder, config, step).values() if path.is_file()}
    return dict.fromkeys(average_paths(folder, config, last).values(), last) | kept | {raw_path(folder, config): last}


def save_averages(run: Run, folder: Path) -> None:
    """Write the EMA weights of each decay."""
    for decay, path in average_paths(folder, run.config, run.step).items():
        _save(run, path, run.emas[decay], decay)


def save_raw(run: Run, folder: Path) -> None:
    """Write the last weights, without averaging."""
    _save(run, raw_path(folder, run.config), without_label_layer(run.weights), None)


def _save(run: Run, path: Path, weights: dict[str, Tensor], decay: float | None) -> None:
    facts = {"ema_decay": decay, "images_seen": run.step * run.config.batch_size, "dataset": run.dataset}
    if run.config.base:
        facts["base"] = run.config.base.sha256
    save_generator(path, weights, run.net.config, run.classes, run.step, facts)


def record_of(folder: Path, config: TrainConfig) -> Trained:
    """Return the record of a finished training's weights."""

    def one(path: Path) -> Weights:
        header = read_header(path, "generator")
        return Weights(path=path, sha256=sha256_of(path), kind="generator", step=header["step"], facts=header["facts"])

    *averages, raw = map(one, weight_paths(folder, config))
    return Trained(averages=tuple(averages), raw=raw)


def resume(run: Run, folder: RunFolder, identity: dict[str, Any]) -> str | None:
    """Put the newest readable checkpoint into the run, else the one of `resume_from`. Returns its name, None for a start."""
    leads = ranks.rank() == 0
    if (found := folder.newest(run.config.last_step, tell=leads)) is not None:
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
    run.micro_batch = min(run.micro_batch, -(-header["micro_batch"] // ranks.world_size()))
    losses, norms = (list(tensors[f"interval/{name}"].to(run.device).unbind()) for name in ("losses", "norms"))
    run.window = LogWindow(losses, norms, checked=len(losses))
