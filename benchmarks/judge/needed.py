"""How many images KID and MIND need to tell a worse model from a better one."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = (2, 4, 8, 16, 32, 64, 128)  # images of each class in a set
FOUND = 0.95  # share of the pairs in which a metric has to find the worse model
SUBSETS = 100


def images_needed(
    good: "Tensor", worse: "Tensor", labels: "Tensor", real: "Tensor", tolerance: float, pairs: int
) -> dict[str, Any]:
    """Return how often KID and MIND call a model worse than a better one, by the number of images of each, and how many they need.

    The rule is that of the term `not_worse`: worse by more than `tolerance` standard errors of the difference. Two sets of the
    better model give the share of false alarms.

    Args:
        good, worse: features of images of both models, (N, D).
        labels: (N,) of both.
        real: features of the test images, (M, D).
    """
    from tinycats_core.evaluation.distances import kernel_distance
    from tinycats_core.evaluation.metrics import kid_subset
    from tinycats_core.evaluation.sliced import sliced_distance

    def kid(features: "Tensor", of: "Tensor") -> tuple[float, float]:
        found = kernel_distance(features, real, SUBSETS, kid_subset(len(features), len(real)), 0, of)
        return found.value, found.drawn_std

    def mind(features: "Tensor", of: "Tensor") -> tuple[float, float]:
        found = sliced_distance(features, real, 0, of)
        return found.value, found.drawn_std

    rows: list[dict[str, Any]] = []
    metrics = {"kid": kid, "mind": mind}
    for rounds in ROUNDS:
        hits = {name: _hits(metric, good, worse, labels, rounds, tolerance, pairs) for name, metric in metrics.items()}
        images = rounds * len(labels.unique())
        rows.append({"images": images, **{f"{name}_{key}": share for name, of in hits.items() for key, share in of.items()}})
        print(rows[-1], flush=True)
        if min(of["found"] for of in hits.values()) == 1:
            break
    kid_images, mind_images = (next((row["images"] for row in rows if row[f"{name}_found"] >= FOUND), None) for name in metrics)
    half = next((row["mind_found"] for row in rows if kid_images and row["images"] == kid_images // 2), None)
    return {"kid_images": kid_images, "mind_images": mind_images, "mind_found_at_half": half, "by_images": rows}


def _hits(
    metric: "Callable[[Tensor, Tensor], tuple[float, float]]",
    good: "Tensor",
    worse: "Tensor",
    labels: "Tensor",
    rounds: int,
    tolerance: float,
    pairs: int,
) -> dict[str, float]:
    """Return the shares of pairs in which a metric calls the worse model worse, and another set of the better model."""
    import torch

    generator, found, false = torch.Generator().manual_seed(rounds), 0, 0
    for _ in range(pairs):
        first, second = _balanced(labels, rounds, generator)
        (value, error), (other, other_error), (weak, weak_error) = (
            metric(features[chosen], labels[chosen]) for features, chosen in ((good, first), (good, second), (worse, second))
        )
        found += weak > value + tolerance * math.hypot(error, weak_error)
        false += other > value + tolerance * math.hypot(error, other_error)
    return {"found": found / pairs, "false": false / pairs}


def _balanced(labels: "Tensor", rounds: int, generator: Any) -> "tuple[Tensor, Tensor]":
    """Return the places of two sets that share no image, each with `rounds` images of each class."""
    import torch

    drawn = [torch.randperm(int((labels == label).sum()), generator=generator) for label in labels.unique()]
    places = [(labels == label).nonzero().flatten()[order] for label, order in zip(labels.unique(), drawn, strict=True)]
    return torch.cat([of[:rounds] for of in places]), torch.cat([of[rounds : 2 * rounds] for of in places])
