"""Fidelity as torch-fidelity measures it: generated images against held-out real ones, beside what real ones reach."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tinycats_core.config import EvaluateConfig, SamplerPart
from tinycats_core.device import fast_arithmetic
from tinycats_core.errors import EvaluationError
from tinycats_core.evaluation.distances import RESAMPLES, frechet, kernel_distance, neighbourhoods, patch_step
from tinycats_core.evaluation.extractors import Eyes
from tinycats_core.evaluation.memorization import authenticity, copy_rate, spacing
from tinycats_core.evaluation.reference import WIDE, Facts, Judge, Reference, scatter
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator.sampling import load_samples
from tinycats_core.records import Dataset, FidelityReport, SampleSet, Weights

MIN_IMAGES = 16  # of each set: with fewer a KID subset has not even eight images
SETTLED = 2_048  # images; with fewer FID is mostly its own bias (1911.07023)
KID_SUBSET = 1_000
IS_SPLITS = 10
NOISE_IMAGES = 64  # of each kind at most: all noise looks much the same
SAMPLER_SETTINGS = tuple(name for name in SamplerPart.model_fields if name != "batch_size")
GUIDANCE_SETTINGS = ("guidance", "guidance_interval")  # part of a release, as its weights are

# Conditions in which two reports may differ.
NOT_COMPARED = ("conditions_hash", "drawn_by", "device", "trivial_kid", "trivial_accuracy", *GUIDANCE_SETTINGS)

# Endings of the names of metrics that stand beside another one and say more about it.
DETAILS = ("_low", "_high", "_drawn_std", "_infinite", f"_k{WIDE}")


def evaluate(
    samples: SampleSet,
    dataset: Dataset,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
) -> FidelityReport:
    """Measure generated images against the test split; and, as the floor, real training images in the same way.

    With NAME the extractor, the metrics are

    - `fid_inception` or `fd_breed`, and the same with `_infinite`: extrapolated to infinitely many generated images;
    - `kid_NAME`; `kid_NAME_std`, `_low` and `_high`, its standard error and 95 % interval; and `_drawn_std`, its error over
      other images of the same generator (`distances.kernel_distance`);
    - `is_NAME`;
    - `precision` and `recall`, `density` and `coverage`; `precision_k5` and `recall_k5`;
    - `spread`, the scatter of the features within a class by that of the real images; `distinct`, the share of images that
      are no copy of another;
    - `patch_step`, how much larger the steps between pixels are where two of the network's patches meet (1: no seam shows);
    - `copy_rate` and `authenticity`, by which the images are held against the training images. Their floor is that of the
      test images: what real images that nobody could copy come to;
    - given a classifier, `breed_accuracy`, how often it sees the class that was asked for (floor: its accuracy on the test
      split).

    `conditions` says under what all this was measured. `conditions["trivial_kid"]` is the KID of generators that have
    learnt nothing: noise, noise in the colours of the data, and the mean training image every time;
    `conditions["trivial_accuracy"]` is the breed accuracy of these very images with their labels shuffled.
    `conditions["conditions_hash"]` is equal for reports that may be compared; guidance and its interval are not in it,
    because they belong to a release as its weights do.

    Evaluations can share a folder: each writes a report of its own name, and all read what is known of the real images, which
    is kept in `folder/known`: a second one against the same reference has only the generated images to look at.

    Raises:
        EvaluationError: the sets are too small or do not fit together, the extractor is not to be had, or a metric is
            not finite.
    """
    made, labels = load_samples(samples)
    counts = {"generated": len(made), "reference": dataset.test_count, "floor": min(dataset.train_count, len(made))}
    _check_sets(counts, config, made, labels, dataset)
    judge = Judge.appoint(dataset, config, classifier, folder, device)
    eyes, seed, subset, patch = judge.eyes, config.seed, kid_subset(*counts.values()), samples.settings.get("patch_size")
    seen, real = judge.see(made), judge.reference("test")
    with fast_arithmetic(judge.device):
        of_real = judge.kept(
            lambda: ({}, _of_real_images(judge, real, counts["floor"], subset, patch)),
            [counts["floor"], subset, patch, classifier and classifier.sha256],
            config.model_dump(include={"seed", "neighbours", "kid_subsets"}),
        )[1]
        metrics = {
            **compare(seen, real, eyes, config, subset, labels),
            **_variety(made, labels, seen[eyes.features], real, patch),
            **_memory(judge, made, seen[eyes.features]),
        }
    trivial_accuracy, classes = None, ()
    if (named := judge.named(made, seen)) is not None:
        metrics["breed_accuracy"] = _share(named == labels)
        shares = [torch.bincount(of, minlength=len(dataset.classes)) / len(made) for of in (named, labels)]
        trivial_accuracy = (shares[0] * shares[1]).sum().item()
        drawn = _by_class(named == labels, labels, dataset.classes)
        classes = tuple(
            {"class": name, "breed_accuracy": mine, "floor": real}
            for name, mine, real in zip(dataset.classes, drawn, of_real["classes"], strict=True)
        )
    require_finite(metrics, "the generated images")
    floor, trivial_kid = of_real["floor"], of_real["trivial_kid"]

    conditions = {
        **counts,
        "split": "test",
        "image_size": dataset.image_size,
        "dataset": dataset.content,
        "extractor": eyes.name,
        "extractor_sha256": eyes.sha256,
        "layer": eyes.features,
        "classifier_sha256": classifier.sha256 if classifier else None,
        "resize": eyes.resize,
        "kid_subsets": config.kid_subsets,
        "kid_subset_size": subset,
        "is_splits": IS_SPLITS,
        "neighbours": config.neighbours,
        "wide_neighbours": WIDE,
        "resamples": RESAMPLES,
        "seed": seed,
        "torch_fidelity": _torch_fidelity_version(),
        "runtime": samples.settings.get("runtime"),
        "sampler": {name: samples.settings[name] for name in SAMPLER_SETTINGS if name in samples.settings},
    }
    conditions["conditions_hash"] = digest_of(conditions)
    conditions |= {name: samples.settings[name] for name in GUIDANCE_SETTINGS if name in samples.settings}
    said = (*SAMPLER_SETTINGS, *GUIDANCE_SETTINGS, "runtime")
    conditions["drawn_by"] = {key: value for key, value in samples.settings.items() if key not in said}
    conditions["device"] = judge.device.type
    conditions["trivial_kid"], conditions["trivial_accuracy"] = trivial_kid, trivial_accuracy
    notes = (*eyes.notes, *_notes_on_size(counts, seen[eyes.features].shape[1]))
    if metrics["patch_step"] is None:
        notes += (f"patch_step is not given: the samples' settings say patch_size {patch}, which has no borders and insides.",)
    path = folder / f"fidelity-{digest_of([samples.sha256, conditions['conditions_hash']])[:12]}.json"
    write_json(path, {"metrics": metrics, "floor": floor, "classes": classes, "conditions": conditions, "notes": notes})
    return FidelityReport(
        path=path, sha256=sha256_of(path), metrics=metrics, floor=floor, classes=classes, conditions=conditions, notes=notes
    )


def images_needed(config: EvaluateConfig) -> int:
    """Return how many images a set must have at least."""
    return max(MIN_IMAGES, config.neighbours + 1)


def require_enough(counts: Mapping[str, int], config: EvaluateConfig) -> None:
    """Raise EvaluationError where a set, by its name, has fewer images than can be judged."""
    needed = images_needed(config)
    for name, count in counts.items():
        if count < needed:
            raise EvaluationError(
                f"there are {count} {name} images; at least {needed} are needed (evaluate.neighbours is {config.neighbours}). Add "
                f"images, or {'draw more samples' if name == 'generated' else 'change data.test_fraction'}."
            )


def kid_subset(*counts: int) -> int:
    """Return how many images a subset of KID has, for sets of these sizes."""
    return min(KID_SUBSET, min(counts) // 2)


def compare(
    made: Mapping[str, Tensor],
    real: Reference,
    eyes: Eyes,
    config: EvaluateConfig,
    kid_subset: int,
    labels: Tensor | None = None,
) -> dict[str, float | None]:
    """Return the metrics of the features of one set against those of real images, by the names that `evaluate` gives them.

    `labels` are the classes that the images were asked for, None for a set whose classes are as chance would have them.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    mine, theirs = made[eyes.features], real.features[eyes.features]
    distance = "fid_inception" if eyes.name == "inception" else f"fd_{eyes.name}"
    fid = frechet(mine, real.moments, config.seed)
    kid = kernel_distance(mine, theirs, config.kid_subsets, kid_subset, config.seed, labels)
    near = neighbourhoods(mine, theirs, real.radii)
    score = None
    if eyes.logits:
        score = float(isc_features_to_metric(made[eyes.logits], IS_SPLITS, rng_seed=config.seed)["inception_score_mean"])
    return {
        distance: fid.value,
        f"{distance}_infinite": fid.infinite,
        f"kid_{eyes.name}": kid.value,
        **{f"kid_{eyes.name}_{name}": value for name, value in kid._asdict().items() if name != "value"},
        f"is_{eyes.name}": score,
        "precision": near[config.neighbours]["precision"],
        "recall": near[config.neighbours]["recall"],
        f"precision_k{WIDE}": near[WIDE]["precision"],
        f"recall_k{WIDE}": near[WIDE]["recall"],
        "density": near[WIDE]["density"],
        "coverage": near[WIDE]["coverage"],
    }


