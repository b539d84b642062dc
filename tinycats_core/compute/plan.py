"""The plan of a release within a budget: the network, how it computes, and what the minutes go to. Nothing is measured here.

`SHAPES` is the table that decides; docs/training.md names the measurements behind it. What a person sets stays as set.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tinycats_core.compute.gpus import usd_per_second
from tinycats_core.config import BudgetConfig, ModelConfig, Part, ReleaseConfig, TrainConfig
from tinycats_core.errors import ConfigError
from tinycats_core.records import Dataset


class Shape(NamedTuple):
    """A network, how it is trained, and from how many images of training on it is the best one."""

    model: ModelConfig
    batch_size: int
    lr: float
    images: int


def _shape(size: int, patch: int, width: int, depth: int, batch_size: int, lr: float, images: int) -> Shape:
    model = ModelConfig(image_size=size, patch_size=patch, width=width, depth=depth, heads=6)
    return Shape(model, batch_size, lr, images)


SHAPES = (  # the cheapest first; the last one that gets its images is taken
    _shape(32, 8, 192, 4, 16, 2e-3, images=0),
    _shape(32, 4, 192, 4, 16, 2e-3, images=20_000),  # recipe.md: a draw at 11,000, clearly better at 33,000
    _shape(64, 8, 192, 4, 16, 2e-3, images=450_000),  # assumed: an hour of the row above, which costs as much for an image
    _shape(128, 16, 384, 12, 256, 1e-4, images=5_000_000),  # assumed: a tenth of the preset `standard`
)
MARGIN = 1.1  # another way of computing must be this much faster than fp32, eager, on all threads
COMPILE_FROM = 3600.0  # seconds of training on a CPU, below which compiling is not even measured: it takes one to two minutes
TRAINING = 0.6  # of a budget, before the data are known
PASSES = 1_500  # over the photos, if the configuration does not say: few photos are copied before that
WARM_UP = 50  # steps
LEAST_STEPS = 200  # of a training that is worth judging
JUDGING = 0.2  # of the time from the first step on: what the snapshots may take
SWEEP, FINAL = 0.15, 0.35  # of a budget: what choosing among averages and guidances may take, and the final figures
LEAST_IMAGES = 104  # of a measurement that a plan shrinks
LEGS = 10  # of a training, after each of which the rest is planned anew
LEAST_LEG = 10.0  # seconds
CLOSING = 30.0  # seconds: ONNX files, their checks and speed, the bundle; measured on two cores that train at REFERENCE
REFERENCE = 220.0  # images/s of the first of SHAPES in fp32, eager
REAL_IMAGES = 400  # of noise and the like, which the final figures are compared with
SHARES = "start and data", "training", "judging", "final figures and export"


class Speed(Part):
    """How fast a network trains in one way of computing."""

    model: ModelConfig
    batch_size: int
    precision: str
    compile: str = "off"
    threads: int
    images_per_s: float
    compile_seconds: float = 0.0

    def images_in(self, seconds: float) -> float:
        """Return how many images are seen in this time, of which compiling takes a part."""
        return max(0.0, seconds - self.compile_seconds) * self.images_per_s


class Speeds(Part):
    """What was measured on a machine."""

    rows: tuple[Speed, ...]  # in the order of the shapes; the first one of a shape is the plain way
    drawing: float  # seconds to draw an image, as a multiple of those to train on one
    features_per_s: float  # images/s of the feature extractor
    seconds: float  # that measuring took


class Pace(Part):
    """What the parts of a release take, in seconds: estimated first, then as they turn out to be."""

    step: float
    judging: float  # of a snapshot
    closing: float  # of everything after the last snapshot
    leg: float = 2.0  # to begin and end a leg


class Division(Part):
    """What the minutes of a budget go to. Seconds, in the order of SHARES."""

    seconds: tuple[float, float, float, float]
    steps: int  # that the training will have taken
    capped: bool  # whether the photos allow no more, so that the release ends early

    @property
    def total(self) -> float:
        """Seconds of the whole release."""
        return sum(self.seconds)


def by_hand(overrides: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the settings that a person gives, as `part.field`."""
    return frozenset(f"{part}.{field}" for part, fields in (overrides or {}).items() for field in fields)


def candidates(model: ModelConfig, train: TrainConfig, budget: BudgetConfig, hand: Collection[str]) -> tuple[Shape, ...]:
    """Return the networks that may be trained: the configured one if there is no budget or if a person sets any of it."""
    own = Shape(model, train.batch_size, train.lr, 0)
    if budget.minutes is None or any(name.startswith("model.") and name != "model.image_size" for name in hand):
        return (own,)
    fixed = {"data.image_size", "model.image_size"} & set(hand)
    shapes = [shape for shape in SHAPES if not fixed or shape.model.image_size == model.image_size]
    batch = {"batch_size": train.batch_size} if "train.batch_size" in hand else {}
    rate = {"lr": train.lr} if "train.lr" in hand else {}
    return tuple(shape._replace(**batch, **rate) for shape in shapes) or (own,)


