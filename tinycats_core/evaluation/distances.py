"""Distances between two sets of features.

What torch-fidelity has as well comes to the same value here (a test holds them together) in a fraction of the time: judging
may not cost more than looking. Products of matrix roots stand for its non-symmetric eigenvalues, and one kernel matrix
for all of its subsets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 2_048  # rows of a matrix of all pairs that are in memory at a time
STEPS = 128  # images whose steps are in memory at a time: few enough for a processor's cache
RESAMPLES = 200  # of the images, for an interval
FID_SIZES = 5  # of the subsets that a Fréchet distance is extrapolated from; 1911.07023 takes 15, at three times the cost


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and a root (R, D), R at most D, of the covariance: rootᵀ · root. In double precision."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Return the moments of features (N, D)."""
        features = features.double()
        mean = features.mean(0)
        root = (features - mean) / (len(features) - 1) ** 0.5
        return cls(mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root)


class Frechet(NamedTuple):
    """The Fréchet distance (FID), and the one that infinitely many generated images would have."""

    value: float
    infinite: float | None


def frechet(made: Tensor, real: Moments, seed: int) -> Frechet:
    """Return the Fréchet distance (1706.08500, eq. 6) of features (N, D) from real ones of these moments.

    Its bias falls with 1/N: a line through the distances of random subsets, from half of the images to all, is followed to
    0 (Chong and Forsyth, 1911.07023). The real images stay as they are. None where half of the images are fewer than the
    features: the line is none there. Sums over a subset are those over all less those over the images that it leaves out.
    """
    features, centre, root = made.double().numpy(), real.mean.numpy(), real.root.numpy()
    mean, count = features.mean(0), len(features)
    features = features - mean
    product, squares, own = features @ root.T, np.square(features).sum(), np.square(root).sum()
    gram = product @ product.T if count < len(root) else product.T @ product
    value = _frechet(mean - centre, own + squares / (count - 1), gram / (count - 1))
    if count // 2 < features.shape[1]:
        return Frechet(value, None)
    generator = torch.Generator().manual_seed(seed)
    sizes, found = np.linspace(count // 2, count, FID_SIZES).astype(int), []
    for size in sizes[:-1]:
        without = torch.randperm(count, generator=generator)[size:].numpy()
        left, left_product = features[without], product[without]
        moved = left.sum(0) / -size  # its own mean, seen from that of all
        along = root @ moved
        spread = squares - np.square(left).sum() - size * np.square(moved).sum()
        shared = gram - left_product.T @ left_product - size * np.outer(along, along)
        found.append(_frechet(mean + moved - centre, own + spread / (size - 1), shared / (size - 1)))
    return Frechet(value, float(np.polyfit(1 / sizes, [*found, value], 1)[1]))


class Kernel(NamedTuple):
    """The kernel distance (KID), its standard error, its 95 % interval, and its error over other generated images alone."""

    value: float
    std: float
    low: float
    high: float
    drawn_std: float


def kernel_distance(
    made: Tensor,
    real: Tensor,
    subsets: int,
    subset_size: int,
    seed: int,
    labels: Tensor | None = None,
    resamples: int = RESAMPLES,
) -> Kernel:
    """Return the squared maximum mean discrepancy of features (N, D) and (M, D) under the cubic kernel (KID; 1801.01401).

    The value is the mean over random subsets, the same ones that torch-fidelity takes. Its errors and the percentile
    interval come from `resamples` resamples of both sets, `drawn_std` from resampling the generated images alone: two models
    that are held against the same real images differ by chance no more than that. An image that is drawn twice makes no
    pair with itself, which would add to the distance.

    Args:
        labels: (N,) of the generated images, which are resampled within their classes then: a generator is asked for as many
            of each class every time, and without it the shares of the classes would be most of the error.
    """
    order, counts = np.arange(len(made)), np.array([len(made)])
    if labels is not None:
        order, counts = labels.argsort(stable=True).numpy(), labels.unique(return_counts=True)[1].numpy()
    rng = np.random.RandomState(seed)
    chosen = [(rng.choice(len(made), subset_size, False), rng.choice(len(real), subset_size, False)) for _ in range(subsets)]
    places = np.repeat(counts.cumsum() - counts, counts) + rng.randint(0, np.repeat(counts, counts), (resamples, len(made)))
    mine = _weights([*(one for one, _ in chosen), *order[places]], len(made))
    theirs = _weights([*(one for _, one in chosen), *rng.randint(0, len(real), (resamples, len(real)))], len(real))
    made, real = made.float(), real.float()
    shift = _kernel(made.mean(0, keepdim=True), real.mean(0, keepdim=True), 0)  # changes nothing but the rounding
    within_made, within_real = _within(made, mine, shift), _within(real, theirs, shift)
    all_real, once = theirs.new_ones(1, len(real)), slice(subsets, None)
    across, across_all = _across(made, real, mine, torch.cat([theirs, all_real]), shift)
    distances = within_made + within_real - 2 * across
    of_drawn = within_made[once] - 2 * across_all[once]  # the rest is the same for all
    middle, error = distances[:subsets].mean().item(), distances[once].std().item()
    # The resamples scatter around the distance of all pairs, the value is that of subsets: the interval lies around it.
    low, high = torch.quantile(distances[once] - distances[once].mean() + middle, torch.tensor([0.025, 0.975]).double()).tolist()
    return Kernel(middle, error, low, high, of_drawn.std().item())


def radii(features: Tensor, neighbours: Sequence[int]) -> dict[int, Tensor]:
    """Return how far each image's features (N, D) lie from those of its k-th neighbour, (N,), for each k of `neighbours`."""
    nearest = [torch.cdist(batch, features).topk(max(neighbours) + 1, largest=False).values for batch in features.split(BLOCK)]
    return dict(zip(neighbours, torch.cat(nearest).T[list(neighbours)], strict=True))  # the 0th is the image itself


def neighbourhoods(made: Tensor, real: Tensor, theirs: Mapping[int, Tensor]) -> dict[int, dict[str, float]]:
    """Return precision, recall, density and coverage of features (N, D) against real ones (M, D), for each k of their `radii`.

    Precision and recall are those of 1904.06991, density and coverage those of Naeem et al. (2002.09797, eq. 3 and 4).
    """
    mine = radii(made, tuple(theirs))
    inside = {k: torch.zeros(2, dtype=torch.int64) for k in theirs}  # images among real ones; pairs of them
    reached = {k: torch.zeros(len(real), dtype=torch.bool) for k in theirs}
    nearest = torch.full((len(real),), torch.inf)
    for start in range(0, len(made), BLOCK):
        distances = torch.cdist(made[start : start + BLOCK], real)
        nearest = torch.minimum(nearest, distances.amin(0))
        for k in theirs:
            among = (distances <= theirs[k]).sum(1)
            inside[k] += torch.stack([(among > 0).sum(), among.sum()])
            reached[k] |= (distances <= mine[k][start : start + BLOCK, None]).any(0)
    return {
        k: {
            "precision": inside[k][0].item() / len(made),
            "recall": reached[k].double().mean().item(),
            "density": inside[k][1].item() / (k * len(made)),
            "coverage": (nearest <= theirs[k]).double().mean().item(),
        }
        for k in theirs
    }


def patch_step(images: Tensor, patch_size: int) -> float | None:
    """Return how much larger the step between two pixels is where two patches meet than inside one; 1 where no seam shows.

    Args:
        images: uint8 (N, 3, S, S).

    Returns:
        The mean absolute step across the patches' borders by that of all others; None where one of them does not exist,
        as with patches of one pixel, or is 0.
    """
    border = torch.arange(1, images.shape[-1]) % patch_size == 0
    sums = torch.zeros(len(border), dtype=torch.float64)
    for batch in images.split(STEPS):
        pixels = batch.float()
        for steps in (pixels.diff(dim=3), pixels.diff(dim=2).mT):
            sums += steps.abs_().sum((1, 2)).double().sum(0)
    at_border, elsewhere = sums[border], sums[~border]
    if not (len(at_border) and elsewhere.sum()):
        return None
    return (at_border.mean() / elsewhere.mean()).item()


def _frechet(apart: np.ndarray, traces: float, gram: np.ndarray) -> float:
    """Return the Fréchet distance, given the difference of the means (D,), the traces of both covariances together, and the
    Gram matrix of the product of their roots.

    The trace of the root of both covariances' product is the sum of the singular values of the product of their roots.
    """
    shared = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(np.square(apart).sum() + traces - 2 * shared)


def _weights(drawn: Iterable[np.ndarray], count: int) -> Tensor:
    """Return how often each of `count` images was drawn, a row (count,) for each draw."""
    return torch.from_numpy(np.stack([np.bincount(one, minlength=count) for one in drawn])).float()


def _kernel(left: Tensor, right: Tensor, shift: Tensor | float) -> Tensor:
    return (left @ right.T).div_(left.shape[1]).add_(1).pow_(3).sub_(shift)


def _within(features: Tensor, weights: Tensor, shift: Tensor) -> Tensor:
    """Return the mean kernel (W,) over the pairs of different images, under each row of weights (W, N)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        block = _kernel(features[rows], features, shift)
        block.diagonal(start).zero_()
        total += ((weights[:, rows] @ block) * weights).double().sum(1)
    weights = weights.double()
    return total / (weights.sum(1).square() - weights.square().sum(1))


def _across(made: Tensor, real: Tensor, mine: Tensor, theirs: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean kernel (W,) over the pairs of both sets: under rows of weights (W, N) and (W, M); and under the first and
    the last of the second."""
    total = torch.zeros(2, len(mine), dtype=torch.float64)
    for start in range(0, len(made), BLOCK):
        rows = slice(start, start + BLOCK)
        weighted = mine[:, rows] @ _kernel(made[rows], real, shift)
        total += torch.stack([(weighted * theirs[:-1]).double().sum(1), (weighted * theirs[-1]).double().sum(1)])
    masses = mine.double().sum(1)
    return total[0] / (masses * theirs[:-1].double().sum(1)), total[1] / (masses * theirs[-1].double().sum())
