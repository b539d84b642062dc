"""What a training costs: an estimate before it, from a measured or an assumed rate, and the record after it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from tinycats_core.compute.budget import Spent
from tinycats_core.compute.gpus import GPUS, Price, charge, parse_gpu, usd_per_second
from tinycats_core.config import ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.device import PRECISIONS, fast_arithmetic, matmul_peak, name_of, pick_device, pick_precision
from tinycats_core.errors import ComputeError, TinycatsError
from tinycats_core.files import home, read_json, write_json
from tinycats_core.presets import PRESETS, resolve
from tinycats_core.training.run_folder import RunFolder

logger = logging.getLogger("tinycats.costs")

SHARE_OF_DATA_SHEET = (0.15, 0.40)  # assumed: what a training reaches of a GPU's data sheet
SHARE_OF_PRODUCTS = (0.10, 0.70)  # assumed: what a training reaches of the matrix products measured on the same device
LAUNCH_SECONDS = (0.0005, 0.002)  # assumed: what a GPU waits for the kernels of one block, forward and back, at any batch
MEASURED_SECONDS = 60.0  # a shorter training says little: most of it is starting up
SPREAD = 0.10  # of a measured rate, from one run to the next
HERE = "no dollars: trained on a machine of one's own"
Range = tuple[float, float]


@dataclass(frozen=True)
class Hardware:
    """What a generator is trained on. `gpu` is Modal's name, None for a machine of one's own."""

    gpu: str | None
    device: str | None  # "cpu", or "cuda: " and the GPU's name; unknown for a GPU of Modal before a training
    processes: int
    precision: str


@dataclass(frozen=True)
class Estimate:
    """What a training will take, from low to high. None is unknown; `basis` and `charge` say why."""

    steps: int
    batch_size: int
    place: Hardware
    images_per_s: Range | None
    hours: Range | None
    dollars: Range | None
    price: Price | None
    basis: str  # what the rate comes from
    charge: str  # what the dollars come from

    def __str__(self) -> str:
        time = f"{between(self.hours)} h at {between(self.images_per_s)} images/s" if self.hours else "hours not known"
        money = f"${between(self.dollars)}, {self.charge}" if self.dollars else self.charge
        return f"{self.steps:,} steps × {self.batch_size} images on {where(self.place)}: {time}, {self.basis}; {money}"


class Cost(BaseModel):
    """What a training took, as `cost.json` holds it."""

    model_config = ConfigDict(frozen=True)

    # what the rate depends on: two trainings that agree in all of it run at the same speed
    model: str  # the configuration's digest
    gpu: str | None
    device: str | None
    processes: int
    precision: str
    micro_batch: int
    gradient_checkpointing: bool
    compile: str
    # what it took
    gpus: int | None
    finished: str
    steps: int
    steps_run: int  # with those that were lost and run again
    images: int
    seconds: float
    hours: float
    images_per_s: float
    tflop_per_s: float
    attempts: int
    seconds_lost: float
    price: Price | None
    billed_seconds: float | None
    dollars: float | None
    charge: str
    estimate: dict[str, Any]  # the one that was made before the training


AnyRecord = TypeVar("AnyRecord", Cost, Spent)


def training_flops(model: ModelConfig) -> float:
    """Return the floating-point operations of training on one image: its matrix products, 2 for each multiply-add.

    The backward pass takes twice the forward pass: a gradient of the weights and one of the input. The patches and the
    time's features are no result of other layers, so their two products need the first one only. Norms, activations, the
    optimizer, and what is computed a second time (flash attention's scores, gradient checkpointing) are not counted.
    """
    width, numbers = model.width, 3 * model.patch_size**2
    tokens = (model.image_size // model.patch_size) ** 2
    weights = 3 * width**2 + width**2 + 8 * width**2  # of queries, keys and values, of the output, of the MLP
    attention = 2 * tokens * width  # of one token: scores, and the mix of values
    block = tokens * (weights + attention) + 6 * width**2  # and the modulation, once an image
    first = tokens * numbers * width + 256 * width  # patches and the time's features
    last = tokens * width * numbers + 2 * width**2  # the output and its modulation
    rest = width**2 + model.depth * block + last  # with the second layer of the time's embedding
    return 2.0 * (3 * rest + 2 * first)


def estimate(model: ModelConfig, train: TrainConfig, compute: ComputeConfig) -> Estimate:
    """Estimate what a training will take, from the rate of an earlier one like it, else by an assumed share of the device's peak.

    On a machine of one's own the peak is measured, in a few seconds, once a process.

    Raises:
        ComputeError: an unknown GPU, or a device or precision that is not available here.
    """
    hardware = find_hardware(train, compute)
    rate, basis = measured_rate(model, train, hardware) or _assumed_rate(model, train, hardware)
    images = train.steps * train.batch_size
    hours = (images / rate[1] / 3600, images / rate[0] / 3600) if rate else None
    price = GPUS[hardware.gpu].price if hardware.gpu else None
    hourly = _usd_per_hour(compute)
    dollars = (hourly * hours[0], hourly * hours[1]) if hourly and hours else None
    return Estimate(train.steps, train.batch_size, hardware, rate, hours, dollars, price, basis, _charge(compute))


def check_budget(before: Estimate, compute: ComputeConfig) -> None:
    """Raise ComputeError if a training will cost more than compute.max_cost_usd even at the low end of its estimate."""
    limit = compute.max_cost_usd
    if compute.where != "modal" or limit is None:
        return
    if before.dollars and before.dollars[0] > limit:
        raise ComputeError(
            f"compute.max_cost_usd is {limit:g} but the training will cost ${between(before.dollars)}, {before.basis}; "
            "give a higher one, or fewer train.steps"
        )
    if not before.dollars or before.dollars[1] > limit:
        logger.warning("compute.max_cost_usd is %g: the training may be stopped before it ends, at a checkpoint", limit)


def find_hardware(train: TrainConfig, compute: ComputeConfig) -> Hardware:
    """Return what a configuration trains on, with `auto` settled. Raises ComputeError."""
    if compute.where == "modal":
        gpu, count = parse_gpu(compute.gpu)
        device = "cpu" if compute.device == "cpu" else None
        automatic = "fp32" if device else gpu.native[0]
        return Hardware(gpu.name, device, count, automatic if train.precision == "auto" else train.precision)
    device = pick_device(compute.device)
    return Hardware(None, name_of(device), compute.processes, PRECISIONS[pick_precision(train.precision, device)])


def measured_rate(model: ModelConfig, train: TrainConfig, hardware: Hardware) -> tuple[Range, str] | None:
    """Return the images/s of the longest earlier training of this kind below `home()`, and words for it; None without one."""
    wanted = _kind(model, train, hardware)
    if hardware.device is None:
        del wanted["device"]  # on Modal the GPU's name there says it
    read = (_read(path, Cost) for path in sorted(home("training").glob("*/cost.json")))
    alike = [cost for cost in read if cost and all(getattr(cost, name) == value for name, value in wanted.items())]
    longest = max(alike, key=lambda cost: cost.seconds, default=None)
    if longest is None or longest.seconds < MEASURED_SECONDS:
        return None
    rate = longest.images_per_s
    basis = f"measured by the training that ended {longest.finished}: {figure(rate)} images/s, ±{SPREAD:.0%}"
    return (rate * (1 - SPREAD), rate * (1 + SPREAD)), basis


def record(folder: Path, model: ModelConfig, train: TrainConfig, compute: ComputeConfig, before: Estimate) -> Cost | None:
    """Write `cost.json` from the diary of a training folder and return it; None if the diary has no end of the training.

    Args:
        before: the estimate that was made before the training. If the folder is recorded again, the first one stays.
    """
    *_, end = RunFolder(folder).diary() or [{}]
    if end.get("event") != "finish":
        return None
    path, on_modal = folder / "cost.json", compute.where == "modal"
    spent = _read(folder / "meter.json", Spent) if on_modal else None
    paid = compute.model_copy(update={"gpu": spent.gpu}) if spent else compute
    gpu, count = parse_gpu(paid.gpu) if on_modal else (None, None)
    hardware = Hardware(gpu.name if gpu else None, end["device"], end["processes"], end["precision"])
    billed = sum(spent.attempts) if spent else end["seconds"]  # an attempt is metered from its very start to its end
    first = _read(path, Cost)
    cost = Cost(
        **_kind(model, train, hardware),
        gpus=count,
        finished=end["time"],
        steps=end["step"],
        steps_run=round(end["images"] / train.batch_size),
        **{name: end[name] for name in ("images", "seconds", "images_per_s", "attempts", "seconds_lost")},
        hours=end["seconds"] / 3600,
        tflop_per_s=end["images_per_s"] * training_flops(model) / 1e12,
        price=gpu.price if gpu else None,
        billed_seconds=billed if gpu else None,
        dollars=_charged(billed, paid, spent),
        charge=spent.charge if spent and spent.charge else _charge(paid),
        estimate=first.estimate if first else asdict(before),
    )
    write_json(path, cost.model_dump(mode="json"))
    return cost


def _charged(billed: float, compute: ComputeConfig, spent: Spent | None) -> float | None:
    """Return the dollars of all attempts: as metered, because they may have been on different GPUs, else by the price."""
    if spent and "usd" in spent.model_fields_set:
        return spent.usd
    hourly = _usd_per_hour(compute)
    return None if hourly is None else billed / 3600 * hourly


def account(cost: Cost) -> str:
    """Return in one line what a recorded training took."""
    tries = f"{cost.attempts} attempt{'s' if cost.attempts > 1 else ''}"
    if cost.steps_run > cost.steps:
        tries += f" with {cost.steps_run:,} steps for {cost.steps:,}"
    money = cost.charge if cost.dollars is None else f"${figure(cost.dollars)}, {cost.charge}"
    rate = figure(cost.images_per_s)
    return f"training took {figure(cost.hours)} h at {rate} images/s on {cost.gpu or cost.device}, {tries}: {money}"


def figure(value: float) -> str:
    """Write a number with three significant digits, and whole numbers in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def between(values: Range | None) -> str:
    """Write a range; a dash for one that is not known."""
    return f"{figure(values[0])} to {figure(values[1])}" if values else "–"


def where(hardware: Hardware) -> str:
    """Name the hardware as a person would: Modal's name with the number of GPUs, or the device."""
    name = hardware.gpu or hardware.device or ""
    return f"{name}:{hardware.processes}" if hardware.processes > 1 else name


def _kind(model: ModelConfig, train: TrainConfig, hardware: Hardware) -> dict[str, Any]:
    """Return the part of a `Cost` that a rate depends on."""
    return {
        "model": model.digest(),
        **asdict(hardware),
        "micro_batch": train.batch_size // train.accumulation,
        "gradient_checkpointing": train.gradient_checkpointing,
        "compile": train.compile,
    }


def _assumed_rate(model: ModelConfig, train: TrainConfig, hardware: Hardware) -> tuple[Range | None, str]:
    """Return the images/s of an assumed share of the peak, and words for it; None if no peak is known.

    On a GPU no step is faster than its kernels are launched, which is what small models and shares of a batch wait for.
    """
    if hardware.gpu:
        gpu = GPUS[hardware.gpu]
        if gpu.tflops is None or hardware.precision not in gpu.native or hardware.device == "cpu":
            return None, f"no training like it on {hardware.gpu} was measured, and no peak for {hardware.precision} is known"
        peak, shares = gpu.tflops * 1e12 * hardware.processes, SHARE_OF_DATA_SHEET
        what = f"the data sheet's {peak / 1e12:,.0f} TFLOP/s"
    else:
        peak, shares = _peak_here(str(hardware.device).partition(":")[0], hardware.precision), SHARE_OF_PRODUCTS
        what = f"the {peak / 1e12:.3g} TFLOP/s that matrix products reach here"
    again = 4 / 3 if train.gradient_checkpointing else 1.0  # the forward pass twice
    flops = training_flops(model) * again
    (low, high), (quick, slow) = shares, LAUNCH_SECONDS
    on_gpu = hardware.device != "cpu"
    blocks = model.depth * train.accumulation if on_gpu else 0
    longest = max(train.batch_size * flops / (low * peak), blocks * slow)  # seconds of a step
    shortest = max(train.batch_size * flops / (high * peak), blocks * quick)
    basis = f"{low:.0%} to {high:.0%} of {what}" + (f", {quick * 1e3:g} to {slow * 1e3:g} ms a block at least" if on_gpu else "")
    return (train.batch_size / longest, train.batch_size / shortest), f"assumed, not measured ({basis})"


@cache
def _peak_here(device: str, precision: str) -> float:
    types = {name: dtype or torch.float32 for dtype, name in PRECISIONS.items()}
    with fast_arithmetic(torch.device(device)):
        return matmul_peak(torch.device(device), types[precision])


def _usd_per_hour(compute: ComputeConfig) -> float | None:
    """Return what an hour of the container costs; None on a machine of one's own, and if no price is known."""
    rate = usd_per_second(compute) if compute.where == "modal" else None
    return None if rate is None else 3600 * rate


def _charge(compute: ComputeConfig) -> str:
    return charge(compute) if compute.where == "modal" else HERE


def _read(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Return the record in a file; None if there is none, or if it cannot be read, which is only worth a warning."""
    try:
        return kind.model_validate(read_json(path)) if path.is_file() else None
    except (TinycatsError, ValidationError) as error:
        logger.warning("%s", error if isinstance(error, TinycatsError) else f"{path} is not a record of this version")
        return None


def _row(preset: str, gpu: str | None, overrides: Mapping[str, Any]) -> list[str]:
    config = resolve(preset, overrides)
    compute = config.compute.model_copy(update={"where": "modal", "gpu": gpu}) if gpu else config.compute
    found = estimate(config.model, config.train, compute)
    return [
        preset,
        f"{found.steps:,} × {found.batch_size}",
        where(found.place),
        between(found.images_per_s),
        between(found.hours),
        between(found.dollars),
        f"{found.basis}; {found.charge}",
    ]


def cost_table(preset: str | None, gpu: str | None, overrides: Mapping[str, Any]) -> list[list[str]]:
    """Return what a training of a preset takes, of each of them for None: the heads, then a row a preset.

    Raises:
        TinycatsError: the preset, the GPU or a setting is unknown.
    """
    head = ["preset", "steps × batch", "on", "images/s", "hours", "dollars", "basis"]
    return [head, *(_row(name, gpu, overrides) for name in ([preset] if preset else PRESETS))]
