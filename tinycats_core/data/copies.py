"""Exact and near copies among the images."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinycats_core.data.decode import Decoded, make_finding

NEAR_BITS = 8  # of 64 in the difference hash
NEAR_LEVELS = 8.0  # mean absolute difference of 16x16 thumbnails, of 255


def drop_copies(images: Sequence[Decoded]) -> tuple[list[Decoded], list[dict[str, str]]]:
    """Keep one of each set of byte-identical images (a test image if there is one), and none if their classes differ."""
    kept: list[Decoded] = []
    findings: list[dict[str, str]] = []
    groups: dict[str, list[Decoded]] = {}
    for image in sorted(images, key=lambda image: (image.split == "train", image.name)):
        groups.setdefault(image.sha256, []).append(image)
    for first, *copies in groups.values():
        if any(copy.label != first.label for copy in copies):
            findings += [make_finding("conflict", copy.name, f"= {first.name}") for copy in copies]
            findings.append(make_finding("conflict", first.name, f"= {copies[0].name}"))
        else:
            kept.append(first)
            findings += [make_finding("duplicate", copy.name, f"= {first.name}") for copy in copies]
    return kept, findings


def find_near_duplicates(train: Sequence[Decoded], test: Sequence[Decoded]) -> list[dict[str, str]]:
    """Find held-out images that are nearly copies of a training image, as it is or mirrored."""
    if not train or not test:
        return []
    train_hashes, train_thumbs = _signatures(train)
    test_hashes, test_thumbs = _signatures(test)
    mirror_hashes, mirror_thumbs = _signatures(test, mirrored=True)
    nearest: dict[int, tuple[float, int]] = {}
    for hashes, thumbs in ((test_hashes, test_thumbs), (mirror_hashes, mirror_thumbs)):
        for start in range(0, len(test), 512):
            bits = (64 - hashes[start : start + 512] @ train_hashes.T) / 2
            for row, column in (bits <= NEAR_BITS).nonzero().tolist():
                distance = float((thumbs[start + row] - train_thumbs[column]).abs().mean())
                if distance <= NEAR_LEVELS:
                    found = nearest.get(start + row, (distance, column))
                    nearest[start + row] = min(found, (distance, column))
    return [
        make_finding("near_duplicate", test[row].name, f"like {train[column].name}") for row, (_, column) in sorted(nearest.items())
    ]


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