def _check_sets(counts: Mapping[str, int], config: EvaluateConfig, made: Tensor, labels: Tensor, dataset: Dataset) -> None:
    names = {"generated": "generated", "reference": "test", "floor": "training"}
    require_enough({names[name]: count for name, count in counts.items()}, config)
    if made.shape[1:] != (3, dataset.image_size, dataset.image_size):
        raise EvaluationError(
            f"the generated images have shape {tuple(made.shape[1:])} but the data set's have "
            f"{(3, dataset.image_size, dataset.image_size)}. Prepare the data at the generator's size."
        )
    if len(labels) != len(made) or not 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.classes):
        raise EvaluationError(
            f"the samples' {len(labels)} labels run from {int(labels.min())} to {int(labels.max())}; {len(made)} labels "
            f"from 0 to {len(dataset.classes) - 1} are needed. Draw the samples for this data set."
        )


def _trivial_images(train: Tensor, seed: int) -> dict[str, Tensor]:
    """Return what generators that have learnt nothing draw, by name: uint8 images, one where all are the same."""
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


def _of_real_images(judge: Judge, real: Reference, count: int, subset: int, patch: int | None) -> Facts:
    """Return the floor, the metrics of `count` training images; the KID of generators that have learnt nothing; and how often the
    classifier is right of the test images of each class."""
    config, layer = judge.config, judge.eyes.features
    train, train_labels = judge.images("train")
    test, test_labels = judge.images("test")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))[:count]
    seen = {name: features[chosen] for name, features in judge.features("train").items()}
    floor = {
        **compare(seen, real, judge.eyes, config, subset),
        **_variety(train[chosen], train_labels[chosen], seen[layer], real, patch),
        **_memory(judge, test, real.features[layer]),
    }
    classes = []
    if (named := judge.named(test, real.features)) is not None:
        floor["breed_accuracy"] = _share(named == test_labels)
        classes = _by_class(named == test_labels, test_labels, judge.dataset.classes)
    require_finite(floor, "the real training images")
    size, trivial_kid = min(subset, NOISE_IMAGES // 2), {}
    for name, images in _trivial_images(train, config.seed).items():
        drawn = judge.see(images)[layer].expand(NOISE_IMAGES, -1)
        found = kernel_distance(drawn, real.features[layer], config.kid_subsets, size, config.seed, resamples=2)
        trivial_kid[name] = found.value
    require_finite(trivial_kid, "noise and mean")
    return {"floor": floor, "trivial_kid": trivial_kid, "classes": classes}


def _variety(images: Tensor, labels: Tensor, features: Tensor, real: Reference, patch: int | None) -> dict[str, float | None]:
    return {
        "spread": scatter(features, labels) / real.scatter if real.scatter else None,
        "distinct": _distinct(images),
        "patch_step": patch_step(images, patch) if patch else None,
    }


def _memory(judge: Judge, images: Tensor, features: Tensor) -> dict[str, float | None]:
    """Return what says how near images and their features are to those of training images."""
    device, layer = judge.device, judge.eyes.features
    train, known = judge.images("train")[0].to(device), judge.features("train")[layer].to(device)
    apart = judge.kept(lambda: ({"spacing": spacing(known)}, {}), "train", "spacing")[0]["spacing"]
    return {
        "copy_rate": copy_rate(images.to(device), train),
        "authenticity": authenticity(features.to(device), known, apart.to(device)),
    }


def _by_class(hits: Tensor, labels: Tensor, classes: Sequence[str]) -> list[float | None]:
    """Return the share of hits among the images of each class; None for a class without images."""
    return [_share(hits[labels == label]) if (labels == label).any() else None for label in range(len(classes))]


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _distinct(images: Tensor) -> float:
    """Return the share of images that are left when copies are taken out."""
    return len({image.numpy().tobytes() for image in images}) / len(images)


def require_finite(metrics: Mapping[str, float | None], of: str) -> None:
    """Raise EvaluationError for a metric that is neither finite nor left out."""
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            raise EvaluationError(f"{name} of {of} is {value}; it must be finite. Look at the images and the extractor's weights.")


def _notes_on_size(counts: Mapping[str, int], width: int) -> list[str]:
    sets = f"{counts['generated']} generated, {counts['reference']} test and {counts['floor']} training images"
    notes = []
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
    return notes


def _torch_fidelity_version() -> str:
    import torch_fidelity

    return torch_fidelity.__version__
