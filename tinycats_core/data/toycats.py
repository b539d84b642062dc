"""The source `toycats`: drawn cats, which need no download."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinycats_core.config import CLASSES, DataConfig
from tinycats_core.data import toy_drawing
from tinycats_core.data.decode import Decoded, Progress
from tinycats_core.data.source import MIT, Collected, Source, split_as_given
from tinycats_core.data.splits import Split


class ToyCats(Source):
    """Drawings of the twelve breeds and of other animals."""

    name = "toycats"
    settings = ("toy_train_per_class", "toy_val_per_class", "toy_test_per_class", "seed")
    split_rule = "three seeds"
    licence = "mit"
    licence_text = MIT
    dataset_id = "toycats"
    dataset_name = "Toy cats (generated drawings)"
    note = "It was trained on drawings of cats that the project itself generates (MIT licence). No photo was used."
    limits = ("Its cats are drawings. It has never seen a real one.",)

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        counts = [config.toy_train_per_class, config.toy_val_per_class, config.toy_test_per_class]
        return {"counts": counts, "seed": config.seed}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        return Collected(CLASSES, split_as_given(_draw(config, report)), [], 0)


def _draw(config: DataConfig, report: Progress) -> Iterator[Decoded]:
    # Three seeds: the held-out images must not be a continuation of the training images of any other data.seed. NumPy
    # cuts a seed into words of 32 bits: with 2**32 the second word, 1, would be taken for the class, and images recur.
    plan: list[tuple[Split, int, int]] = [
        ("train", config.toy_train_per_class, config.seed),
        ("val", config.toy_val_per_class, config.seed + 2**48),
        ("test", config.toy_test_per_class, config.seed + 2**31),
    ]
    for step, (split, per_class, seed) in enumerate(plan):
        if per_class == 0:
            continue
        report(step / len(plan), f"drawing the toy cats of the {split} split")
        images, labels = toy_drawing.generate(per_class, config.image_size, seed)
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
            name = f"{split}/{CLASSES[label]}/{index:05}"
            yield Decoded(name, CLASSES[label], split, sha256, config.image_size, config.image_size, pixels)
