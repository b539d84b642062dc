"""The Monge Inception Distance (MIND): a sliced Wasserstein distance of two sets of features."""

from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = 1_000  # random projections, as in torch-fidelity
SCALE = 3  # times the number of features: α of 2605.06797
WIDTH = 1.96  # standard errors on either side of the value in a 95 % interval


class Sliced(NamedTuple):
    """The distance, its standard error, its 95 % interval, and its error over other generated images only."""

    value: float
    std: float
    low: float
    high: float
    drawn_std: float


def directions(width: int, seed: int, count: int = DIRECTIONS) -> Tensor:
    """Return random unit vectors, uniform on the sphere, as columns (width, count) in double precision."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def sliced_distance(generated: Tensor, real: Tensor, seed: int, labels: Tensor | None = None) -> Sliced:
    """Return the Monge Inception Distance (2605.06797) of features (N, D) and (M, D).

    The value is 3 D times the mean, over random unit directions, of the squared Wasserstein-2 distance of the projected features:
    torch-fidelity's formula. Each of these is exact, also for N ≠ M, where torch-fidelity drops images of the larger set. The
    distance is biased upwards like the Fréchet distance, with a bias of order 1/N + 1/M: compare values of equal counts, such
    as the floor.

    The errors come from the first-order expansion in the images' weights: the derivative is the Kantorovich potential, and
    its variance that of the central limit theorem (del Barrio and Loubes, 1705.01299). They agree with those of repeated sets,
    which the tests show, and cost no resampling. `drawn_std` is the part of the generated images: the error for comparing two
    models with the same real images.

    Args:
        labels: (N,) of the generated images, whose variance is then taken within their classes: a generator is always asked
            for the same number of each class.
    """
    columns = directions(generated.shape[1], seed)
    mine, theirs = (features.double() @ columns for features in (generated, real))
    (mine, order), (theirs, real_order) = mine.sort(0), theirs.sort(0)
    rows, real_rows, masses = _coupling(len(mine), len(theirs))
    apart = mine[rows] - theirs[real_rows]
    scale = SCALE * generated.shape[1]
    value = scale * (masses @ apart.square()).mean().item()
    drawn = scale**2 * _error(_influence(mine, order, apart, rows, masses), labels)
    other = scale**2 * _error(_influence(theirs, real_order, -apart, real_rows, masses), None)
    std = (drawn + other) ** 0.5
    return Sliced(value, std, max(value - WIDTH * std, 0.0), value + WIDTH * std, drawn**0.5)


def _coupling(count: int, other: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of sorted values that optimal transport couples in one dimension, by rank in each set, and their masses.

    The quantile functions are constant between the multiples of 1/count and of 1/other; in units of 1/(count · other) these
    are integers.
    """
    steps = torch.cat([torch.arange(count) * other, torch.arange(other) * count]).unique()
    masses = torch.diff(steps, append=torch.tensor([count * other])).double() / (count * other)
    return steps // other, steps // count, masses


def _influence(ordered: Tensor, order: Tensor, apart: Tensor, rows: Tensor, masses: Tensor) -> Tensor:
    """Return the derivative of the distance in each image's weight (N,), up to a constant.

    In one dimension the potential φ has the slope 2 (x - T(x)); T(x), the mean of what x is coupled with.
    """
    weighted = masses[:, None] * apart
    slopes = 2 * len(ordered) * torch.zeros_like(ordered).index_add_(0, rows, weighted)
    middles = (slopes[1:] + slopes[:-1]) / 2
    potentials = torch.cat([torch.zeros_like(slopes[:1]), (middles * ordered.diff(dim=0)).cumsum(0)])
    return torch.empty_like(potentials).scatter_(0, order, potentials).mean(1)


def _error(influence: Tensor, labels: Tensor | None) -> float:
    """Return the variance of the mean influence, within the classes of `labels` if they are given."""
    count = len(influence)
    if labels is None:
        return influence.var().item() / count
    groups = [influence[labels == label] for label in labels.unique()]
    return sum(len(group) * group.var().item() for group in groups if len(group) > 1) / count**2
