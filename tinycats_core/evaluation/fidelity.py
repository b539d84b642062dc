"""Fidelity: the metrics of generated images against the test split, beside those of real images, the floor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycats_core.config import GUIDANCE_SETTINGS, MIN_IMAGES, OTHER, EvaluateConfig, SamplerPart
from tinycats_core.data import groups
from tinycats_core.data.splits import load_labels
from tinycats_core.device import fast_arithmetic
from tinycats_core.errors import EvaluationError
from tinycats_core.evaluation.distances import RESAMPLES, kernel_distance
from tinycats_core.evaluation.extractors import extract
from tinycats_core.evaluation.metrics import IS_SPLITS, Comparison, kid_subset, measure, require_finite, torch_fidelity_version
from tinycats_core.evaluation.reference import WIDE, Judge
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator.sampling import load_samples
from tinycats_core.records import ClassRow, Dataset, FidelityReport, GroupFigures, SampleSet, Weights

SETTLED = 2_048  # images; with fewer FID is mostly its own bias (1911.07023)
NOISE_IMAGES = 64  # of each kind at most: all noise looks much the same
SAMPLER_SETTINGS = tuple(name for name in SamplerPart.model_fields if name != "batch_size")

# Conditions in which two reports may differ.
NOT_COMPARED = ("conditions_hash", "drawn_by", "device", "trivial_kid", "trivial_accuracy", "left_out", *GUIDANCE_SETTINGS)


def evaluate(
    samples: SampleSet,
    dataset: Dataset,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
) -> FidelityReport:
    """Measure `metrics.METRICS` of generated images against the test split, and the floor in the same way.

    Writes a report of its own name to `folder`, which evaluations share: later ones read the real images' statistics from
    `folder/cache`.

    Raises:
        EvaluationError: the sets are too small or do not fit together, the extractor is unavailable, or a metric is not
            finite.
    """
    images, labels = load_samples(samples)
    _check_sets(config, images, labels, dataset)
    judge = Judge.load(dataset, config, classifier, folder, device)
    names = judged_groups(labels, dataset, config)
    features, patch_size = judge.extract_features(images), samples.settings.get("patch_size")
    predictions, subset = judge.predicted_classes(images, features), kid_subset(len(images), dataset.test_count)
    drawn = Comparison(judge, judge.reference("test"), images, labels, features, subset, patch_size, predictions)
    with fast_arithmetic(judge.device):
        measured = [_measure(drawn, name) for name in names]
    cats, *others = measured
    conditions = _conditions(cats, others, samples.settings) | {
        "trivial_kid": cats.real["trivial_kid"],
        "left_out": cats.real["left_out"],
        "trivial_accuracy": _trivial_accuracy(cats.generated),
    }
    facts: dict[str, Any] = {
        "metrics": cats.metrics,
        "floor": cats.real["floor"],
        "classes": [row.model_dump(mode="json") for row in _class_rows(drawn, [group.real["classes"] for group in measured])],
        "conditions": conditions,
        "notes": (*judge.extractor.notes, *(judge.dinov2.notes if judge.dinov2 else ()), *_notes(cats)),
    }
    if others:
        facts["groups"] = [group.as_figures().model_dump(mode="json") for group in others]
    path = folder / f"fidelity-{digest_of([samples.sha256, conditions['conditions_hash']])[:12]}.json"
    write_json(path, facts)
    return FidelityReport(path=path, sha256=sha256_of(path), **facts)


def images_needed(config: EvaluateConfig) -> int:
    """Return the least number of images in a set."""
    return max(MIN_IMAGES, config.neighbours + 1)


def require_enough(counts: Mapping[str, int], config: EvaluateConfig) -> None:
    """Raise EvaluationError if a set, by its name, has fewer images than can be judged: generated, training or test."""
    needed = images_needed(config)
    for name, count in counts.items():
        if count < needed:
            total = sum(counts.values())
            remedy = f"Add images: training and test images together must be {2 * needed + 2} or more"
            if name == "generated":
                remedy = "Draw more samples"
            elif total >= 2 * needed:
                remedy = f"Add images, or set data.test_fraction to {math.ceil(100 * (needed + 1) / total) / 100:g}"
            raise EvaluationError(
                f"there are {count} {name} images; at least {needed} are needed (evaluate.neighbours is {config.neighbours}). "
                f"{remedy}."
            )


def is_divided(dataset: Dataset, config: EvaluateConfig) -> bool:
    """Return whether training and test images are enough to judge cats and `other` apart from each other."""
    labels = [load_labels(dataset, split) for split in ("train", "test")]
    return all(count >= images_needed(config) for of in labels for count in groups.sizes(of, dataset.classes).values())


def judged_groups(drawn: Tensor, dataset: Dataset, config: EvaluateConfig) -> tuple[str, ...]:
    """Return the groups to measure, the one that the gate reads first, for images with these labels (N,).

    All images are one group if the data have no class `other`, or too few images of it or of cats. Otherwise the cats are
    judged, beside `other` if any were drawn, and beside all if these are drawn in the proportion of the test images: in
    another one, a distance to the test images would be that of the proportions.

    Raises:
        EvaluationError: too few images of a group are drawn in a proportion other than that of the test images.
    """
    needed, generated = images_needed(config), groups.sizes(drawn, dataset.classes)
    in_test = groups.sizes(load_labels(dataset, "test"), dataset.classes)[OTHER]
    as_in_test = abs(generated[OTHER] - len(drawn) * in_test / dataset.test_count) < 1
    if not is_divided(dataset, config) or (as_in_test and min(generated.values()) < needed):
        return (groups.ALL,)
    for group, count in generated.items():
        if count < needed and (group, count) != (OTHER, 0):
            raise EvaluationError(
                f"there are {count} generated images of {group}; at least {needed} are needed. Change evaluate.other_share, or "
                "raise evaluate.samples."
            )
    return (groups.CATS, *([OTHER] if generated[OTHER] else []), *([groups.ALL] if as_in_test else []))


def require_divided(drawn: Tensor, dataset: Dataset, config: EvaluateConfig) -> None:
    """Raise EvaluationError if images with these labels (N,), of a chosen share of `other`, cannot be judged apart from it."""
    if not is_divided(dataset, config):
        raise EvaluationError(
            f"evaluate.other_share is {config.other_share:g}, but cats and {OTHER} can only be judged apart with "
            f"{images_needed(config)} training and test images of each. Add images, or leave it out."
        )
    judged_groups(drawn, dataset, config)


def _check_sets(config: EvaluateConfig, images: Tensor, labels: Tensor, dataset: Dataset) -> None:
    floor = min(dataset.train_count, len(images))
    require_enough({"generated": len(images), "test": dataset.test_count, "training": floor}, config)
    if images.shape[1:] != (3, dataset.image_size, dataset.image_size):
        raise EvaluationError(
            f"the generated images have shape {tuple(images.shape[1:])} but the data set's have "
            f"{(3, dataset.image_size, dataset.image_size)}. Prepare the data at the generator's size."
        )
    if len(labels) != len(images) or not 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.classes):
        raise EvaluationError(
            f"the samples' {len(labels)} labels run from {int(labels.min())} to {int(labels.max())}; {len(images)} labels "
            f"from 0 to {len(dataset.classes) - 1} are needed. Draw the samples for this data set."
        )


@dataclass(frozen=True)
class _Measured:
    """What was measured of one group of images.

    Attributes:
        counts: of generated, test and training images that are compared.
        real: the figures of real images of the group, by `_measure_real`.
    """

    group: str
    generated: Comparison
    counts: Mapping[str, int]
    metrics: Mapping[str, float | None]
    real: Mapping[str, Any]

    def as_figures(self) -> GroupFigures:
        """Return the figures, with the conditions in which they differ from those of the report."""
        own = {**self.counts, "kid_subset_size": self.generated.kid_subset}
        own |= {name: self.real[name] for name in ("trivial_kid", "left_out")}
        return GroupFigures(name=self.group, metrics=dict(self.metrics), floor=self.real["floor"], conditions=own)


def _measure(drawn: Comparison, group: str) -> _Measured:
    """Measure the generated images of a group against the test images of that group, beside its training images."""
    judge, chosen = drawn.judge, groups.members(drawn.labels, drawn.judge.dataset.classes, group)
    real = judge.reference("test", group)
    test, train, made = (int(of.sum()) for of in (judge.members("test", group), judge.members("train", group), chosen))
    counts = {"generated": made, "reference": test, "floor": min(train, made)}
    generated = drawn.only(chosen, real, kid_subset(*counts.values()))
    metrics = measure(generated)
    require_finite(metrics, "the generated images" if group == groups.ALL else f"the generated images of {group}")
    return _Measured(group, generated, counts, metrics, _measure_real(generated, counts["floor"], group))


def _measure_real(generated: Comparison, count: int, group: str) -> dict[str, Any]:
    """Return the figures of real images of a group, from the cache if they are there.

    `floor`: the metrics of `count` training images or of the test images. `trivial_kid`: the KID of `_trivial_images`, by name.
    `left_out`: the copy rates of training images, each held against the others. `classes`: the classifier's accuracy on the test
    images of each class, none without a classifier.
    """
    judge, real, subset, patch_size = generated.judge, generated.real, generated.kid_subset, generated.patch_size

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        (train, train_labels), (test, test_labels) = (judge.group(split, group) for split in ("train", "test"))
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(judge.config.seed))[:count]
        features = {name: layer[chosen] for name, layer in judge.features("train", group).items()}
        training = Comparison(judge, real, train[chosen], train_labels[chosen], features, subset, patch_size, asked=False)
        predictions = judge.predicted_classes(test, real.features)
        held_out = Comparison(judge, real, test, test_labels, real.features, subset, predictions=predictions)
        floor = measure(training, held_out)
        require_finite(floor, "the real training images")
        classes = [] if predictions is None else _accuracies(predictions, test_labels, len(judge.dataset.classes))
        trivial, left_out = _trivial_kid(training, train), judge.left_out(group)._asdict()
        return {}, {"floor": floor, "trivial_kid": trivial, "left_out": left_out, "classes": classes}

    settings = judge.config.model_dump(include={"seed", "neighbours", "kid_subsets"})
    key = [count, subset, patch_size, judge.classifier_sha256]
    return judge.cached(compute, key, settings, *groups.key(group))[1]


def _trivial_kid(training: Comparison, train: Tensor) -> dict[str, float]:
    """Return the KID of generators that have learnt nothing of the images `train`, by name."""
    judge, kid = training.judge, {}
    size = min(training.kid_subset, NOISE_IMAGES // 2)
    for name, images in _trivial_images(train, judge.config.seed).items():
        layer = extract(judge.extractor, images, judge.config.batch_size)[judge.extractor.feature_layer].expand(NOISE_IMAGES, -1)
        distance = kernel_distance(layer, training.real_layer, judge.config.kid_subsets, size, judge.config.seed, resamples=2)
        kid[name] = distance.value
    require_finite(kid, "noise and mean")
    return kid


def _trivial_images(train: Tensor, seed: int) -> dict[str, Tensor]:
    """Return images of generators that have learnt nothing, by name: uint8, a single one if all are the same.

    They are noise, noise in the colours of the data, and the mean training image.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, pixels = (NOISE_IMAGES, *train.shape[1:]), train.float()
    mean = pixels.mean((0, 2, 3), keepdim=True)
    squares = (pixels - mean).square_().sum((2, 3), keepdim=True).sum(0, keepdim=True)  # torch.std takes ten times as long
    deviation = (squares / (pixels[:, 0].numel() - 1)).sqrt()
    drawn = {
        "noise": torch.randint(0, 256, shape, generator=generator),
        "coloured_noise": mean + deviation * torch.randn(shape, generator=generator),
        "mean_image": pixels.mean(0, keepdim=True),
    }
    return {name: images.round().clamp(0, 255).to(torch.uint8) for name, images in drawn.items()}


