"""The real images of a data set: their features and statistics, computed once and cached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycats_core.config import EvaluateConfig
from tinycats_core.data import groups
from tinycats_core.data.splits import Split, load_split
from tinycats_core.device import pick_exact_device
from tinycats_core.evaluation.classifier import BreedClassifier, predict
from tinycats_core.evaluation.dinov2 import load_dinov2
from tinycats_core.evaluation.distances import Moments, radii
from tinycats_core.evaluation.extractors import FeatureExtractor, extract, load_breed_classifier, load_extractor
from tinycats_core.evaluation.memorization import CopyRates, copy_rates_of_training
from tinycats_core.files import digest_of, make_folder
from tinycats_core.records import Dataset, Weights
from tinycats_core.source_code import code_of, foreign
from tinycats_core.tensors import read_safetensors, write_safetensors

WIDE = 5  # k of density and coverage (2002.09797), and of a second pair of precision and recall
Statistics = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # tensors, and a JSON value


@dataclass(frozen=True)
class Reference:
    """Features of real images by layer, and statistics of the layer that distances are measured in.

    The statistics are the moments, `distances.radii` by the number of neighbours, and the scatter within a class.
    """

    features: Mapping[str, Tensor]
    moments: Moments
    radii: Mapping[int, Tensor]
    scatter: float

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor, extractor: FeatureExtractor, neighbours: int) -> "Reference":
        """Compute the statistics of features, with neighbourhoods of `neighbours` and of WIDE images."""
        layer = features[extractor.feature_layer]
        return cls(features, Moments.of(layer), radii(layer, sorted({neighbours, WIDE})), scatter(layer, labels))


@dataclass(frozen=True)
class Judge:
    """A feature extractor for one data set, with a cache of the real images' statistics in `folder/cache`."""

    extractor: FeatureExtractor
    classifier: BreedClassifier | None
    classifier_sha256: str | None
    dataset: Dataset
    config: EvaluateConfig
    folder: Path
    device: torch.device
    dinov2: FeatureExtractor | None = None
    splits: dict[Split, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, dataset: Dataset, config: EvaluateConfig, classifier: Weights | None, folder: Path, device: str = "auto"
    ) -> "Judge":
        """Load the extractor and the classifier. Raises EvaluationError if one is unavailable or does not fit the data set."""
        target = pick_exact_device(device)
        network = load_breed_classifier(classifier, dataset, target) if classifier else None
        extractor = load_extractor(config.extractor, classifier, target)
        second = load_dinov2(config.dinov2_weights, target) if config.dinov2_weights else None
        return cls(extractor, network, classifier and classifier.sha256, dataset, config, make_folder(folder), target, second)

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of uint8 images (N, 3, S, S) by layer."""
        extractors = [self.extractor, *([self.dinov2] if self.dinov2 else [])]
        return {name: layer for of in extractors for name, layer in extract(of, images, self.config.batch_size).items()}

    def predicted_classes(self, images: Tensor, features: Mapping[str, Tensor]) -> Tensor | None:
        """Return the class that the classifier predicts for each image, (N,); None without a classifier."""
        if not self.classifier:
            return None
        if self.extractor.name == "breed":
            return features["logits"].argmax(1)
        return predict(self.classifier, images, self.config.batch_size).argmax(1)

    def cached(self, compute: Callable[[], Statistics], *key: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return statistics from the cache, computed and written if they are not there.

        They are cached by the extractor, the device, the data set, the code of `compute`, and `key`, JSON values.
        """
        used = self.extractor
        own = [
            used.sha256,
            *([self.dinov2.sha256] if self.dinov2 else []),
            used.feature_layer,
            used.logit_layer,
            self.device.type,
            self.dataset.sha256,
            foreign(compute) or code_of(compute).digest,
        ]
        path = self.folder / "cache" / f"{digest_of([*own, *key])[:16]}.safetensors"
        if not path.is_file():
            computed, facts = compute()
            write_safetensors(path, computed, {"kind": "cache", "facts": facts})
        tensors, header = read_safetensors(path, "cache")  # even if just written, so that the order of names is always the same
        return tensors, header["facts"]

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a split, which is read once."""
        if split not in self.splits:
            self.splits[split] = load_split(self.dataset, split)
        return self.splits[split]

    def features(self, split: Split, group: str = groups.ALL) -> dict[str, Tensor]:
        """Return the features of the images of a split, or of a group of them, by layer."""
        features = self.cached(lambda: (self.extract_features(self.images(split)[0]), {}), split)[0]
        if group == groups.ALL:
            return features
        chosen = self.members(split, group)
        return {name: layer[chosen] for name, layer in features.items()}

    def members(self, split: Split, group: str) -> Tensor:
        """Return which images of a split belong to a group, (N,)."""
        return groups.members(self.images(split)[1], self.dataset.classes, group)

    def group(self, split: Split, group: str) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a group of a split."""
        images, labels = self.images(split)
        if group == groups.ALL:
            return images, labels
        chosen = self.members(split, group)
        return images[chosen], labels[chosen]

    def left_out(self, group: str = groups.ALL) -> CopyRates:
        """Return the copy rates of the training images of a group, each held against the other training images."""
        train, own = self.images("train")[0].to(self.device), self.members("train", group)
        rates = self.cached(lambda: ({}, copy_rates_of_training(train, own)._asdict()), "left out", *groups.key(group))[1]
        return CopyRates(**rates)

    def reference(self, split: Split, group: str = groups.ALL) -> Reference:
        """Return the features and statistics of the images of a split, or of a group of them."""
        features, neighbours = self.features(split, group), self.config.neighbours

        def compute() -> Statistics:
            computed = Reference.of(features, self.group(split, group)[1], self.extractor, neighbours)
            by_neighbours = {str(k): distances for k, distances in computed.radii.items()}
            return {"mean": computed.moments.mean, "root": computed.moments.root, **by_neighbours}, {"scatter": computed.scatter}

        tensors, facts = self.cached(compute, split, neighbours, *groups.key(group))
        moments = Moments(tensors.pop("mean"), tensors.pop("root"))
        return Reference(features, moments, {int(k): tensors[k] for k in sorted(tensors, key=int)}, facts["scatter"])


def scatter(features: Tensor, labels: Tensor) -> float:
    """Return the variance of the features within their class, summed over the features."""
    total, freedom = 0.0, 0
    for label in labels.unique():
        of_class = features[labels == label].double()
        total += (of_class - of_class.mean(0)).square().sum().item()
        freedom += len(of_class) - 1
    return total / max(freedom, 1)
