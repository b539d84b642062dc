"""The metrics of a set of images beside real ones.

To add one: write its function, give it a line in METRICS, and say in `release/card_words.METRICS` what it means.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from tinycats_core.errors import EvaluationError
from tinycats_core.evaluation.dinov2 import LAYER as DINOV2
from tinycats_core.evaluation.distances import Moments, frechet, kernel_distance, neighbourhoods, patch_step
from tinycats_core.evaluation.memorization import altered_copies, authenticity, copies, spacing
from tinycats_core.evaluation.reference import WIDE, Judge, Reference, scatter
from tinycats_core.evaluation.sliced import sliced_distance

KID_SUBSET = 1_000
IS_SPLITS = 10
DETAILS = ("_low", "_high", "_drawn_std", "_infinite", f"_k{WIDE}")  # endings of metrics that say more about another one
Values = float | None | Mapping[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """A set of images and the real images that it is compared with: the input of every metric.

    Attributes:
        images, labels: uint8 (N, 3, S, S) and int64 (N,).
        features: of the images, by layer: each (N, D).
        kid_subset: images in a subset of KID.
        patch_size: of the network that drew the images; None if it has no patches.
        predictions: the class that the classifier predicts for each image, (N,); None without a classifier.
        asked: whether a generator was asked for these labels. KID is then resampled within the classes.
        whole: the comparison that this one is a part of, and a mask of its images.
    """

    judge: Judge
    real: Reference
    images: Tensor
    labels: Tensor
    features: Mapping[str, Tensor]
    kid_subset: int
    patch_size: int | None = None
    predictions: Tensor | None = None
    asked: bool = True
    whole: "tuple[Comparison, Tensor] | None" = None

    def only(self, chosen: Tensor, real: Reference, subset: int) -> "Comparison":
        """Return the comparison of the images at a mask (N,) with other real images."""
        return replace(
            self,
            real=real,
            images=self.images[chosen],
            labels=self.labels[chosen],
            features={name: layer[chosen] for name, layer in self.features.items()},
            predictions=None if self.predictions is None else self.predictions[chosen],
            kid_subset=subset,
            whole=(self, chosen),
        )

    @property
    def layer(self) -> Tensor:
        """The features that distances are measured in, (N, D)."""
        return self.features[self.judge.extractor.feature_layer]

    @property
    def real_layer(self) -> Tensor:
        """The same of the real images, (M, D)."""
        return self.real.features[self.judge.extractor.feature_layer]

    @cached_property
    def neighbourhoods(self) -> dict[int, dict[str, float]]:
        """Precision, recall, density and coverage for each number of neighbours."""
        return neighbourhoods(self.layer, self.real_layer, self.real.radii)

    @cached_property
    def altered_copies(self) -> Tensor:
        """Which images are copies of training images, also if altered, (N,)."""
        if self.whole:
            whole, chosen = self.whole
            return whole.altered_copies[chosen]
        device = self.judge.device
        return altered_copies(self.images.to(device), self.judge.images("train")[0].to(device)).cpu()


@dataclass(frozen=True)
class Metric:
    """A metric: its name, and the function that computes it.

    Attributes:
        name: may refer to the extractor. A function that returns several values returns them by the endings of their names.
        floor: the real images whose value is the floor. For most metrics these are training images; for a metric that
            compares with the training images or needs the classifier they are the test images.
        in_sweep: whether the sweep measures it too.
    """

    name: str
    compute: Callable[[Comparison], Values]
    floor: Literal["train", "test"] = "train"
    in_sweep: bool = False


def _frechet(of: Comparison) -> Values:
    distance = frechet(of.layer, of.real.moments, of.judge.config.seed)
    return {"": distance.value, "_infinite": distance.infinite}


def _frechet_dinov2(of: Comparison) -> Values:
    if not of.judge.dinov2:
        return {}
    distance = frechet(of.features[DINOV2], Moments.of(of.real.features[DINOV2]), of.judge.config.seed)
    return {"": distance.value, "_infinite": distance.infinite}


def _kernel(of: Comparison) -> Values:
    config, labels = of.judge.config, of.labels if of.asked else None
    kid = kernel_distance(of.layer, of.real_layer, config.kid_subsets, of.kid_subset, config.seed, labels)
    return {"": kid.value, "_std": kid.std, "_low": kid.low, "_high": kid.high, "_drawn_std": kid.drawn_std}


def _sliced(of: Comparison) -> Values:
    mind = sliced_distance(of.layer, of.real_layer, of.judge.config.seed, of.labels if of.asked else None)
    return {"": mind.value, "_std": mind.std, "_low": mind.low, "_high": mind.high, "_drawn_std": mind.drawn_std}


def _inception_score(of: Comparison) -> Values:
    from torch_fidelity.metric_isc import isc_features_to_metric

    if not (layer := of.judge.extractor.logit_layer):
        return None
    return float(isc_features_to_metric(of.features[layer], IS_SPLITS, rng_seed=of.judge.config.seed)["inception_score_mean"])


def _neighbourhood(statistic: str, neighbours: int | None = None) -> Callable[[Comparison], Values]:
    return lambda of: of.neighbourhoods[neighbours or of.judge.config.neighbours][statistic]


def _spread(of: Comparison) -> Values:
    return scatter(of.layer, of.labels) / of.real.scatter if of.real.scatter else None


def _distinct(of: Comparison) -> Values:
    return len({image.numpy().tobytes() for image in of.images}) / len(of.images)


def _patch_step(of: Comparison) -> Values:
    return patch_step(of.images, of.patch_size) if of.patch_size else None


def _copy_rate(of: Comparison) -> Values:
    train, device = of.judge.images("train")[0], of.judge.device
    return _share(copies(of.images.to(device), train.to(device))) if len(train) > 1 else None


def _altered_copy_rate(of: Comparison) -> Values:
    return _share(of.altered_copies) if of.judge.dataset.train_count > 2 else None


def _authenticity(of: Comparison) -> Values:
    judge = of.judge
    train = judge.features("train")[judge.extractor.feature_layer].to(judge.device)
    distances = judge.cached(lambda: ({"spacing": spacing(train)}, {}), "train", "spacing")[0]["spacing"]
    return authenticity(of.layer.to(judge.device), train, distances.to(judge.device))


def _share(found: Tensor) -> Values:
    """Return the share of True in a mask and its 95 % interval."""
    share = found.double().mean().item()
    low, high = share_interval(share, len(found))
    return {"": share, "_low": low, "_high": high}


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` images (Wilson, 1927), which holds for shares near 0 too."""
    squared = 1.96**2
    middle, reach = share + squared / (2 * count), 1.96 * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    low, high = ((middle + sign * reach) / (1 + squared / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _breed_accuracy(of: Comparison) -> Values:
    return {} if of.predictions is None else (of.predictions == of.labels).double().mean().item()


METRICS = (
    Metric("{extractor.frechet_name}", _frechet, in_sweep=True),
    Metric("kid_{extractor.name}", _kernel, in_sweep=True),
    Metric("mind_{extractor.name}", _sliced, in_sweep=True),
    Metric("fd_dinov2", _frechet_dinov2),
    Metric("is_{extractor.name}", _inception_score, in_sweep=True),
    Metric("precision", _neighbourhood("precision"), in_sweep=True),
    Metric("recall", _neighbourhood("recall"), in_sweep=True),
    Metric(f"precision_k{WIDE}", _neighbourhood("precision", WIDE), in_sweep=True),
    Metric(f"recall_k{WIDE}", _neighbourhood("recall", WIDE), in_sweep=True),
    Metric("density", _neighbourhood("density", WIDE), in_sweep=True),
    Metric("coverage", _neighbourhood("coverage", WIDE), in_sweep=True),
    Metric("spread", _spread),
    Metric("distinct", _distinct),
    Metric("patch_step", _patch_step),
    Metric("copy_rate", _copy_rate, floor="test", in_sweep=True),
    Metric("altered_copy_rate", _altered_copy_rate, floor="test", in_sweep=True),
    Metric("authenticity", _authenticity, floor="test"),
    Metric("breed_accuracy", _breed_accuracy, floor="test"),
)


def measure(images: Comparison, held_out: Comparison | None = None, sweep: bool = False) -> dict[str, float | None]:
    """Return the metrics of a set of images, by name and in the order of METRICS.

    Args:
        held_out: measured in place of `images` by the metrics whose floor is that of the test images.
        sweep: measure only what the sweep measures.
    """
    values: dict[str, float | None] = {}
    for metric in METRICS:
        if metric.in_sweep or not sweep:
            value = metric.compute(held_out if held_out and metric.floor == "test" else images)
            name = metric.name.format(extractor=images.judge.extractor)
            values |= {name + ending: part for ending, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return values


def kid_subset(*counts: int) -> int:
    """Return how many images a subset of KID has, for sets of these sizes."""
    return min(KID_SUBSET, min(counts) // 2)


def require_finite(metrics: Mapping[str, float | None], of: str) -> None:
    """Raise EvaluationError for a metric that is neither finite nor None."""
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            raise EvaluationError(f"{name} of {of} is {value}; it must be finite. Check the images and the extractor's weights.")


def torch_fidelity_version() -> str:
    """Return the version of torch-fidelity."""
    import torch_fidelity

    return torch_fidelity.__version__