def _trivial_accuracy(generated: Comparison) -> float | None:
    """Return the breed accuracy of the same images with shuffled labels; None without a classifier."""
    if generated.predictions is None:
        return None
    classes = len(generated.judge.dataset.classes)
    counts = [torch.bincount(of, minlength=classes) / len(of) for of in (generated.predictions, generated.labels)]
    return (counts[0] * counts[1]).sum().item()


def _class_rows(generated: Comparison, floors: Sequence[Sequence[float | None]]) -> list[ClassRow]:
    """Return the accuracy on the images of each class beside the floor, from that of its group; none without a classifier."""
    if generated.predictions is None:
        return []
    names = generated.judge.dataset.classes
    accuracies = _accuracies(generated.predictions, generated.labels, len(names))
    floor = [next((share for share in shares if share is not None), None) for shares in zip(*floors, strict=True)]
    rows = zip(names, accuracies, floor, strict=True)
    return [ClassRow(name=name, breed_accuracy=accuracy, floor=real) for name, accuracy, real in rows]


def _accuracies(predictions: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Return the accuracy on the images of each class; None for a class without images."""
    hits = [(predictions == labels)[labels == label] for label in range(classes)]
    return [of_class.double().mean().item() if len(of_class) else None for of_class in hits]


def _conditions(measured: _Measured, others: Sequence[_Measured], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions of a measurement, but for the figures of trivial images.

    `conditions_hash` is equal for reports that may be compared. Guidance and its interval are not in it: like its weights,
    they belong to a release.
    """
    judge, extractor = measured.generated.judge, measured.generated.judge.extractor
    conditions: dict[str, Any] = {
        **measured.counts,
        "split": "test",
        "image_size": judge.dataset.image_size,
        "dataset": judge.dataset.content,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "layer": extractor.feature_layer,
        "classifier_sha256": judge.classifier_sha256,
        "resize": extractor.resize,
        "kid_subsets": judge.config.kid_subsets,
        "kid_subset_size": measured.generated.kid_subset,
        "is_splits": IS_SPLITS,
        "neighbours": judge.config.neighbours,
        "wide_neighbours": WIDE,
        "resamples": RESAMPLES,
        "seed": judge.config.seed,
        "torch_fidelity": torch_fidelity_version(),
        "runtime": settings.get("runtime"),
        "sampler": {name: settings[name] for name in SAMPLER_SETTINGS if name in settings},
    }
    if measured.group != groups.ALL:
        conditions |= {"group": measured.group, "groups": {other.group: other.counts["generated"] for other in others}}
    if judge.dinov2:
        conditions["dinov2_sha256"] = judge.dinov2.sha256
    conditions["conditions_hash"] = digest_of(conditions)
    conditions |= {name: settings[name] for name in GUIDANCE_SETTINGS if name in settings}
    named = (*SAMPLER_SETTINGS, *GUIDANCE_SETTINGS, "runtime")
    conditions["drawn_by"] = {key: value for key, value in settings.items() if key not in named}
    return conditions | {"device": judge.device.type}


def _notes(measured: _Measured) -> list[str]:
    counts, generated = measured.counts, measured.generated
    sets = f"{counts['generated']} generated, {counts['reference']} test and {counts['floor']} training images"
    width, notes = generated.layer.shape[1], []
    if min(counts.values()) < SETTLED:
        notes.append(
            f"Below {SETTLED:,} images the Fréchet distance is biased upwards ({sets}): compare it only with numbers of the "
            "same counts, such as the floor; KID has no such bias."
        )
    if min(counts.values()) <= width:
        notes.append(f"The covariances of {width} features are of lower rank ({sets}): read the Fréchet distance with care.")
    if counts["generated"] // 2 < width or counts["floor"] // 2 < width:
        notes.append(
            f"The Fréchet distance at infinitely many images needs {2 * width:,} images ({sets}); without it is not given."
        )
    if measured.metrics["patch_step"] is None:
        patch = f"patch_size {generated.patch_size}"
        notes.append(f"patch_step is not given: the samples' settings say {patch}, which has no borders and insides.")
    return notes
