"""Fidelity as torch-fidelity measures it: generated images against held-out real ones, beside what real ones reach."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinycats_core import distances, memorization
from tinycats_core.checkpoint import read_safetensors, write_safetensors
from tinycats_core.classifier import BreedClassifier, load_classifier, predict
from tinycats_core.config import EvaluateConfig, SamplerPart
from tinycats_core.data import Split, load_split
from tinycats_core.device import fast_arithmetic, pick_device
from tinycats_core.distances import (
    RESAMPLES,
    Moments,
    frechet,
    kernel_distance,
    neighbourhoods,
    patch_step,
    radii,
)
from tinycats_core.errors import EvaluationError
from tinycats_core.files import digest_of, expanded, make_folder, sha256_of, write_json
from tinycats_core.memorization import authenticity, copy_rate, spacing
from tinycats_core.records import Checkpoint, Dataset, FidelityReport, SampleSet
from tinycats_core.sampling import load_samples

MIN_IMAGES = 16  # of each set: with fewer a KID subset has not even eight images
SETTLED = 2_048  # images; with fewer FID is mostly its own bias (1911.07023)
KID_SUBSET = 1_000
IS_SPLITS = 10
WIDE = 5  # k of density and coverage (2002.09797), and of a second pair of precision and recall
OFFICIAL_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NOISE_IMAGES = 64  # of each kind at most: all noise looks much the same
SAMPLER_SETTINGS = tuple(name for name in SamplerPart.model_fields if name != "batch_size")
GUIDANCE_SETTINGS = ("guidance", "guidance_interval")  # part of a release, as its weights are
# Conditions in which two reports may differ.
NOT_COMPARED = ("conditions_hash", "drawn_by", "device", "trivial_kid", "trivial_accuracy", *GUIDANCE_SETTINGS)
# Endings of the names of metrics that stand beside another one and say more about it.
DETAILS = ("_low", "_high", "_drawn_std", "_infinite", f"_k{WIDE}")


Known = Mapping[str, Tensor]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Eyes:
    """A feature extractor of torch-fidelity and what is to be said of it. Without `logits` there is no score (IS)."""

    name: str
    network: nn.Module  # uint8 (N, 3, S, S) to one tensor a layer: `features`, then `logits` if there are any
    features: str
    logits: str | None
    sha256: str
    resize: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Real images as eyes have seen them.

    `features` are by layer, the rest is about the layer that distances are measured in: moments, `distances.radii`, and the
    scatter within a class.
    """

    features: Mapping[str, Tensor]
    moments: Moments
    radii: Mapping[int, Tensor]
    scatter: float

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor, eyes: Eyes, neighbours: int) -> "Reference":
        """Return what is to be known of images by their features, for neighbourhoods of so many neighbours."""
        layer = features[eyes.features]
        return cls(features, Moments.of(layer), radii(layer, sorted({neighbours, WIDE})), _scatter(layer, labels))


