"""How many images KID and MIND need to tell a worse model from a better one."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)  # of a set
FOUND = 0.95  # share of the pairs in which a metric has to find the worse model
SUBSETS = 100


def images_needed(good: "Tensor", worse: "Tensor", real: "Tensor", tolerance: float, pairs: int) -> dict[str, Any]:
    """Return how often KID and MIND call a model worse than a better one, by the number of images of each, and how many they need.

    The rule is that of the term `not_worse`: worse by more than `tolerance` standard errors of the difference. Two sets of the
    better model give the share of false alarms. The images of a set are drawn at random from those of all classes.

    Args:
        good, worse: features of images of both models, (N, D).
        real: features of the test images, (M, D).
    """
    from tinycats_core.evaluation.distances import kernel_distance
    from tinycats_core.evaluation.metrics import kid_subset
    from tinycats_core.evaluation.sliced import sliced_distance

    def kid(features: "Tensor") -> tuple[float, float]:
        found = kernel_distance(features, real, SUBSETS, kid_subset(len(features), len(real)), 0)
        return found.value, found.drawn_std

    def mind(features: "Tensor") -> tuple[float, float]:
        found = sliced_distance(features, real, 0)
        return found.value, found.drawn_std

    rows: list[dict[str, Any]] = []
    metrics = {"kid": kid, "mind": mind}
    for images in IMAGES:
        if 2 * images > len(good):
            break
        hits = {name: _hits(metric, good, worse, images, tolerance, pairs) for name, metric in metrics.items()}
        rows.append({"images": images, **{f"{name}_{key}": share for name, of in hits.items() for key, share in of.items()}})
        print(rows[-1], flush=True)
        if min(of["found"] for of in hits.values()) == 1:
            break
    kid_images, mind_images = (next((row["images"] for row in rows if row[f"{name}_found"] >= FOUND), None) for name in metrics)
    half = next((row["mind_found"] for row in rows if kid_images and row["images"] == kid_images // 2), None)
    return {"kid_images": kid_images, "mind_images": mind_images, "mind_found_at_half": half, "by_images": rows}


def _hits(
    metric: "Callable[[Tensor], tuple[float, float]]", good: "Tensor", worse: "Tensor", images: int, tolerance: float, pairs: int
) -> dict[str, float]:
    """Return the shares of pairs in which a metric calls the worse model worse, and another set of the better model."""
    import torch

    generator, found, false = torch.Generator().manual_seed(images), 0, 0
    for _ in range(pairs):
        first, second = torch.randperm(len(good), generator=generator)[: 2 * images].split(images)  # they share no image
        (value, error), (other, other_error), (weak, weak_error) = map(metric, (good[first], good[second], worse[second]))
        found += weak > value + tolerance * math.hypot(error, weak_error)
        false += other > value + tolerance * math.hypot(error, other_error)
    return {"found": found / pairs, "false": false / pairs}
