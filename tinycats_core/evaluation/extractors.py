"""Feature extractors: torch-fidelity's Inception and the breed classifier."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinycats_core.device import fast_arithmetic
from tinycats_core.errors import EvaluationError
from tinycats_core.evaluation.classifier import BreedClassifier, load_classifier
from tinycats_core.files import expanded, make_folder, sha256_of
from tinycats_core.progress import steps
from tinycats_core.records import Dataset, Weights

OFFICIAL_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class FeatureExtractor:
    """A torch-fidelity feature extractor and its provenance. Without `logit_layer` there is no Inception Score."""

    name: str
    network: nn.Module  # uint8 (N, 3, S, S) to one tensor a layer: `feature_layer`, then `logit_layer` if there is one
    feature_layer: str
    logit_layer: str | None
    sha256: str
    resize: str
    notes: tuple[str, ...] = ()

    @property
    def frechet_name(self) -> str:
        """The name of the Fréchet distance of its features: only Inception's is called FID."""
        return "fid_inception" if self.name == "inception" else f"fd_{self.name}"


def inception_weights() -> Path:
    """Return the file of Inception's weights: the one in TINYCATS_INCEPTION_WEIGHTS, or else the official one, downloaded.

    Raises:
        EvaluationError: there is no such file, or it cannot be downloaded.
    """
    setting = os.environ.get("TINYCATS_INCEPTION_WEIGHTS")
    if not setting:
        return _official_inception()
    with suppress(OSError, ValueError):  # an unreadable folder, a name that is too long, an unknown user
        if (path := expanded(setting)).is_file():
            return path
    raise EvaluationError(
        f"TINYCATS_INCEPTION_WEIGHTS is {setting}, which is not a file that can be found. Give torch-fidelity's InceptionV3 "
        "weights, or unset it to have them downloaded."
    )


@torch.inference_mode()
def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Return the features of uint8 images (N, 3, S, S) by layer, each float32 (N, D) on the CPU.

    Raises:
        EvaluationError: a feature is not finite.
    """
    device = next(extractor.network.parameters()).device
    # A GPU's convolutions use TF32 by default: Inception's features then differ by 1.5e-3 from a CPU's, instead of 1.8e-6.
    with fast_arithmetic(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        batches = [extractor.network(batch.to(device)) for batch in steps(images.split(batch_size), "measuring")]
    layers = [extractor.feature_layer, *([extractor.logit_layer] if extractor.logit_layer else [])]
    features = {name: torch.cat([batch[i].cpu() for batch in batches]) for i, name in enumerate(layers)}
    for name, layer in features.items():
        if not layer.isfinite().all():
            raise EvaluationError(
                f"the {name} of the {extractor.name} extractor hold nan or inf; they must be finite. Its weights (sha256 "
                f"{extractor.sha256[:12]}…) are damaged: make them again."
            )
    return features


@cache
def register_breed_extractor() -> str:
    """Register the breed classifier with torch-fidelity, once, and return its name there.

    `feature_extractor_weights_path` is a classifier's file; the layers are `unit_features` (its features scaled to a root
    mean square of 1) and `logits`.
    """
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    class FeatureExtractorBreed(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
            super().__init__(name, features_list)
            self.classifier = load_classifier(Path(feature_extractor_weights_path))

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            features = self.classifier.features(input)
            # The length of a feature vector measures confidence, not content. KID takes the third power, so a few long
            # vectors would dominate it; without their lengths its error relative to the differences is five times less.
            unit = F.rms_norm(features, features.shape[-1:], eps=1e-6)
            layers = {"unit_features": unit, "logits": self.classifier.head(features)}
            return tuple(layers[name] for name in self.features_list)

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


def load_extractor(name: str, classifier: Weights | None, device: torch.device) -> FeatureExtractor:
    """Load the feature extractor of `evaluate.extractor`. Raises EvaluationError if it is unavailable."""
    return load_inception(device) if name == "inception" else _load_breed_extractor(classifier, device)


def _load_breed_extractor(classifier: Weights | None, device: torch.device) -> FeatureExtractor:
    from torch_fidelity.utils import create_feature_extractor

    if classifier is None:
        raise EvaluationError(
            "evaluate.extractor is 'breed' but there is no classifier. Train one first, or set it to 'inception'."
        )
    network = create_feature_extractor(
        register_breed_extractor(),
        ["unit_features", "logits"],
        cuda=False,
        feature_extractor_weights_path=str(classifier.path),
        verbose=False,
    )
    return FeatureExtractor(
        name="breed",
        network=network.to(device),
        feature_layer="unit_features",
        logit_layer="logits",
        sha256=classifier.sha256,
        resize="none",
        notes=("fd_breed, kid_breed and is_breed are seen by this classifier: compare them only under the same one.",),
    )


def load_inception(device: torch.device | str = "cpu") -> FeatureExtractor:
    """Load torch-fidelity's InceptionV3 with the weights of `inception_weights`.

    Raises:
        EvaluationError: there is no such file, it holds something else, or it cannot be downloaded.
    """
    from torch_fidelity.utils import create_feature_extractor

    path = inception_weights()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # refuses code in the file; torch-fidelity does not
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
    sha256, notes = sha256_of(path), []
    if sha256 != OFFICIAL_INCEPTION:
        notes.append("The Inception weights are not torch-fidelity's official file: compare only under the same sha256.")
    if not has_head:
        notes.append("is_inception is not given: the last layer of the Inception weights is all zeros.")
    return FeatureExtractor(
        name="inception",
        network=network.to(device, memory_format=torch.channels_last),  # twice as fast on a CPU
        feature_layer="2048",
        logit_layer="logits_unbiased" if has_head else None,
        sha256=sha256,
        resize="299 px, bilinear as in TensorFlow 1",
        notes=tuple(notes),
    )


def official_inception_path() -> Path:
    """Return where torch-fidelity's weights lie once they are downloaded: PyTorch's cache."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def _official_inception() -> Path:
    """Return torch-fidelity's weights in PyTorch's cache, downloaded and verified if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = official_inception_path()
    if not path.is_file():
        make_folder(path.parent)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=OFFICIAL_INCEPTION, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no such page, or another file than expected
            raise EvaluationError(
                f"the Inception weights cannot be downloaded from {URL_INCEPTION_V3} ({error}). Set "
                "TINYCATS_INCEPTION_WEIGHTS to the file, or evaluate.extractor to 'breed'."
            ) from None
    return path


def load_breed_classifier(classifier: Weights, dataset: Dataset, device: torch.device) -> BreedClassifier:
    """Load a classifier for the images of a data set. Raises EvaluationError if its classes or its image size differ."""
    network = load_classifier(classifier.verify().path, device)
    if network.classes != dataset.classes:
        odd = sorted(set(network.classes) ^ set(dataset.classes)) or ["their order"]
        raise EvaluationError(
            f"the classifier's classes are not the data set's; they differ in {', '.join(odd)}. Train it on this data set."
        )
    if network.image_size != dataset.image_size:
        raise EvaluationError(
            f"the classifier was trained at {network.image_size} px but the images have {dataset.image_size} px. "
            "Train it on this data set."
        )
    return network
