"""Memorisation: how many generated images are copies of training images."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinycats_core.pictures import contact_sheet, first_of_each_class

COPY_RATIO = 1 / 3  # of the distances to the nearest and the second nearest training image
COPY_SIZE = 16  # pixels: larger images are averaged down to it, which is cheap and removes noise from a copy


def copy_rate(images: Tensor, train: Tensor, batch_size: int = 2_048) -> float:
    """Return the share of images that are three times nearer to one training image, or its mirror image, than to any other.

    The distance is Euclidean over pixels; the ratio is from Yoon et al., Diffusion Probabilistic Models Generalize when They
    Fail to Memorize (2023). Duplicates in the training set hide copies: `data.validation` finds them. Compare it with the
    value of real images outside the training set.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S), M at least 2.
    """
    copies = 0
    for squares, _ in _squares(images, train, batch_size):
        nearest, second = squares.topk(2, largest=False).values.clamp(min=0).sqrt().unbind(1)
        copies += int((nearest < COPY_RATIO * second).sum())
    return copies / len(images)


def copy_rate_of_training(train: Tensor, batch_size: int = 2_048) -> float:
    """Return the copy rate of the training images (M, 3, S, S) themselves, each held against the others; 0 for fewer than 3."""
    if len(train) < 3:
        return 0.0
    copies = 0
    for start, (squares, _) in zip(range(0, len(train), batch_size), _squares(train, train, batch_size), strict=True):
        squares.diagonal(start).fill_(torch.inf)
        nearest, second = squares.topk(2, largest=False).values.clamp(min=0).sqrt().unbind(1)
        copies += int((nearest < COPY_RATIO * second).sum())
    return copies / len(train)


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


def _even_and_odd(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd part of thumbnails under mirroring, scaled so that lengths and products are preserved."""
    pixels = _thumbnails(images)
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
