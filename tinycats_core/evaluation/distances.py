"""Distances between two sets of features.

Those that torch-fidelity has too are equal to its own (a test compares them) and take a fraction of the time: singular values of
a product of matrix roots replace its non-symmetric eigenvalues, and one kernel matrix serves all of its subsets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 2_048  # rows of the matrix of all pairs held in memory
STEPS = 128  # images whose pixel steps are held in memory: few enough for a processor's cache
RESAMPLES = 200  # of the images, for an interval
FID_SIZES = 5  # subset sizes for the extrapolated Fréchet distance; 1911.07023 takes 15, at three times the cost


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and root (R, D), R at most D, of the covariance rootᵀ · root, in double precision."""

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
    """The Fréchet distance (FID), and the distance extrapolated to infinitely many generated images."""

    value: float
    infinite: float | None


def frechet(generated: Tensor, real: Moments, seed: int) -> Frechet:
    """Return the Fréchet distance (1706.08500, eq. 6) between features (N, D) and real ones with these moments.

    Its bias falls with 1/N, so a line through the distances of random subsets, from half of the images to all, is extrapolated
    to 1/N = 0 (Chong and Forsyth, 1911.07023), with all real images. `infinite` is None if N/2 < D, where the bias is not
    linear. Sums over a subset are computed as those over all images minus those over the images it leaves out.
    """
    features, centre, root = generated.double().numpy(), real.mean.numpy(), real.root.numpy()
    mean, count = features.mean(0), len(features)
    features = features - mean
    product, squares, own = features @ root.T, np.square(features).sum(), np.square(root).sum()
    gram = product @ product.T if count < len(root) else product.T @ product
    value = _frechet(mean - centre, own + squares / (count - 1), gram / (count - 1))
    if count // 2 < features.shape[1]:
        return Frechet(value, None)
    generator = torch.Generator().manual_seed(seed)
    sizes, distances = np.linspace(count // 2, count, FID_SIZES).astype(int), []
    for size in sizes[:-1]:
        without = torch.randperm(count, generator=generator)[size:].numpy()
        left, left_product = features[without], product[without]
        moved = left.sum(0) / -size  # the mean of the subset minus that of all
        along = root @ moved
        spread = squares - np.square(left).sum() - size * np.square(moved).sum()
        shared = gram - left_product.T @ left_product - size * np.outer(along, along)
        distances.append(_frechet(mean + moved - centre, own + spread / (size - 1), shared / (size - 1)))
    return Frechet(value, float(np.polyfit(1 / sizes, [*distances, value], 1)[1]))


class Kernel(NamedTuple):
    """The kernel distance (KID), its standard error, its 95 % interval, and its error over other generated images only."""

    value: float
    std: float
    low: float
    high: float
    drawn_std: float


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    subsets: int,
    subset_size: int,
    seed: int,
    labels: Tensor | None = None,
    resamples: int = RESAMPLES,
) -> Kernel:
    """Return the squared maximum mean discrepancy of features (N, D) and (M, D) under the cubic kernel (KID; 1801.01401).

    The value is the mean over random subsets, the same as torch-fidelity's. Its errors and the percentile interval come from
    `resamples` resamples of both sets. `drawn_std` comes from resampling the generated images only: it is the error for
    comparing two models with the same real images. An image drawn twice does not form a pair with itself, which would
    bias the distance.

    Args:
        labels: (N,) of the generated images, which are then resampled within their classes: a generator is always asked for
            the same number of each class, and otherwise the shares of the classes would be most of the error.
    """
    order, counts = np.arange(len(generated)), np.array([len(generated)])
    if labels is not None:
        order, counts = labels.argsort(stable=True).numpy(), labels.unique(return_counts=True)[1].numpy()
    rng = np.random.RandomState(seed)
    chosen = [(rng.choice(len(generated), subset_size, False), rng.choice(len(real), subset_size, False)) for _ in range(subsets)]
    starts = np.repeat(counts.cumsum() - counts, counts)
    resampled = order[starts + rng.randint(0, np.repeat(counts, counts), (resamples, len(generated)))]
    weights = _weights([*(subset for subset, _ in chosen), *resampled], len(generated))
    resampled_real = rng.randint(0, len(real), (resamples, len(real)))
    real_weights = _weights([*(subset for _, subset in chosen), *resampled_real], len(real))
    generated, real = generated.float(), real.float()
    shift = _kernel(generated.mean(0, keepdim=True), real.mean(0, keepdim=True), 0)  # only affects rounding
    within, within_real = _within(generated, weights, shift), _within(real, real_weights, shift)
    all_real, tail = real_weights.new_ones(1, len(real)), slice(subsets, None)
    across, across_all = _across(generated, real, weights, torch.cat([real_weights, all_real]), shift)
    distances = within + within_real - 2 * across
    drawn = within[tail] - 2 * across_all[tail]  # the rest is constant
    middle, error = distances[:subsets].mean().item(), distances[tail].std().item()
    # The resamples scatter around the distance of all pairs: the interval is moved to the value, the mean over subsets.
    low, high = torch.quantile(distances[tail] - distances[tail].mean() + middle, torch.tensor([0.025, 0.975]).double()).tolist()
    return Kernel(middle, error, low, high, drawn.std().item())