def training_seconds(train: TrainConfig, budget: BudgetConfig, images_per_s: float) -> float:
    """Return about how long the training will take, before the data are known."""
    if budget.minutes is not None:
        return TRAINING * 60 * budget.minutes
    return train.steps * train.batch_size / images_per_s


def what_is_timed(train: TrainConfig) -> TrainConfig:
    """Return of a training's settings those that its speed depends on, for a key that nothing else changes."""
    names = ("steps", "batch_size", "lr", "precision", "compile")
    return TrainConfig().model_copy(update={name: getattr(train, name) for name in names})


def best_way(rows: Collection[Speed], seconds: float) -> Speed:
    """Return the way of computing that sees most images in a training of this length; the plain one if it is nearly as fast."""
    plain, *others = rows
    best = max(others, key=lambda row: row.images_in(seconds), default=plain)
    return best if best.images_in(seconds) > MARGIN * plain.images_in(seconds) else plain


def choose(shapes: Collection[Shape], rows: Collection[Speed], seconds: float) -> tuple[Shape, Speed]:
    """Return the last of the shapes that sees its images in this time, and how it computes; else the first one."""
    found = []
    for shape in shapes:
        own = [row for row in rows if row.model == shape.model and row.batch_size == shape.batch_size]
        if own and (way := best_way(own, seconds)) and (not found or way.images_in(seconds) >= shape.images):
            found.append((shape, way))
    return found[-1]


def settle(config: ReleaseConfig, speeds: Speeds, hand: Collection[str]) -> ReleaseConfig:
    """Return a configuration with what speed decides: how it computes, and within a budget the network."""
    shapes = candidates(config.model, config.train, config.budget, hand)
    shape, way = choose(shapes, speeds.rows, training_seconds(config.train, config.budget, speeds.rows[0].images_per_s))
    train: dict[str, Any] = {"precision": way.precision, "compile": way.compile}
    compute = {} if config.compute.threads or config.compute.device == "cuda" else {"threads": way.threads}
    if config.compute.processes > 1:
        compute = {}
    if config.budget.minutes is not None:
        train |= {"batch_size": shape.batch_size, "lr": shape.lr}
    size = {"image_size": shape.model.image_size}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=size),
            "model": config.model.model_copy(update=shape.model.model_dump(exclude={"num_classes"})),
            "train": config.train.model_copy(update=train),
            "compute": config.compute.model_copy(update=compute),
        }
    )


def fit(config: ReleaseConfig, speeds: Speeds, dataset: Dataset, hand: Collection[str]) -> ReleaseConfig:
    """Return a configuration whose training ends with the budget, and whose judging fits into it.

    The rate stays constant after its warm-up and the averages do what its decay would, so that a training may end at any step,
    and a larger budget continues what a smaller one has begun. `train.steps` is what the photos allow.
    """
    train, seconds = config.train, 60 * (config.budget.minutes or 0)
    most = train.steps if "train.steps" in hand else None
    passes = train.passes or PASSES
    allowed = max(LEAST_STEPS, math.ceil(passes * dataset.train_count / train.batch_size))
    steps = min(most or allowed, allowed) if train.passes else most or max(allowed, train.steps)
    set_train: dict[str, Any] = {"steps": steps}
    if "train.schedule" not in hand:
        set_train["schedule"] = "constant"
    if "train.warmup_steps" not in hand:
        set_train["warmup_steps"] = min(WARM_UP, steps)
    config = config.model_copy(update={"train": train.model_copy(update=set_train)})
    return _fit_judging(config, speeds, seconds, hand)


def _fit_judging(config: ReleaseConfig, speeds: Speeds, seconds: float, hand: Collection[str]) -> ReleaseConfig:
    image, classes = _judged_image(config, speeds), config.model.num_classes
    least = max(LEAST_IMAGES, 2 * classes, config.evaluate.neighbours + 1)
    samples, sweep, guidances = config.evaluate.samples, config.sample.sweep_images, config.sample.guidance
    if "evaluate.samples" not in hand:
        samples = max(min(samples, least), min(samples, int(FINAL * seconds / (2 * image))))
    if "sample.guidance" not in hand:
        trials = len(config.train.ema_decays) * len(config.sample.guidance_interval)
        guidances = guidances[: max(1, int(SWEEP * seconds / (trials * LEAST_IMAGES * image)))]
    if "sample.sweep_images" not in hand:
        trials = len(config.train.ema_decays) * len(config.sample.guidance_interval) * len(guidances)
        sweep = max(min(sweep, least), min(sweep, int(SWEEP * seconds / (trials * image))))
    return config.model_copy(
        update={
            "evaluate": config.evaluate.model_copy(update={"samples": samples}),
            "sample": config.sample.model_copy(update={"sweep_images": sweep, "guidance": guidances}),
        }
    )


