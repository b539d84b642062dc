"""Memorisation: how many generated images are training images again."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinycats_core.pictures import contact_sheet, first_of_each_class

COPY_RATIO = 1 / 3  # of the distances to the nearest and the second nearest training image
COPY_SIZE = 16  # pixels: larger images are averaged down to it, which costs little and takes noise out of a copy


def copy_rate(images: Tensor, train: Tensor, batch_size: int = 2_048) -> float:
    """Return the share of images that lie three times nearer to one training image, or its mirror image, than to any other.

    The distance is Euclidean over pixels, and the ratio that of Yoon et al., Diffusion Probabilistic Models Generalize when
    They Fail to Memorize (2023). A training image that stands there twice hides its copies: `data.validate` finds those.
    Read it beside the value of real images that are not in the training set.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S), M at least 2.
    """
    copies = 0
    for squares, _ in _squares(images, train, batch_size):
        nearest, second = squares.topk(2, largest=False).values.clamp(min=0).sqrt().unbind(1)
        copies += int((nearest < COPY_RATIO * second).sum())
    return copies / len(images)


def nearest_images(images: Tensor, train: Tensor, batch_size: int = 2_048) -> Tensor:
    """Return the training image (M, 3, S, S) that lies nearest to each image (N, 3, S, S), mirrored where that is nearer."""
    found = []
    for squares, mirrored in _squares(images, train, batch_size):
        nearest = squares.argmin(1, keepdim=True)
        chosen, turned = train[nearest[:, 0]], mirrored.gather(1, nearest)
        found.append(torch.where(turned.view(-1, 1, 1, 1), chosen.flip(-1), chosen))
    return torch.cat(found)


def spacing(known: Tensor, batch_size: int = 2_048) -> Tensor:
    """Return how far each training image's features (M, D), M at least 2, lie from those of the nearest other one."""
    apart = []
    for start in range(0, len(known), batch_size):
        distances = torch.cdist(known[start : start + batch_size], known)
        distances.diagonal(start).fill_(torch.inf)
        apart.append(distances.amin(1))
    return torch.cat(apart)


def authenticity(features: Tensor, known: Tensor, apart: Tensor, batch_size: int = 2_048) -> float:
    """Return the share of images that are farther from their nearest training image than that one is from another one.

    Alaa et al. (2102.08921, section 4.3). Read it beside the value of real images that are not in the training set.

    Args:
        features, known: of the images (N, D) and of the training images (M, D).
        apart: the `spacing` of `known`.
    """
    nearest = [torch.cdist(batch, known).min(1) for batch in features.split(batch_size)]
    return torch.cat([found.values > apart[found.indices] for found in nearest]).double().mean().item()


def _squares(images: Tensor, train: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield of each batch the squared distances (B, M) to the training images, and where those of the mirror image are these.

    Mirroring turns the sign of what is odd from left to right and leaves what is even, so both distances come of one product each.
    """
    even, odd = _even_and_odd(train)
    lengths = even.square().sum(1) + odd.square().sum(1)
    for batch in images.split(batch_size):
        its_even, its_odd = _even_and_odd(batch)
        own = its_even.square().sum(1, keepdim=True) + its_odd.square().sum(1, keepdim=True)
        differ = its_odd @ odd.T
        mirrored = differ < 0
        yield (own + lengths).sub_((its_even @ even.T).add_(differ.abs_()), alpha=2), mirrored


def _even_and_odd(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return thumbnails as what their mirror images share with them and what they do not: lengths and products stay."""
    pixels = _thumbnails(images)
    middle = pixels.shape[-1] // 2
    left, right = pixels[..., :middle], pixels.flip(-1)[..., :middle]
    between = pixels[..., middle : pixels.shape[-1] - middle].flatten(1)  # of an odd number of columns
    even = torch.cat([(left + right).flatten(1) / 2**0.5, between], dim=1)
    return even, (left - right).flatten(1) / 2**0.5


def _thumbnails(images: Tensor) -> Tensor:
    """Return images as float around 0, those of more than COPY_SIZE pixels averaged down to it."""
    pixels = images.float()
    if images.shape[-1] > COPY_SIZE:
        average = F.adaptive_avg_pool1d(torch.eye(images.shape[-1], device=images.device), COPY_SIZE)
        pixels = average.T @ pixels @ average  # what adaptive_avg_pool2d comes to, in half its time
    return pixels - 127.5  # products of small numbers keep more of their digits


def neighbour_sheet(images: Tensor, labels: Tensor, train: Tensor, classes: Sequence[str], scale: int = 1) -> Image.Image:
    """Lay out four images of each class, each with the training image that lies nearest to it at its right.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S).
    """
    chosen = first_of_each_class(labels, 4)
    pairs = torch.cat([images[chosen], nearest_images(images[chosen], train)], dim=-1)
    return contact_sheet(pairs, labels[chosen], classes, per_class=4, scale=scale)
