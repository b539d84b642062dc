"""Memorisation: how many generated images are copies of training images, as they are or altered."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinycats_core.pictures import contact_sheet, first_of_each_class

COPY_RATIO = 1 / 3  # of the distances to the nearest and the second nearest training image
COPY_SIZE = 16  # pixels: larger images are averaged down to it, which is cheap and removes noise from a copy

# An altered copy is mirrored, turned, cropped or recoloured. Grey thumbnails of equal contrast hardly depend on colours; the
# training images are also seen turned and cropped.
ALTERED_RATIO = 0.65  # of the distances to the nearest and the third nearest training image: a photo taken twice hides no copy
TURNS = (-18, -12, -6, 6, 12, 18)  # degrees
CROPS = ((0.9, 3), (0.8, 5))  # the share of the width that is left, and at how many places along each side
VIEW_SIZE = 32  # pixels: training images are turned and cropped at this size at most
VIEWED = 256  # training images whose views are held in memory
LEFT_OUT = 1_000  # training images, at most, that are held against the others: enough for a rate


class CopyRates(NamedTuple):
    """Both copy rates of a number of images. The rates have the names of the metrics."""

    images: int
    copy_rate: float
    altered_copy_rate: float


COPY_RATES = CopyRates._fields[1:]


def copies(images: Tensor, train: Tensor, batch_size: int = 2_048) -> Tensor:
    """Return which images (N,) are three times nearer to one training image, or its mirror image, than to any other.

    The distance is Euclidean over pixels; the ratio is from Yoon et al., Diffusion Probabilistic Models Generalize when They
    Fail to Memorize (2023). Duplicates in the training set hide copies: `data.validation` finds them.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S), M at least 2.
    """
    return torch.cat([_stand_out(squares) for squares, _ in _squares(images, train, batch_size)])


def copy_rate(images: Tensor, train: Tensor) -> float:
    """Return the share of images that are copies. Compare it with the value of real images outside the training set."""
    return copies(images, train).double().mean().item()


def altered_copies(images: Tensor, train: Tensor, own: Tensor | None = None) -> Tensor:
    """Return which images (N,) are copies of a training image, also if mirrored, turned, cropped or recoloured.

    An image is one if it is much nearer to one training image, in one of its views, than to the third nearest. Compare their share
    with that of real images outside the training set: a few in a hundred.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S), M at least 3.
        own: where the images are among the training images, (N,). They are then copies of another one only.
    """
    even, odd = _halves(_grey(_small(images)))
    nearest = even.new_full((len(images), 3), torch.inf)
    for start in range(0, len(train), VIEWED):
        views = _views(train[start : start + VIEWED])
        likeness = even.new_full((len(images), views.shape[1]), -torch.inf)
        for view in views:
            view_even, view_odd = _halves(view)
            product = (odd @ view_odd.T).abs_()  # mirroring changes its sign alone
            likeness = torch.maximum(likeness, product.addmm_(even, view_even.T))
        if own is not None:
            rows = ((own >= start) & (own < start + VIEWED)).nonzero().flatten()
            likeness[rows, own[rows] - start] = -torch.inf
        nearest = torch.cat([nearest, 2 - 2 * likeness], 1).topk(3, largest=False).values
    distances = nearest.clamp(min=0).sqrt()
    return distances[:, 0] < ALTERED_RATIO * distances[:, 2]


def copy_rates_of_training(train: Tensor, chosen: Tensor | None = None) -> CopyRates:
    """Return the copy rates of training images (M, 3, S, S), each held against the others; 0 for fewer than 4.

    Args:
        chosen: a mask (M,) of the images to measure; all by default. Of more than LEFT_OUT, these are taken evenly.
    """
    own = torch.arange(len(train)) if chosen is None else chosen.nonzero().flatten()
    if len(train) < 4 or not len(own):
        return CopyRates(0, 0.0, 0.0)
    own = own[torch.linspace(0, len(own) - 1, min(len(own), LEFT_OUT)).long()].to(train.device)
    ((squares, _),) = _squares(train[own], train, LEFT_OUT)
    found = _stand_out(squares.scatter_(1, own[:, None], torch.inf)), altered_copies(train[own], train, own)
    return CopyRates(len(own), *(of.double().mean().item() for of in found))


def nearest_images(images: Tensor, train: Tensor, batch_size: int = 2_048) -> Tensor:
    """Return the nearest of the training images (M, 3, S, S) to each image (N, 3, S, S), mirrored if that is nearer."""
    batches = []
    for squares, mirrored in _squares(images, train, batch_size):
        nearest = squares.argmin(1, keepdim=True)
        chosen, flipped = train[nearest[:, 0]], mirrored.gather(1, nearest)
        batches.append(torch.where(flipped.view(-1, 1, 1, 1), chosen.flip(-1), chosen))
    return torch.cat(batches)


def spacing(train: Tensor, batch_size: int = 2_048) -> Tensor:
    """Return the distance of each training image's features (M, D), M at least 2, to those of the nearest other one, (M,)."""
    nearest = []
    for start in range(0, len(train), batch_size):
        distances = torch.cdist(train[start : start + batch_size], train)
        distances.diagonal(start).fill_(torch.inf)
        nearest.append(distances.amin(1))
    return torch.cat(nearest)


