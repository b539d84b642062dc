"""Fidelity by torch-fidelity: generated images against held-out real ones, beside what real training images reach."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from tinycats_core.checkpoint import read_safetensors, write_safetensors
from tinycats_core.classifier import BreedClassifier, accuracy, load_classifier
from tinycats_core.config import EvaluateConfig, SampleConfig
from tinycats_core.data import load_split
from tinycats_core.errors import EvaluationError
from tinycats_core.files import digest_of, make_folder, sha256_of, write_json
from tinycats_core.records import Checkpoint, Dataset, FidelityReport, SampleSet
from tinycats_core.sampling import load_samples, pick_device

MIN_IMAGES = 16  # of each set: below this a KID subset has fewer than eight images
UNBIASED_FROM = 2_048  # images; below this FID is mostly its own bias (1911.07023)
KID_SUBSET = 1_000
IS_SPLITS = 10
OFFICIAL_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# What must be equal for two sample sets to be comparable: how they were drawn, not which network drew them.
SAMPLER_SETTINGS = (*(name for name in SampleConfig.model_fields if name != "batch_size"), "runtime")


def evaluate(
    samples: SampleSet,
    dataset: Dataset,
    config: EvaluateConfig,
    classifier: Checkpoint | None,
    folder: Path,
    device: str = "auto",
) -> FidelityReport:
    """Measure generated images against the test split, and real training images (the floor) in the same way.

    With NAME the extractor, the metrics are `fid_inception` or `fd_breed`, `kid_NAME`, `kid_NAME_std` (standard error of
    KID), `is_NAME`, `precision`, `recall` and, given a classifier, `breed_accuracy`: how often it sees the class that was
    asked for, with its accuracy on the real test images as the floor.

    `conditions["noise_kid"]` is the KID of uniform noise, the other end of the scale; `conditions["spread"]` compares
    how far the features of one class scatter with how far the real ones do (1 = as much, 0 = one image a class).
    `conditions["hash"]` is equal where two reports may be compared.

    The report goes to `folder` under a name of its own, so that several evaluations can share the folder: they share the
    features of the real images, which are kept in `folder/features`.

    Raises:
        EvaluationError: the sets are too small or do not fit together, the extractor is not to be had, or a metric is
            not finite.
    """
    generated, labels = load_samples(samples)
    test_images, test_labels = load_split(dataset, "test")
    train_images, _ = load_split(dataset, "train")
    chosen = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(config.seed))[: len(generated)]
    counts = {"generated": len(generated), "reference": len(test_images), "floor": len(chosen)}
    _check_sets(counts, config, generated, labels, dataset)
    target = pick_device(device)
    breeds = _load_breeds(classifier, dataset, target) if classifier else None
    eyes = _inception(target) if config.extractor == "inception" else _breed(classifier, target)

    def of_real(images: Tensor, *source: str | int) -> dict[str, Tensor]:
        key = digest_of([eyes.sha256, eyes.layers, target.type, *source])
        path = folder / "features" / f"{key[:16]}.safetensors"
        if not path.is_file():
            write_safetensors(path, extract(eyes, images, config.batch_size, target), {"kind": "features"})
        return read_safetensors(path, "features")[0]

    make_folder(folder)
    shape, seed = (len(chosen), 3, dataset.image_size, dataset.image_size), config.seed
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found = extract(eyes, generated, config.batch_size, target)
    reference = of_real(test_images, dataset.sha256, "test")
    floor = of_real(train_images[chosen], dataset.sha256, "train", seed, len(chosen))
    noise_features = of_real(noise, "noise", seed, *shape)

    subset = min(KID_SUBSET, min(counts.values()) // 2)
    metrics = compare(found, reference, eyes, config, subset)
    floor_metrics = compare(floor, reference, eyes, config, subset)
    if breeds:
        metrics["breed_accuracy"] = accuracy(breeds, generated, labels, config.batch_size)
        floor_metrics["breed_accuracy"] = accuracy(breeds, test_images, test_labels, config.batch_size)
    _require_finite(metrics, "the generated images")
    _require_finite(floor_metrics, "the real training images")
