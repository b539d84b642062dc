"""What is known of the real images, computed once and kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycats_core.config import EvaluateConfig
from tinycats_core.data.splits import Split, load_split
from tinycats_core.device import pick_device
from tinycats_core.evaluation.classifier import BreedClassifier, predict
from tinycats_core.evaluation.distances import Moments, radii
from tinycats_core.evaluation.extractors import Eyes, breed_eyes, extract, inception, load_breeds
from tinycats_core.files import digest_of, make_folder, sha256_of
from tinycats_core.records import Dataset, Weights
from tinycats_core.tensors import read_safetensors, write_safetensors

WIDE = 5  # k of density and coverage (2002.09797), and of a second pair of precision and recall
Known = Mapping[str, Tensor]
Facts = Mapping[str, Any]


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
        return cls(features, Moments.of(layer), radii(layer, sorted({neighbours, WIDE})), scatter(layer, labels))


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
        cls, dataset: Dataset, config: EvaluateConfig, classifier: Weights | None, folder: Path, device: str = "auto"
    ) -> "Judge":
        """Return a judge. Raises EvaluationError where the extractor is not to be had or does not fit the data set."""
        target = pick_device(device)
        breeds = load_breeds(classifier, dataset, target) if classifier else None
        eyes = inception(target) if config.extractor == "inception" else breed_eyes(classifier, target)
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


@cache
def _code() -> str:
    """Return a digest of what computes the metrics: figures that other code has kept are not taken for its own."""
    return digest_of([sha256_of(path) for path in sorted(Path(__file__).parent.glob("*.py"))])


def scatter(features: Tensor, labels: Tensor) -> float:
    """Return the variance of the features within their class, summed over the features."""
    total, freedom = 0.0, 0
    for label in labels.unique():
        of_class = features[labels == label].double()
        total += (of_class - of_class.mean(0)).square().sum().item()
        freedom += len(of_class) - 1
    return total / max(freedom, 1)
