"""Exact and near copies among the images."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinycats_core.data.decode import Decoded, Finding, make_finding

NEAR_BITS = 8  # of 64 in the difference hash
NEAR_LEVELS = 8.0  # mean absolute difference of 16x16 thumbnails, of 255
CANDIDATES = 8  # training images, the nearest by brightness, whose thumbnails are compared before those of all others
HELD_OUT_FIRST = {"test": 0, "val": 1, None: 2, "train": 2}


def drop_copies(images: Sequence[Decoded]) -> tuple[list[Decoded], list[Finding]]:
    """Keep one of each set of images with the same pixels (a test image if there is one), none if their classes differ."""
    kept: list[Decoded] = []
    findings: list[Finding] = []
    for first, *copies in _same(sorted(images, key=lambda image: (HELD_OUT_FIRST[image.split], image.sha256, image.name))):
        if any(copy.label != first.label for copy in copies):
            findings += [make_finding("conflict", copy.name, f"= {first.name}", copy.label) for copy in copies]
            other = next(copy for copy in copies if copy.label != first.label)
            findings.append(make_finding("conflict", first.name, f"= {other.name}", first.label))
        else:
            kept.append(first)
            findings += [make_finding("duplicate", copy.name, f"= {first.name}", copy.label) for copy in copies]
    return kept, findings


def _same(images: Iterable[Decoded]) -> list[list[Decoded]]:
    """Group images that are the same picture, however they are encoded: equal in their sides and in their pixels."""
    groups: dict[Hashable, list[Decoded]] = {}
    for image in images:
        picture = min(image.width, image.height), max(image.width, image.height), hashlib.sha256(image.pixels.tobytes()).digest()
        groups.setdefault(picture, []).append(image)
    return list(groups.values())


def find_near_duplicates(train: Sequence[Decoded], test: Sequence[Decoded]) -> list[Finding]:
    """Find held-out images that are nearly copies of a training image, as it is or mirrored."""
    if not train or not test:
        return []
    train_hashes, train_thumbs = _signatures(train)
    nearest: dict[int, tuple[float, int]] = {}
    for mirrored in (False, True):
        hashes, thumbs = _signatures(test, mirrored)
        for start in range(0, len(test), 512):
            bits = (64 - hashes[start : start + 512] @ train_hashes.T) / 2
            for row, found in _nearest(bits, thumbs[start : start + 512], train_thumbs).items():
                nearest[start + row] = min(found, nearest.get(start + row, found))
    return [
        make_finding("near_duplicate", test[row].name, f"like {train[column].name}", test[row].label)
        for row, (_, column) in sorted(nearest.items())
    ]


def _nearest(bits: Tensor, thumbs: Tensor, train_thumbs: Tensor) -> dict[int, tuple[float, int]]:
    """Return distance and column of a near copy for each row that has one.

    Frames of a still camera are all near copies of each other: of so many pairs, the few of nearest brightness suffice. The
    others of a row are only compared if none of those is a near copy.
    """
    # No two thumbnails differ less than their mean levels do.
    apart = (thumbs.mean((1, 2, 3))[:, None] - train_thumbs.mean((1, 2, 3))[None]).abs()
    apart.masked_fill_((bits > NEAR_BITS) | (apart > NEAR_LEVELS), torch.inf)
    few_levels, few = apart.topk(min(CANDIDATES, bits.shape[1]), dim=1, largest=False)
    found: dict[int, tuple[float, int]] = {}
    for row in few_levels[:, 0].isfinite().nonzero().flatten().tolist():
        best = _closest(thumbs[row], train_thumbs, few[row][few_levels[row].isfinite()])
        if best[0] > NEAR_LEVELS and few_levels[row, -1].isfinite():
            best = _closest(thumbs[row], train_thumbs, apart[row].isfinite().nonzero().flatten())
        if best[0] <= NEAR_LEVELS:
            found[row] = best
    return found


def _closest(thumb: Tensor, train_thumbs: Tensor, columns: Tensor) -> tuple[float, int]:
    """Return the least mean absolute difference of a thumbnail from those of some columns, and the first column with it."""
    distances = (train_thumbs[columns] - thumb).abs().mean((1, 2, 3))
    place = int(distances.argmin())
    return float(distances[place]), int(columns[place])


def _signatures(images: Sequence[Decoded], mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Return 64-bit difference hashes as -1/1 (N, 64) and thumbnails (N, 3, 16, 16), float32."""
    hashes: list[Tensor] = []
    thumbs: list[Tensor] = []
    for start in range(0, len(images), 256):
        batch = torch.from_numpy(np.stack([image.pixels for image in images[start : start + 256]])).float()
        batch = batch.flip(3) if mirrored else batch
        grey = F.adaptive_avg_pool2d(batch.mean(1, keepdim=True), (8, 9))
        hashes.append(((grey[..., 1:] > grey[..., :-1]).float() * 2 - 1).flatten(1))
        thumbs.append(F.adaptive_avg_pool2d(batch, (16, 16)))
    return torch.cat(hashes), torch.cat(thumbs)
