"""Small sets of drawn cats, as the records that the stages pass on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinycats_core.config import CLASSES
from tinycats_core.data import toy_drawing
from tinycats_core.files import sha256_of, write_json
from tinycats_core.records import Dataset, SampleSet
from tinycats_core.tensors import write_safetensors


def draw_cats(classes: tuple[str, ...], per_class: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uint8 (N, 3, size, size) and labels that index `classes`."""
    rng = np.random.default_rng(seed)
    drawn = [np.array(toy_drawing.draw(CLASSES.index(name), rng, size)) for name in classes for _ in range(per_class)]
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(), labels


def make_dataset(
    folder: Path,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
    val: tuple[Tensor, Tensor] | None = None,
) -> Dataset:
    val = val or (train[0][:0], train[1][:0])
    path = folder / "images.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for split, (images, labels) in {"train": train, "val": val, "test": test}.items():
        tensors |= {f"{split}_images": images.contiguous(), f"{split}_labels": labels.contiguous()}
    save_file(tensors, path)
    write_json(folder / "manifest.json", {"sha256": sha256_of(path)})
    return Dataset(
        path=path,
        sha256=sha256_of(path),
        source="toycats",
        image_size=train[0].shape[-1],
        classes=classes,
        train_count=len(train[0]),
        val_count=len(val[0]),
        test_count=len(test[0]),
    )


def make_samples(path: Path, images: Tensor, labels: Tensor, **settings: Any) -> SampleSet:
    settings = {"sampler": "heun", "steps": 20, "seed": 1, "runtime": "pytorch", "model": "0" * 64, **settings}
    write_safetensors(path, {"images": images, "labels": labels}, {"kind": "samples", "settings": settings})
    return SampleSet(path=path, sha256=sha256_of(path), count=len(images), settings=settings)
