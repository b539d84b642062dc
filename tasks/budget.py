"""The budget: measure this machine, and decide by it how to compute and what the minutes go to."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from tasks import show
from tasks.cache import key_of, stage_code
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.compute import clock, costs, plan, speed
from tinycats_core.compute.clock import command_start
from tinycats_core.config import BudgetConfig, ComputeConfig, ModelConfig, ReleaseConfig, SampleConfig, TrainConfig
from tinycats_core.device import pick_device
from tinycats_core.files import home
from tinycats_core.records import Dataset


class Settled(NamedTuple):
    """A configuration in which it is settled how to compute, and what was measured for that; None if nothing was."""

    config: ReleaseConfig
    speeds: plan.Speeds | None


@stage(speed.measure)
def measure_speed(
    model: ModelConfig,
    train: TrainConfig,
    sample: SampleConfig,
    extractor: str | None,
    budget: BudgetConfig,
    compute: ComputeConfig,
    hand: list[str],
    machine: dict[str, Any],
) -> plan.Speeds:
    """Measure how fast this machine trains, draws and extracts features, once for each machine."""
    speeds = speed.measure(model, train, sample, extractor, budget, compute, hand)
    rows = pd.DataFrame([{**row.model.model_dump(), **row.model_dump(exclude={"model"})} for row in speeds.rows])
    show.table("speed", rows, f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}")
    return speeds


def settle(config: ReleaseConfig, overrides: Mapping[str, Any] | None) -> Settled:
    """Settle what the speed of a machine and a budget decide before the data are known: how to compute, and which network.

    Raises:
        ConfigError: the budget is in dollars, and no price or speed is known.
    """
    hand = plan.by_hand(overrides)
    if config.budget.dollars is not None:
        expected = costs.estimate(config.model, config.train, config.compute)
        config = plan.within_dollars(config, expected.images_per_s, hand)
        log().info("budget of $%g: %d steps, by the lower rate of: %s", config.budget.dollars, config.train.steps, expected.basis)
        return Settled(config, None)
    if not _needs_speed(config):
        return Settled(config, None)
    judge = config.evaluate.extractor if config.budget.minutes is not None else None
    timed, first = plan.what_is_timed(config.train), config.sample.candidates()[0]
    machine = speed.facts(config.compute)
    speeds = measure_speed(config.model, timed, first, judge, config.budget, config.compute, sorted(hand), machine)
    settled = plan.settle(config, speeds, hand)
    log().info("%s", "\n".join([f"measured in {speeds.seconds:.0f} s:", *map(_told, speeds.rows), _chosen(settled)]))
    return Settled(settled, speeds)


def _needs_speed(config: ReleaseConfig) -> bool:
    """Return whether there is anything to decide. Without a budget, a GPU has its own precision, and compiles by `auto`."""
    if config.budget.minutes is not None:
        return True
    local = config.compute.where == "local" and config.compute.processes == 1
    automatic = "auto" in (config.train.precision, config.train.compile)
    return local and automatic and pick_device(config.compute.device).type == "cpu"


def start_clock(config: ReleaseConfig, dataset: Dataset) -> clock.Clock | None:
    """Return the clock of a release within a budget of minutes, None without one. A stopped release's clock continues."""
    if config.budget.minutes is None:
        return None
    key = key_of(stage_code("train_generator").core, dataset, config.model, config.train, config.sample, config.evaluate)
    return clock.Clock(home("training") / "budgets" / f"{key}-{config.budget.minutes:g}.json", clock.command_start())


def fit(config: ReleaseConfig, dataset: Dataset, speeds: plan.Speeds, overrides: Mapping[str, Any] | None) -> ReleaseConfig:
    """Return the configuration that a budget allows with these photos, and log it. Raises ConfigError if it is too small."""
    fitted, minutes = plan.fit(config, speeds, dataset, plan.by_hand(overrides)), config.budget.minutes or 0
    pace, spent = plan.first_pace(fitted, speeds), time.monotonic() - command_start()
    real = plan.real_seconds(speeds, dataset)
    plan.require_enough(minutes, spent + real, pace)
    division = plan.divide(60 * minutes, spent + real, 0, fitted.train.steps, pace)
    log().info("%s", plan.told(minutes, division, fitted))
    return fitted


def _told(row: plan.Speed) -> str:
    compiled = f", compiled in {row.compile_seconds:.0f} s" if row.compile_seconds else ""
    way = f"{row.precision}, {row.threads} threads{compiled}"
    return f"  {_network(row.model, row.batch_size)}, {way}: {costs.figure(row.images_per_s)} images/s"


def _chosen(config: ReleaseConfig) -> str:
    compiled = "" if config.train.compile == "off" else ", compiled"
    return f"chosen: {_network(config.model, config.train.batch_size)}, {config.train.precision}{compiled}"


def _network(model: ModelConfig, batch_size: int) -> str:
    shape = f"{model.image_size} px, patches of {model.patch_size}, width {model.width}, depth {model.depth}"
    return f"{shape}, batches of {batch_size}"
