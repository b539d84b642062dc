"""How often the breed classifier is right: on drawn cats, and on real photos beside always naming the commonest class.

    python -m benchmarks.classifier [--photos FOLDER]

The classifier of the smoke preset on its toy cats, and beside it a ResNet-18 that is trained alike. With --photos instead the
classifier of the photos preset, trained from random weights twice: with every class weighing the same (classifier.balance 1, the
default) and with every image weighing the same (0). The figures are those of the one with the higher validation accuracy; the
other's stand in `runs`. All are of held-out images, with 95 % intervals (Wilson). FOLDER holds a folder a class, or cat/<Breed>/*
and other/*: then cats are also told from the rest.
"""

import argparse
import logging
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, report

MIN_TOY_ACCURACY = 0.98


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where the drawn cats are told apart."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.classifier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="real photos instead")
    parser.add_argument("--quick", action="store_true", help="one epoch, a tenth of the toy cats, under a minute")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    short = {"epochs": 1} if given.quick else {}
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        if given.photos:
            report("classifier-photos", of_photos(given.photos, short, Path(scratch)), given)
            return 0
        figures = of_drawn_cats({"toy_train_per_class": 20} if given.quick else {}, short, Path(scratch))
    report("classifier", figures, given)
    return 0 if figures["toy_accuracy"] >= MIN_TOY_ACCURACY or given.quick else 1


def of_drawn_cats(data: dict[str, Any], short: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the figures of the smoke preset's classifier, and of a ResNet-18 beside it."""
    own, peer = (measure("smoke", data, {**backbone, **short}, scratch) for backbone in ({}, {"backbone": "resnet18"}))
    return {
        **{f"toy_{name}": own[name] for name in ("accuracy", "interval", "majority", "images", "onnx", "cpu_seconds")},
        "toy_backbone": own["settings"]["backbone"],
        **{f"resnet18_{name}": peer[name] for name in ("accuracy", "interval", "onnx", "cpu_seconds")},
    }


def of_photos(photos: Path, short: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the figures of a folder of photos: of the balance that the validation images choose."""
    runs = [
        {"balance": balance, **measure("photos", {"folder": str(photos)}, {"balance": balance, **short}, scratch)}
        for balance in (1.0, 0.0)
    ]
    chosen = max(runs, key=lambda run: run["val_accuracy"])
    names = ("accuracy", "interval", "majority")
    return {
        **{f"breed_{name}": chosen[name] for name in names},
        **{f"cat_{name}": chosen["cat"][name] for name in names if chosen["cat"]},
        **{name: chosen[name] for name in ("macro_recall", "macro_recall_chance", "macro_f1", "balance")},
        **{f"breed_accuracy_balance_{run['balance']:g}": run["accuracy"] for run in runs},
        **{f"macro_recall_balance_{run['balance']:g}": run["macro_recall"] for run in runs},
        "runs": runs,
    }


def measure(preset: str, data: dict[str, Any], classifier: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Train a preset's classifier, export it, and return what it gets right of the held-out images."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.data.splits import load_split
    from tinycats_core.data.validation import validate
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.files import read_json
    from tinycats_core.presets import resolve
    from tinycats_core.release import export

    config = resolve(preset, {"data": data, "classifier": classifier})
    dataset = prepare(config.data, scratch / "data")
    validate(dataset, config.data)
    folder = scratch / f"{preset}-{config.classifier.backbone}-{config.classifier.balance:g}"
    started = time.process_time()
    made = train_classifier(dataset, config.classifier, folder, "cpu")
    seconds = time.process_time() - started
    found = read_json(folder / "report.json")
    train_labels = load_split(dataset, "train")[1]
    return {
        **accuracy_of(found["confusion"], train_labels.bincount(minlength=len(dataset.classes)).tolist()),
        "macro_recall": found["macro_recall"],
        "macro_recall_chance": 1 / sum(row["support"] > 0 for row in found["classes"]),
        "macro_f1": found["macro_f1"],
        "cat": cats_from_others(found["confusion"], dataset.classes, train_labels.tolist()),
        "images": {split: found["conditions"][f"{split}_images"] for split in ("train", "val", "test")},
        "cpu_seconds": round(seconds, 1),
        "val_accuracy": made.facts["val_accuracy"],
        "epoch": made.facts["epoch"],
        "settings": {"image_size": dataset.image_size, **found["conditions"]["config"]},
        "classes": found["classes"],
        "confusion": found["confusion"],
        "onnx": export.export_classifier(made, dataset, config.export, folder).facts,
    }


def cats_from_others(confusion: list[list[int]], classes: tuple[str, ...], train_labels: list[int]) -> dict[str, Any] | None:
    """Return how often a cat of any breed is told from what is no cat; None if there is no class `other`."""
    if "other" not in classes:
        return None
    other = classes.index("other")
    collapsed = [[0, 0], [0, 0]]
    for true, row in enumerate(confusion):
        for named, count in enumerate(row):
            collapsed[true == other][named == other] += count
    dogs = train_labels.count(other)
    return accuracy_of(collapsed, [len(train_labels) - dogs, dogs])


def accuracy_of(confusion: list[list[int]], train_counts: list[int]) -> dict[str, Any]:
    """Return accuracy, its 95 % interval, and the accuracy of always naming the commonest training class."""
    total = sum(map(sum, confusion))
    right = sum(row[index] for index, row in enumerate(confusion))
    majority = sum(confusion[train_counts.index(max(train_counts))])
    return {"accuracy": right / total, "interval": wilson(right, total), "majority": majority / total}


def wilson(right: int, total: int, z: float = 1.96) -> list[float]:
    """Return Wilson's interval of a share (1927): also sensible where it is near 0 or 1."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [centre - half, centre + half]


if __name__ == "__main__":
    sys.exit(main())