@dataclass(frozen=True)
class Judge:
    """Eyes for one data set. What they know of its real images is kept in `folder/known`, and read by all."""

    eyes: Eyes
    breeds: BreedClassifier | None
    dataset: Dataset
    config: EvaluateConfig
    folder: Path
    device: torch.device
    splits: dict[Split, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def appoint(
        cls, dataset: Dataset, config: EvaluateConfig, classifier: Checkpoint | None, folder: Path, device: str = "auto"
    ) -> "Judge":
        """Return a judge. Raises EvaluationError where the extractor is not to be had or does not fit the data set."""
        target = pick_device(device)
        breeds = _load_breeds(classifier, dataset, target) if classifier else None
        eyes = inception(target) if config.extractor == "inception" else _breed(classifier, target)
        return cls(eyes, breeds, dataset, config, make_folder(folder), target)

    def see(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of uint8 images (N, 3, S, S) by layer."""
        return extract(self.eyes, images, self.config.batch_size)

    def named(self, images: Tensor, seen: Mapping[str, Tensor]) -> Tensor | None:
        """Return the class that the classifier takes each image for; None without a classifier."""
        if not self.breeds:
            return None
        logits = seen["logits"] if self.eyes.name == "breed" else predict(self.breeds, images, self.config.batch_size)
        return logits.argmax(1)

    def kept(self, make: Callable[[], tuple[Known, Facts]], *source: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the eyes, the data set and `source`, a JSON value, decide: from the folder, or made now and kept."""
        eyes = self.eyes
        key = digest_of([eyes.sha256, eyes.features, eyes.logits, self.device.type, self.dataset.sha256, _code(), *source])
        path = self.folder / "known" / f"{key[:16]}.safetensors"
        if not path.is_file():
            known, facts = make()
            write_safetensors(path, known, {"kind": "known", "facts": facts})
        tensors, header = read_safetensors(path, "known")  # when just made, too: so it is the same to the order of its names
        return tensors, header["facts"]

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a split, which is read once."""
        if split not in self.splits:
            self.splits[split] = load_split(self.dataset, split)
        return self.splits[split]

    def features(self, split: Split) -> dict[str, Tensor]:
        """Return the features of all images of a split, by layer."""
        return self.kept(lambda: (self.see(self.images(split)[0]), {}), split)[0]

    def reference(self, split: Split) -> Reference:
        """Return what is to be known of all images of a split."""
        features, neighbours = self.features(split), self.config.neighbours

        def make() -> tuple[Known, Facts]:
            found = Reference.of(features, self.images(split)[1], self.eyes, neighbours)
            reach = {str(k): distances for k, distances in found.radii.items()}
            return {"mean": found.moments.mean, "root": found.moments.root, **reach}, {"scatter": found.scatter}

        tensors, facts = self.kept(make, split, neighbours)
        moments = Moments(tensors.pop("mean"), tensors.pop("root"))
        return Reference(features, moments, {int(k): tensors[k] for k in sorted(tensors, key=int)}, facts["scatter"])


def evaluate(
    samples: SampleSet,
    dataset: Dataset,
    config: EvaluateConfig,
    classifier: Checkpoint | None,
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


def inception_weights() -> Path:
    """Return the file of Inception's weights: the one that TINYCATS_INCEPTION_WEIGHTS names, or the official one, downloaded.

    Raises:
        EvaluationError: there is no such file, or it cannot be downloaded.
    """
    named = os.environ.get("TINYCATS_INCEPTION_WEIGHTS")
    if not named:
        return _official_inception()
    with suppress(OSError, ValueError):  # a folder that is closed, a name that is too long, a user who is not known
        if (path := expanded(named)).is_file():
            return path
    raise EvaluationError(
        f"TINYCATS_INCEPTION_WEIGHTS is {named}, which is not a file that can be found. Give torch-fidelity's InceptionV3 "
        "weights, or unset it to have them downloaded."
    )


@torch.inference_mode()
def extract(eyes: Eyes, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Return the features of uint8 images (N, 3, S, S) by layer, each float32 (N, D) on the CPU.

    Raises:
        EvaluationError: a feature is not finite.
    """
    device = next(eyes.network.parameters()).device
    with fast_arithmetic(device):
        batches = [eyes.network(batch.to(device)) for batch in images.split(batch_size)]
    layers = [eyes.features, *([eyes.logits] if eyes.logits else [])]
    found = {name: torch.cat([batch[i].cpu() for batch in batches]) for i, name in enumerate(layers)}
    for name, features in found.items():
        if not features.isfinite().all():
            raise EvaluationError(
                f"the {name} of the {eyes.name} extractor hold nan or inf; they must be finite. Its weights (sha256 "
                f"{eyes.sha256[:12]}…) are damaged: make them again."
            )
    return found


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


def breed_extractor() -> str:
    """Register the breed classifier with torch-fidelity, once, and return its name there.

    `feature_extractor_weights_path` is a classifier's file; the layers are `unit_features` (its features at a root mean
    square of 1) and `logits`.
    """
    return _register_breed_extractor()


@cache
def _register_breed_extractor() -> str:
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    class FeatureExtractorBreed(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
            super().__init__(name, features_list)
            self.classifier = load_classifier(Path(feature_extractor_weights_path))

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            features = self.classifier.features(input)
            # Their length says how sure the classifier is, not what it sees. A few long ones would decide KID, which
            # takes the third power: its error falls by a factor of five or more against what it has to tell apart.
            unit = F.rms_norm(features, features.shape[-1:], eps=1e-6)
            found = {"unit_features": unit, "logits": self.classifier.head(features)}
            return tuple(found[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "unit_features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "unit_features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    name = "tinycats-breed"
    register_feature_extractor(name, FeatureExtractorBreed)
    return name


def _breed(classifier: Checkpoint | None, device: torch.device) -> Eyes:
    from torch_fidelity.utils import create_feature_extractor

    if classifier is None:
        raise EvaluationError(
            "evaluate.extractor is 'breed' but there is no classifier. Train one first, or set it to 'inception'."
        )
    network = create_feature_extractor(
        breed_extractor(),
        ["unit_features", "logits"],
        cuda=False,
        feature_extractor_weights_path=str(classifier.path),
        verbose=False,
    )
    return Eyes(
        name="breed",
        network=network.to(device),
        features="unit_features",
        logits="logits",
        sha256=classifier.sha256,
        resize="none",
        notes=("fd_breed, kid_breed and is_breed are seen by this classifier: compare them only under the same one.",),
    )


def inception(device: torch.device | str = "cpu") -> Eyes:
    """Return torch-fidelity's InceptionV3 with its official weights, downloaded if need be, or with the file that a person names.

    Raises:
        EvaluationError: there is no such file, it holds something else, or it cannot be downloaded.
    """
    from torch_fidelity.utils import create_feature_extractor

    path = inception_weights()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # refuses code in the file; what follows does not
        has_head = bool(weights["fc.weight"].any())
        network = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"] if has_head else ["2048"],
            cuda=False,
            feature_extractor_weights_path=str(path),
            verbose=False,
        )
    except (UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EvaluationError(
            f"{path} ({path.stat().st_size:,} bytes) does not hold torch-fidelity's InceptionV3 weights: {reason[0][:200]} "
            "Give the right file in TINYCATS_INCEPTION_WEIGHTS, or unset it and delete this file to have it downloaded."
        ) from None
    sha256 = sha256_of(path)
    notes = []
    if sha256 != OFFICIAL_INCEPTION:
        notes.append("The Inception weights are not torch-fidelity's official file: compare only under the same sha256.")
    if not has_head:
        notes.append("is_inception is not given: the last layer of the Inception weights is all zeros.")
    return Eyes(
        name="inception",
        network=network.to(device, memory_format=torch.channels_last),  # twice as fast on a CPU
        features="2048",
        logits="logits_unbiased" if has_head else None,
        sha256=sha256,
        resize="299 px, bilinear as in TensorFlow 1",
        notes=tuple(notes),
    )


def _official_inception() -> Path:
    """Return torch-fidelity's weights in PyTorch's cache, downloaded and checked if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.is_file():
        make_folder(path.parent)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=OFFICIAL_INCEPTION, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no such page, or another file than the one expected
            raise EvaluationError(
                f"the Inception weights cannot be downloaded from {URL_INCEPTION_V3} ({error}). Set "
                "TINYCATS_INCEPTION_WEIGHTS to the file, or evaluate.extractor to 'breed'."
            ) from None
    return path


def _load_breeds(classifier: Checkpoint, dataset: Dataset, device: torch.device) -> BreedClassifier:
    breeds = load_classifier(classifier.verify().path, device)
    if breeds.classes != dataset.classes:
        odd = sorted(set(breeds.classes) ^ set(dataset.classes)) or ["their order"]
        raise EvaluationError(
            f"the classifier's classes are not the data set's; they differ in {', '.join(odd)}. Train it on this data set."
        )
    if breeds.image_size != dataset.image_size:
        raise EvaluationError(
            f"the classifier was trained at {breeds.image_size} px but the images have {dataset.image_size} px. "
            "Train it on this data set."
        )
    return breeds


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
        "spread": _scatter(features, labels) / real.scatter if real.scatter else None,
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


@cache
def _code() -> str:
    """Return a digest of what computes the metrics: figures that other code has kept are not taken for its own."""
    return digest_of([sha256_of(Path(module.__file__ or "")) for module in (distances, memorization, sys.modules[__name__])])


def _scatter(features: Tensor, labels: Tensor) -> float:
    """Return the variance of the features within their class, summed over the features."""
    total, freedom = 0.0, 0
    for label in labels.unique():
        of_class = features[labels == label].double()
        total += (of_class - of_class.mean(0)).square().sum().item()
        freedom += len(of_class) - 1
    return total / max(freedom, 1)


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