def radii(features: Tensor, neighbours: Sequence[int]) -> dict[int, Tensor]:
    """Return the distance of features (N, D) to their k-th nearest neighbour, (N,), for each k of `neighbours`."""
    nearest = [torch.cdist(batch, features).topk(max(neighbours) + 1, largest=False).values for batch in features.split(BLOCK)]
    return dict(zip(neighbours, torch.cat(nearest).T[list(neighbours)], strict=True))  # the 0th is the image itself


def neighbourhoods(generated: Tensor, real: Tensor, real_radii: Mapping[int, Tensor]) -> dict[int, dict[str, float]]:
    """Return precision, recall, density and coverage of features (N, D) against real ones (M, D), for each k of `real_radii`.

    Precision and recall are defined in 1904.06991, density and coverage by Naeem et al. (2002.09797, eq. 3 and 4).
    """
    own_radii = radii(generated, tuple(real_radii))
    inside = {k: torch.zeros(2, dtype=torch.int64) for k in real_radii}  # images inside a real neighbourhood; pairs of both
    reached = {k: torch.zeros(len(real), dtype=torch.bool) for k in real_radii}
    nearest = torch.full((len(real),), torch.inf)
    for start in range(0, len(generated), BLOCK):
        distances = torch.cdist(generated[start : start + BLOCK], real)
        nearest = torch.minimum(nearest, distances.amin(0))
        for k in real_radii:
            among = (distances <= real_radii[k]).sum(1)
            inside[k] += torch.stack([(among > 0).sum(), among.sum()])
            reached[k] |= (distances <= own_radii[k][start : start + BLOCK, None]).any(0)
    return {
        k: {
            "precision": inside[k][0].item() / len(generated),
            "recall": reached[k].double().mean().item(),
            "density": inside[k][1].item() / (k * len(generated)),
            "coverage": (nearest <= real_radii[k]).double().mean().item(),
        }
        for k in real_radii
    }


def patch_step(images: Tensor, patch_size: int) -> float | None:
    """Return the ratio of pixel steps across the borders of patches to those inside patches; 1 if no seam is visible.

    Args:
        images: uint8 (N, 3, S, S).

    Returns:
        The ratio of the mean absolute steps; None if there are no borders or no insides, as with patches of one pixel, or
        if the steps inside are 0.
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
    """Return the Fréchet distance from the difference of the means (D,), the sum of the covariances' traces, and the Gram matrix
    of the product of their roots.

    The trace of the root of the covariances' product is the sum of the singular values of the product of their roots.
    """
    shared = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(np.square(apart).sum() + traces - 2 * shared)


def _weights(drawn: Iterable[np.ndarray], count: int) -> Tensor:
    """Return how often each of `count` images was drawn, a row (count,) for each resample."""
    return torch.from_numpy(np.stack([np.bincount(indices, minlength=count) for indices in drawn])).float()


def _kernel(left: Tensor, right: Tensor, shift: Tensor | float) -> Tensor:
    return (left @ right.T).div_(left.shape[1]).add_(1).pow_(3).sub_(shift)


def _within(features: Tensor, weights: Tensor, shift: Tensor) -> Tensor:
    """Return the mean kernel (W,) over pairs of different images, for each row of weights (W, N)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        block = _kernel(features[rows], features, shift)
        block.diagonal(start).zero_()
        total += ((weights[:, rows] @ block) * weights).double().sum(1)
    weights = weights.double()
    return total / (weights.sum(1).square() - weights.square().sum(1))


def _across(generated: Tensor, real: Tensor, weights: Tensor, real_weights: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean kernel (W,) over the pairs of both sets for weights (W, N) and (W + 1, M): with the real weights of the same
    row, and with those of the last row."""
    total = torch.zeros(2, len(weights), dtype=torch.float64)
    same, last = real_weights[:-1], real_weights[-1]
    for start in range(0, len(generated), BLOCK):
        rows = slice(start, start + BLOCK)
        weighted = weights[:, rows] @ _kernel(generated[rows], real, shift)
        total += torch.stack([(weighted * same).double().sum(1), (weighted * last).double().sum(1)])
    masses = weights.double().sum(1)
    return total[0] / (masses * same.double().sum(1)), total[1] / (masses * last.double().sum())
