"""Augmentation of a batch on its device: flips; zooms and shifts; turns, stretches and colours (EDM, 2206.00364, appendix F).

All but the flips are told to the network as labels: what was done to an image, in units of each change's usual size, zero for
an image that was left as it is. Drawing tells nothing, so no change shows in what is drawn. A mirrored cat is a cat.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycats_core.config.training import Augmentation
from tinycats_core.generator.model import LABEL_LAYER

PROBABILITY = 0.12  # of each change, as in EDM: the network sees most images, or much of them, as they are
GEOMETRY = ("zoom", "shift_x", "shift_y", "turn_cos", "turn_sin", "stretch_cos", "stretch_sin")  # the labels, in order
COLOUR = ("brightness", "contrast", "saturation")
LABELS: dict[Augmentation, int] = {"none": 0, "basic": 0, "medium": 3, "full": len(GEOMETRY + COLOUR)}
OCTAVES = 0.2  # unit of zoom and stretch: a factor of 2 ** 0.2
SHIFT = 1 / 8  # unit of the shifts, by the side of the image
MOST_ZOOM, MOST_SHIFT = math.log2(1.25) / OCTAVES, (1 / 16) / SHIFT  # of `medium`
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0  # units: a sum (images lie in [−1, 1]), octaves, octaves (ADA, 2006.06676)


def augment(
    images: Tensor, kind: Augmentation, generator: torch.Generator, probability: float = PROBABILITY
) -> tuple[Tensor, Tensor]:
    """Return augmented images (B, 3, S, S) in [−1, 1], and what the network is told of each of them, (B, LABELS[kind]).

    An image without a change is returned bit for bit, but for the flip of every second one.
    """
    if kind == "none":
        return images, images.new_zeros(len(images), 0)
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    images = torch.where(_each(flipped), images.flip(-1), images)
    labels = draw_labels(len(images), kind, generator, probability)
    return (apply(images, labels) if LABELS[kind] else images), labels


def draw_labels(count: int, kind: Augmentation, generator: torch.Generator, probability: float = PROBABILITY) -> Tensor:
    """Return random changes of as many images, (count, LABELS[kind]); each change takes place with the probability."""
    if not LABELS[kind]:
        return torch.zeros(count, 0, device=generator.device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=generator.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, device=generator.device)

    def maybe(change: Tensor) -> Tensor:
        return torch.where(uniform(1) < probability, change, 0)

    if kind == "medium":
        return torch.cat([maybe(uniform(1) * MOST_ZOOM), maybe((2 * uniform(2) - 1) * MOST_SHIFT)], dim=1)
    turn, axis = maybe((2 * uniform(1) - 1) * math.pi), 2 * math.pi * uniform(1)  # a stretch along φ is one along φ + π
    changes = [maybe(normal(1)), maybe(normal(2)), turn.cos() - 1, turn.sin(), maybe(normal(1) * _point(axis))]
    return torch.cat([*changes, *(maybe(normal(1)) for _ in COLOUR)], dim=1)


def apply(images: Tensor, labels: Tensor) -> Tensor:
    """Return images (B, 3, S, S) with the changes of their labels (B, 3 or 10). The edges are continued by reflection."""
    geometry, colour = labels[:, : len(GEOMETRY)], labels[:, len(GEOMETRY) :]
    moved = F.grid_sample(
        images, _grid(source_of(geometry), images.shape[-1]), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    images = torch.where(_each(geometry.any(1)), moved.clamp(-1, 1), images)
    if not colour.shape[1]:
        return images
    return torch.where(_each(colour.any(1)), _coloured(images, colour), images)


def source_of(labels: Tensor) -> Tensor:
    """Return for labels of geometry, (B, 3 or 7), where each point of a result comes from: affine matrices (B, 2, 3).

    Coordinates are (x, y) in [−1, 1], as for `grid_sample`. The matrices are written out: a product in TF32 would be coarse.
    """
    scale, shift = torch.exp2(-OCTAVES * labels[:, 0]), -2 * SHIFT * labels[:, 1:3]
    if labels.shape[1] == 3:
        zero = torch.zeros_like(scale)
        linear = (scale, zero, zero, scale)
    else:
        cos, sin = labels[:, 3] + 1, labels[:, 4]
        rate = OCTAVES * math.log(2)
        size = labels[:, 5:7].norm(dim=1)
        along = torch.where(size > 0, torch.sinh(rate * size) / size, 0)  # of the matrix exp(−rate · stretch), which is symmetric
        mean, difference, mixed = torch.cosh(rate * size), -along * labels[:, 5], -along * labels[:, 6]
        a, b, d = scale * (mean + difference), scale * mixed, scale * (mean - difference)
        linear = (cos * a + sin * b, cos * b + sin * d, cos * b - sin * a, cos * d - sin * b)
    return torch.cat([torch.stack(linear, dim=1).view(-1, 2, 2), shift.unsqueeze(2)], dim=2)


def without_label_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network that is told nothing: those that are averaged, drawn with and shipped."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(f"{LABEL_LAYER}.")}


def _grid(source: Tensor, size: int) -> Tensor:
    """Return where each pixel comes from, (B, size, size, 2)."""
    line = (2 * torch.arange(size, device=source.device) + 1) / size - 1
    x, y = line.view(1, 1, -1, 1), line.view(1, -1, 1, 1)
    across, down, shift = (part.view(-1, 1, 1, 2) for part in source.unbind(2))
    return across * x + down * y + shift


def _coloured(images: Tensor, labels: Tensor) -> Tensor:
    brightness, contrast, saturation = (_each(part) for part in labels.unbind(1))
    images = (images + BRIGHTNESS * brightness) * torch.exp2(CONTRAST * contrast)
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * torch.exp2(SATURATION * saturation)).clamp(-1, 1)


def _point(angle: Tensor) -> Tensor:
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
