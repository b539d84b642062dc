"""Memorisation: how many generated images are training images again."""

import torch
from torch import Tensor

COPY_RATIO = 1 / 3  # of the distances to the nearest and the second nearest training image


def copy_rate(images: Tensor, train: Tensor, batch_size: int = 256) -> float:
    """Return the share of images that lie three times nearer to one training image, or its mirror image, than to any other.

    The distance is Euclidean over pixels, and the ratio that of Yoon et al., Diffusion Probabilistic Models Generalize when
    They Fail to Memorize (2023). A training image that stands there twice hides its copies: `data.validate` finds those.
    Read it beside the value of real images that are not in the training set.

    Args:
        images, train: uint8 (N, 3, S, S) and (M, 3, S, S), M at least 2.
    """
    known, mirrored = train.flatten(1).float(), train.flip(-1).flatten(1).float()
    copies = 0
    for batch in images.split(batch_size):
        pixels = batch.flatten(1).float()
        distances = torch.minimum(torch.cdist(pixels, known), torch.cdist(pixels, mirrored))  # (B, M)
        nearest, second = distances.topk(2, largest=False).values.unbind(1)
        copies += int((nearest < COPY_RATIO * second).sum())
    return copies / len(images)
