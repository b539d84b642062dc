"""The plan of a release within a budget: what the minutes go to. Nothing is measured here. What a person sets stays as set."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Self, TypeVar

from tinycats_core.compute.gpus import usd_per_second
from tinycats_core.compute.shapes import FIXED, REFERENCE, SHAPES, Speeds, chosen, same
from tinycats_core.config import Part, ReleaseConfig, TrainConfig
from tinycats_core.errors import ConfigError
from tinycats_core.records import Dataset

AnyPart = TypeVar("AnyPart", bound=Part)


PASSES = 1_500  # over the photos, if the configuration does not say: few photos are copied before that
WARM_UP = 50  # steps
LEAST_STEPS = 200  # of a training that is worth judging
JUDGING, SWEEP, FINAL = 0.2, 0.1, 0.25  # of the time that is left after FIXED and the real images
LEAST_IMAGES = 104  # of a measurement that a plan shrinks
LEGS = (3, 10)  # of a training, at least and at most: after each of them the rest is planned anew
LEAST_LEG = 5.0  # seconds
LEG = 2.0  # seconds: to read and write a checkpoint, and to load the judge
CLOSING = 30.0  # seconds: ONNX files, their checks and speed, the bundle; measured on two cores that train at REFERENCE
NOISE_IMAGES = 400  # which the final figures are compared with


class Pace(Part):
    """What the parts of a release take, in seconds: estimated first, then as they turn out to be."""

    step: float
    judging: float  # of a snapshot
    closing: float  # of everything after the last snapshot

    def observed(self, steps: int, training: float, judging: float) -> Self:
        """Return the pace corrected by a leg. What comes after the training is slower or faster as judging was.

        A leg that took less than half of what it should may have found its work done, so none counts for less.
        """
        ratio = max(0.5, judging / self.judging)
        step = max(self.step / 2, training / steps)
        return self.model_copy(update={"step": step, "judging": self.judging * ratio, "closing": self.closing * ratio})


def fit(config: ReleaseConfig, speeds: Speeds, dataset: Dataset, hand: Collection[str]) -> ReleaseConfig:
    """Return a configuration whose training may end at any step, and whose judging fits into its budget.

    The learning rate stays constant after its warm-up, and the averages do what its decay would. `train.steps` is what the
    photos allow; a clock decides where the training ends.
    """
    train = config.train
    allowed = max(LEAST_STEPS, math.ceil((train.passes or PASSES) * dataset.train_count / train.batch_size))
    steps = train.steps if "train.steps" in hand else allowed
    changes = {"steps": steps, "schedule": "constant", "warmup_steps": min(WARM_UP, steps)}
    config = config.model_copy(update={"train": _unless(hand, "train", train, changes)})
    return _fit_judging(config, speeds, dataset, hand)


def _fit_judging(config: ReleaseConfig, speeds: Speeds, dataset: Dataset, hand: Collection[str]) -> ReleaseConfig:
    seconds = max(0.0, 60 * (config.budget.minutes or 0) - FIXED - real_seconds(speeds, dataset))
    image, sample = judged_image(config, speeds), config.sample
    least = max(LEAST_IMAGES, 2 * config.model.num_classes, config.evaluate.neighbours + 1)
    averages = len(config.train.ema_decays) * len(sample.guidance_interval)

    def images(share: float, times: int, most: int) -> int:
        return max(min(most, least), min(most, int(share * seconds / (times * image))))

    guidances = sample.guidance[: max(1, int(SWEEP * seconds / (averages * least * image)))]
    sample = _unless(hand, "sample", sample, {"guidance": guidances})
    sweep = images(SWEEP, averages * len(sample.guidance), sample.sweep_images)
    sample = _unless(hand, "sample", sample, {"sweep_images": sweep})
    judging = sample.sweep_images * image + LEG
    snapshots = max(LEGS[0], min(LEGS[1], int(JUDGING * seconds / judging)))
    return config.model_copy(
        update={
            "train": _unless(hand, "train", config.train, {"snapshots": snapshots}),
            "evaluate": _unless(hand, "evaluate", config.evaluate, {"samples": images(FINAL, 2, config.evaluate.samples)}),
            "sample": sample,
        }
    )


def _unless(hand: Collection[str], name: str, part: AnyPart, changes: Mapping[str, Any]) -> AnyPart:
    """Return a part with those changes that a person has not decided otherwise."""
    return part.model_copy(update={field: value for field, value in changes.items() if f"{name}.{field}" not in hand})


def judged_image(config: ReleaseConfig, speeds: Speeds) -> float:
    """Return the seconds that an image takes to be drawn and measured."""
    plain = next(row for row in speeds.rows if same(row.model, config.model))
    return speeds.drawing / plain.images_per_s + 1 / speeds.features_per_s


def real_seconds(speeds: Speeds, dataset: Dataset) -> float:
    """Return what it takes to extract the features of the real images, which is done before the first step, once."""
    return (dataset.train_count + dataset.val_count + dataset.test_count) / speeds.features_per_s


def first_pace(config: ReleaseConfig, speeds: Speeds) -> Pace:
    """Return what the parts of a release should take by the measured speeds."""
    train, sample = config.train, config.sample
    ways = [row for row in speeds.rows if same(row.model, config.model) and row.batch_size == train.batch_size]
    used = (train.precision, train.compile, config.compute.threads or speeds.rows[0].threads)
    way = next(row for row in ways if (row.precision, row.compile, row.threads) == used)
    image = judged_image(config, speeds)
    trials = len(train.ema_decays) * len(sample.candidates()) - 1
    slower = max(1.0, REFERENCE / speeds.rows[0].images_per_s) if speeds.rows[0].model == SHAPES[0].model else 1.0
    drawn = trials * sample.sweep_images + 2 * config.evaluate.samples
    return Pace(
        step=train.batch_size / way.images_per_s / config.compute.processes,
        judging=sample.sweep_images * image + LEG,
        closing=drawn * image + NOISE_IMAGES / speeds.features_per_s + CLOSING * slower,
    )


def next_stop(left: float, done: int, most: int, legs: int, pace: Pace) -> int | None:
    """Return the step that a training is to reach next, None if it has ended.

    Args:
        left: seconds until the closing should begin.
        most: the last step that is allowed.
        legs: how many the rest of the training may have; all take the same time.
    """
    training = left / max(1, legs) - pace.judging
    if training < LEAST_LEG:  # fewer snapshots
        legs, training = min(1, legs), left - pace.judging
    if legs < 1 or done >= most or (done and training < LEAST_LEG):
        return None
    steps = max(1, int(training / pace.step))
    return done + min(steps, math.ceil((most - done) / legs))


def expected_steps(left: float, most: int, legs: int, pace: Pace) -> int:
    """Return how many steps a training should take."""
    return min(most, int((left - legs * pace.judging) / pace.step))


def require_enough(minutes: float, before: float, pace: Pace) -> None:
    """Raise ConfigError if a budget leaves no time for a training that is worth judging.

    Args:
        before: seconds until the first step.
    """
    least = before + LEAST_STEPS * pace.step + pace.judging + pace.closing
    if 60 * minutes < least:
        raise ConfigError(
            f"budget.minutes is {minutes:g}, but a release of these photos takes at least {_up(least / 60)} on this machine: "
            f"{before / 60:.1f} to start, {LEAST_STEPS * pace.step / 60:.1f} for {LEAST_STEPS} steps and "
            f"{(pace.judging + pace.closing) / 60:.1f} to judge and export; give at least {_up(least / 60)}"
        )


def told(config: ReleaseConfig, dataset: Dataset, before: float, pace: Pace, hand: Collection[str]) -> str:
    """Return a plan in words, for a person to read before the first step."""
    train, minutes = config.train, config.budget.minutes or 0
    legs = train.snapshots
    steps = expected_steps(60 * minutes - before - pace.closing, train.steps, legs, pace)
    parts = {
        "start, data and real images": before,
        "training": steps * pace.step,
        "judging snapshots": legs * pace.judging,
        "choice, final figures, export": pace.closing,
    }
    passes = steps * train.batch_size / dataset.train_count
    lines = [
        f"plan for {minutes:g} minutes with {dataset.train_count:,} training photos:",
        chosen(config),
        f"  training: about {steps:,} steps of {train.batch_size} images, {passes:,.0f} passes over the photos, at most "
        f"{train.steps:,} steps; the clock decides",
        f"  judging: {legs} snapshots with {config.sample.sweep_images} images each, guidance {list(config.sample.guidance)}, "
        f"final figures from {config.evaluate.samples} images",
        f"  minutes: {', '.join(f'{name} {seconds / 60:.1f}' for name, seconds in parts.items())}",
        f"  set by hand: {', '.join(sorted(hand)) or 'nothing'}",
    ]
    if steps == train.steps:
        lines.append("  the photos allow no more steps (train.passes), so the release ends early")
    return "\n".join(lines)


def within_dollars(config: ReleaseConfig, images_per_s: tuple[float, float] | None, hand: Collection[str]) -> ReleaseConfig:
    """Return a configuration for Modal whose training costs what the budget says, by the lower of two rates.

    Raises:
        ConfigError: no price or no speed of the GPU is known.
    """
    dollars, price = config.budget.dollars or 0.0, usd_per_second(config.compute)
    if price is None or images_per_s is None:
        what = "price" if price is None else "speed"
        raise ConfigError(
            f"budget.dollars is {dollars:g}, but no {what} of {config.compute.gpu} is known; give train.steps and "
            "compute.max_cost_usd instead, or another compute.gpu"
        )
    steps = int(dollars / price * images_per_s[0] / config.train.batch_size)
    if steps < LEAST_STEPS:
        least = LEAST_STEPS * config.train.batch_size / images_per_s[0] * price
        raise ConfigError(f"budget.dollars is {dollars:g}, but {LEAST_STEPS} steps cost about ${_up(least)}; give at least that")
    return _with_steps(config, steps, dollars, hand)


def _with_steps(config: ReleaseConfig, steps: int, dollars: float, hand: Collection[str]) -> ReleaseConfig:
    train: TrainConfig = config.train
    if "train.steps" not in hand:
        train = train.model_copy(update={"steps": steps, "warmup_steps": min(train.warmup_steps, steps // 10)})
    limit = config.compute.max_cost_usd
    compute = config.compute.model_copy(update={"max_cost_usd": dollars if limit is None else limit})
    return config.model_copy(update={"train": train, "compute": compute})


def _up(value: float) -> str:
    """Write a number with one digit after the point, rounded up."""
    return f"{math.ceil(10 * value) / 10:.1f}"
