"""Which network to train, and how to compute, by measured speeds. Nothing is measured here.

`SHAPES` is the table that decides, with the measurements behind it. What a person sets stays as set.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tinycats_core.compute import costs
from tinycats_core.config import BudgetConfig, ModelConfig, Part, ReleaseConfig, TrainConfig


class Shape(NamedTuple):
    """A network, how it is trained, and from how many images of training on it is the best one."""

    model: ModelConfig
    batch_size: int
    lr: float
    images: int


def _shape(size: int, patch: int, width: int, depth: int, batch_size: int, lr: float, images: int) -> Shape:
    model = ModelConfig(image_size=size, patch_size=patch, width=width, depth=depth, heads=6)
    return Shape(model, batch_size, lr, images)


SHAPES = (  # the cheapest first; the last one that sees its images in the time for training is taken
    # python -m benchmarks.recipe --photos PHOTOS --steps 2000 (and 6000) base x-patch4: a draw at 11,000 images of patches of 4,
    # clearly better at 33,000 (benchmarks/results/recipe.json)
    _shape(32, 8, 192, 4, 16, 2e-3, images=0),
    _shape(32, 4, 192, 4, 16, 2e-3, images=20_000),
    # from how many images on is assumed: an hour of the row above on two cores, which costs as much for an image
    _shape(64, 8, 192, 4, 16, 2e-3, images=450_000),
    # python -m benchmarks.cats128 --photos PHOTOS: the best of its rows (benchmarks/results/cats128.json); the images are assumed
    _shape(128, 8, 384, 12, 64, 2e-3, images=5_000_000),
)
CPU_PRECISIONS = ("fp32", "bf16")  # python -m benchmarks.precision: the KID of bf16 is inside the interval of fp32's
PLANNED = ("data.image_size", "model.", "train.", "sample.", "evaluate.samples", "compute.threads")
MARGIN = 1.1  # another way of computing must be this much faster than fp32, eager, on all threads
COMPILE_FROM = 3600.0  # seconds of training on a CPU, below which compiling is not even measured: it takes one to two minutes
FIXED = 120.0  # seconds of a release in which nothing is trained, however small it is
TRAINING = 0.6  # of the rest, as long as the photos are not counted
REFERENCE = 220.0  # images/s of the first of SHAPES in fp32, eager


class Speed(Part):
    """How fast a network trains in one way of computing."""

    model: ModelConfig
    batch_size: int
    precision: str
    compile: str = "off"
    threads: int
    images_per_s: float
    compile_seconds: float = 0.0

    def __str__(self) -> str:
        compiled = f" in {self.compile_seconds:.0f} s" if self.compile_seconds else ""
        way = f"{self.precision}, {_compiled(self.compile)}{compiled}, {self.threads} threads"
        return f"  {words(self.model)}, batches of {self.batch_size}, {way}: {costs.figure(self.images_per_s)} images/s"

    def images_in(self, seconds: float) -> float:
        """Return how many images are seen in this time, of which compiling takes a part."""
        return max(0.0, seconds - self.compile_seconds) * self.images_per_s


class Speeds(Part):
    """What was measured on a machine."""

    rows: tuple[Speed, ...]  # in the order of the shapes; the first one of a shape is the plain way
    drawing: float  # seconds to draw an image, as a multiple of those to train on one
    features_per_s: float  # images/s of the feature extractor
    seconds: float  # that measuring took


def by_hand(overrides: Mapping[str, Any] | None) -> frozenset[str]:
    """Return those settings that a plan could decide and a person gives, as `part.field`."""
    given = {f"{part}.{field}" for part, fields in (overrides or {}).items() for field in fields}
    return frozenset(name for name in given if name.startswith(PLANNED))


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
        return TRAINING * max(0.0, 60 * budget.minutes - FIXED)
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
    compute = {"threads": way.threads} if way.threads != speeds.rows[0].threads else {}
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


def same(one: ModelConfig, other: ModelConfig) -> bool:
    return one.model_dump(exclude={"num_classes"}) == other.model_dump(exclude={"num_classes"})


def words(model: ModelConfig) -> str:
    """Return a network in words."""
    return f"{model.image_size} px, patches of {model.patch_size}, width {model.width}, depth {model.depth}"


def _compiled(mode: str) -> str:
    return "eager" if mode == "off" else f"compiled ({mode})"


def chosen(config: ReleaseConfig) -> str:
    """Return the chosen network and way of computing in words."""
    train, threads = config.train, config.compute.threads
    way = f"{train.precision}, {_compiled(train.compile)}{f', {threads} threads' if threads else ''}"
    return f"  chosen: {words(config.model)}, batches of {train.batch_size}, {way}"