def _judged_image(config: ReleaseConfig, speeds: Speeds) -> float:
    """Return the seconds that an image takes to be drawn and measured."""
    return speeds.drawing / plain_rate(config, speeds) + 1 / speeds.features_per_s


def plain_rate(config: ReleaseConfig, speeds: Speeds) -> float:
    """Return the images/s of the configured network's training, computed in the plain way."""
    return next(row for row in speeds.rows if _same(row.model, config.model)).images_per_s


def _same(one: ModelConfig, other: ModelConfig) -> bool:
    return one.model_dump(exclude={"num_classes"}) == other.model_dump(exclude={"num_classes"})


def real_seconds(speeds: Speeds, dataset: Dataset) -> float:
    """Return what it takes to extract the features of the real images, which is done before the first step, once."""
    return (dataset.train_count + dataset.val_count + dataset.test_count) / speeds.features_per_s


def first_pace(config: ReleaseConfig, speeds: Speeds) -> Pace:
    """Return what the parts should take by the measured speeds."""
    train, sample = config.train, config.sample
    way = next(
        row
        for row in speeds.rows
        if _same(row.model, config.model) and (row.precision, row.compile) == (train.precision, train.compile)
    )
    image = _judged_image(config, speeds)
    trials = len(train.ema_decays) * len(sample.candidates()) - 1
    slow = REFERENCE / speeds.rows[0].images_per_s if speeds.rows[0].model == SHAPES[0].model else 1.0
    closing = (trials * sample.sweep_images + 2 * config.evaluate.samples) * image + REAL_IMAGES / speeds.features_per_s
    return Pace(
        step=train.batch_size / way.images_per_s / config.compute.processes,
        judging=sample.sweep_images * image,
        closing=closing + CLOSING * max(1.0, slow),
    )


def divide(seconds: float, spent: float, done: int, most: int, pace: Pace) -> Division:
    """Divide a budget, some of which is spent and in which some steps are done. Raises nothing: see `require_enough`."""
    left = max(0.0, seconds - spent - pace.closing - pace.judging)
    legs = min(LEGS, left / LEAST_LEG) * pace.leg
    training = max(0.0, (1 - JUDGING) * left - legs)
    steps = min(most, done + int(training / pace.step))
    if capped := steps == most:
        training = (most - done) * pace.step
    judging = pace.judging + (JUDGING * training / (1 - JUDGING) if capped else JUDGING * left)
    return Division(seconds=(spent, training + legs, judging, pace.closing), steps=steps, capped=capped)


def require_enough(minutes: float, spent: float, pace: Pace) -> None:
    """Raise ConfigError if a budget leaves no time for a training that is worth judging."""
    training = LEAST_STEPS * pace.step
    least = spent + pace.closing + pace.judging + training / (1 - JUDGING) + pace.leg
    if 60 * minutes < least:
        raise ConfigError(
            f"budget.minutes is {minutes:g}, but a release of these photos takes at least {_up(least / 60)} on this machine as it "
            f"is now: {spent / 60:.1f} to start, {training / 60:.1f} for {LEAST_STEPS} steps and "
            f"{(least - spent - training) / 60:.1f} to judge and export; give at least {_up(least / 60)}"
        )


def next_stop(seconds: float, spent: float, done: int, most: int, pace: Pace) -> int:
    """Return the step that the training is to reach next, `done` if the time is over."""
    left = seconds - spent - pace.closing - pace.judging
    whole = max(LEAST_LEG, (seconds - pace.closing) / LEGS)
    leg = left if left < 1.5 * whole else whole
    if left < LEAST_LEG / 2 and done:
        return done
    return min(most, done + max(1, int((leg - pace.leg) / pace.step)))


def judges_now(judged: float, pace: Pace, since: float) -> bool:
    """Return whether a snapshot is judged: as soon as judging has taken no more than its share since the first step."""
    return judged + pace.judging <= JUDGING * (since + pace.judging)


def observed(pace: Pace, leg_seconds: float | None = None, steps: int = 0, judged_seconds: float | None = None) -> Pace:
    """Return a pace corrected by a leg that was trained, or by a snapshot that was judged.

    What comes after the training will be slower or faster as judging was: both draw and measure.
    """
    if leg_seconds is not None and steps:
        return pace.model_copy(update={"step": max(1e-6, (leg_seconds - pace.leg) / steps)})
    if judged_seconds is not None:
        ratio = judged_seconds / pace.judging
        return pace.model_copy(update={"judging": judged_seconds, "closing": pace.closing * ratio})
    return pace


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