def authenticity(features: Tensor, train: Tensor, distances: Tensor, batch_size: int = 2_048) -> float:
    """Return the share of images that are farther from their nearest training image than that is from the next training image.

    Alaa et al. (2102.08921, section 4.3). Compare it with the value of real images outside the training set.

    Args:
        features, train: of the images (N, D) and of the training images (M, D).
        distances: the `spacing` of `train`.
    """
    nearest = [torch.cdist(batch, train).min(1) for batch in features.split(batch_size)]
    return torch.cat([batch.values > distances[batch.indices] for batch in nearest]).double().mean().item()


def _stand_out(squares: Tensor) -> Tensor:
    """Return where the nearest training image is far nearer than any other, (N,), from squared distances (N, M)."""
    nearest, second = squares.topk(2, largest=False).values.clamp(min=0).sqrt().unbind(1)
    return nearest < COPY_RATIO * second


def _squares(images: Tensor, train: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, per batch, squared distances (B, M) to the training images and a mask that is True where the mirrored image is nearer.

    Mirroring negates the odd part of an image and leaves the even part, so one product of each part gives both distances.
    """
    even, odd = _even_and_odd(train)
    lengths = even.square().sum(1) + odd.square().sum(1)
    for batch in images.split(batch_size):
        batch_even, batch_odd = _even_and_odd(batch)
        own = batch_even.square().sum(1, keepdim=True) + batch_odd.square().sum(1, keepdim=True)
        product = batch_odd @ odd.T
        mirrored = product < 0
        yield (own + lengths).sub_((batch_even @ even.T).add_(product.abs_()), alpha=2), mirrored


def _views(images: Tensor) -> Tensor:
    """Return grey thumbnails of equal contrast of images as they are, cropped and turned, (V, N, 1, COPY_SIZE, COPY_SIZE)."""
    small, views = _small(images), [(1.0, 0.0, 0.0, 0.0)]
    for side, places in CROPS:
        offsets = torch.linspace(side - 1, 1 - side, places).tolist()
        views += [(side, 0.0, across, down) for across in offsets for down in offsets]
    views += [(1.0, math.radians(turn), 0.0, 0.0) for turn in TURNS]
    seen = []
    for side, turn, across, down in views:
        cos, sin = side * math.cos(turn), side * math.sin(turn)
        matrix = torch.tensor([[cos, -sin, across], [sin, cos, down]], device=images.device).expand(len(images), 2, 3)
        grid = F.affine_grid(matrix, [len(images), 1, COPY_SIZE, COPY_SIZE], align_corners=False)  # its points average 2 × 2 pixels
        seen.append(_grey(F.grid_sample(small, grid, padding_mode="reflection", align_corners=False)))
    return torch.stack(seen)


def _small(images: Tensor) -> Tensor:
    """Return images in grey, as float (N, 1, S, S), averaged down to VIEW_SIZE pixels if they are larger."""
    grey = images.float().mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(grey, VIEW_SIZE) if images.shape[-1] > VIEW_SIZE else grey


def _grey(small: Tensor) -> Tensor:
    """Return thumbnails (N, 1, COPY_SIZE, COPY_SIZE) of mean 0 and length 1."""
    pixels = F.adaptive_avg_pool2d(small, COPY_SIZE)
    return F.normalize((pixels - pixels.mean((2, 3), keepdim=True)).flatten(1)).view_as(pixels)


def _even_and_odd(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd part of the thumbnails of images under mirroring."""
    return _halves(_thumbnails(images))


def _halves(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd part of pixels under mirroring, scaled so that lengths and products are preserved."""
    middle = pixels.shape[-1] // 2
    left, right = pixels[..., :middle], pixels.flip(-1)[..., :middle]
    between = pixels[..., middle : pixels.shape[-1] - middle].flatten(1)  # the middle one, if the number of columns is odd
    even = torch.cat([(left + right).flatten(1) / 2**0.5, between], dim=1)
    return even, (left - right).flatten(1) / 2**0.5


def _thumbnails(images: Tensor) -> Tensor:
    """Return images as float, centred at 0 and averaged down to COPY_SIZE pixels if they are larger."""
    pixels = images.float()
    if images.shape[-1] > COPY_SIZE:
        average = F.adaptive_avg_pool1d(torch.eye(images.shape[-1], device=images.device), COPY_SIZE)
        pixels = average.T @ pixels @ average  # equals adaptive_avg_pool2d, in half its time
    return pixels - 127.5  # products of small numbers lose fewer digits


def neighbour_sheet(images: Tensor, labels: Tensor, train: Tensor, classes: Sequence[str], scale: int = 1) -> Image.Image:
    """Lay out four images of each class, each with the nearest training image to its right.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S).
    """
    chosen = first_of_each_class(labels, 4)
    pairs = torch.cat([images[chosen], nearest_images(images[chosen], train)], dim=-1)
    return contact_sheet(pairs, labels[chosen], classes, per_class=4, scale=scale)
