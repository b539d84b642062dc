"""The budget: measure this machine, and decide by it how to compute and what the minutes go to."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from tasks import show
from tasks.cache import key_of, stage_code
from tasks.evaluation import judge_needs_classifier
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.compute import costs, plan, shapes, speed
from tinycats_core.compute.clock import Clock, command_start
from tinycats_core.config import BudgetConfig, ComputeConfig, EvaluateConfig, ModelConfig, ReleaseConfig, SampleConfig, TrainConfig
from tinycats_core.evaluation import sweep
from tinycats_core.files import home
from tinycats_core.records import Dataset


class Measured(NamedTuple):
    """The speeds of this machine, None if they decide nothing, and when the command began, by `time.monotonic`."""

    speeds: shapes.Speeds | None
    began: float


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
) -> shapes.Speeds:
    """Measure how fast this machine trains, draws and extracts features, once for each machine."""
    speeds = speed.measure(model, train, sample, extractor, budget, compute, hand)
    rows = pd.DataFrame([{**row.model.model_dump(), **row.model_dump(exclude={"model"})} for row in speeds.rows])
    show.table("speed", rows, f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}")
    return speeds


@stage(sweep.measure_real)
def measure_real(dataset: Dataset, config: EvaluateConfig, compute: ComputeConfig) -> float:
    """Extract the features of the real images, once, and measure how many a second."""
    return sweep.measure_real(dataset, config, None, home("evaluations"), compute.device)


def measure_and_choose(config: ReleaseConfig, overrides: Mapping[str, Any] | None) -> tuple[ReleaseConfig, Measured]:
    """Decide what does not depend on the photos: how to compute, and within a budget which network.

    Raises:
        ConfigError: the budget is in dollars, and no price or speed is known.
    """
    began, hand = command_start(), shapes.by_hand(overrides)
    if config.budget.dollars is not None:
        expected = costs.estimate(config.model, config.train, config.compute)
        config = plan.within_dollars(config, expected.images_per_s, hand)
        expected = costs.estimate(config.model, config.train, config.compute)
        log().info("budget of $%g, to train: %s", config.budget.dollars, expected)
        costs.check_budget(expected, config.compute)
        return config, Measured(None, began)
    if not speed.is_needed(config):
        return config, Measured(None, began)
    judge = config.evaluate.extractor if config.budget.minutes is not None else None
    timed, first, machine = shapes.what_is_timed(config.train), config.sample.candidates()[0], speed.facts(config.compute)
    speeds = measure_speed(config.model, timed, first, judge, config.budget, config.compute, sorted(hand), machine)
    config = shapes.settle(config, speeds, hand)
    log().info("%s", "\n".join([f"speed, measured in {speeds.seconds:.0f} s:", *map(str, speeds.rows), shapes.chosen(config)]))
    return config, Measured(speeds, began)


def plan_budget(
    config: ReleaseConfig, dataset: Dataset, measured: Measured, overrides: Mapping[str, Any] | None
) -> tuple[ReleaseConfig, Clock | None]:
    """Decide what the minutes of a budget go to with these photos, and start its clock; without a budget change nothing.

    The clock of a command that was stopped continues.

    Raises:
        ConfigError: the budget is too small for these photos.
    """
    minutes, speeds, hand = config.budget.minutes, measured.speeds, shapes.by_hand(overrides)
    if minutes is None or speeds is None:
        return config, None
    what = dataset, config.model, config.train, config.sample, config.evaluate, minutes
    clock = Clock(home("budgets") / f"{key_of(stage_code('train_generator').core, *what)}.json", minutes, measured.began)
    planned = plan.fit(config, speeds, dataset, hand)
    if not clock.known:
        before = clock.spent + plan.real_seconds(speeds, dataset)
        plan.require_enough(minutes, before, plan.first_pace(planned, speeds))
    if not judge_needs_classifier(config):
        with clock.running():
            seen = measure_real(dataset, config.evaluate, config.compute)
        speeds = speeds.model_copy(update={"features_per_s": min(seen, speeds.features_per_s)})
        planned = plan.fit(config, speeds, dataset, hand)
    pace = plan.first_pace(planned, speeds)
    if not clock.known:
        plan.require_enough(minutes, clock.spent, pace)
    log().info("%s", plan.told(planned, dataset, clock.spent, pace, hand))
    clock.expect(pace)
    return planned, clock
