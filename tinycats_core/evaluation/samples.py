"""Sample sets: images drawn from a model, with the classes of a data set."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from tinycats_core.config import OTHER, SampleConfig
from tinycats_core.data import groups
from tinycats_core.data.splits import load_labels
from tinycats_core.device import pick_device
from tinycats_core.errors import EvaluationError
from tinycats_core.generator.onnx_file import onnx_velocity
from tinycats_core.generator.sampling import generate, labels_like
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Dataset, OnnxModel, SampleSet, Weights

logger = logging.getLogger("tinycats.samples")


def labels_to_draw(dataset: Dataset, count: int, other_share: float | None = None) -> Tensor:
    """Return the labels of `count` images, (count,), sorted by class, in the proportions of the test images.

    Args:
        other_share: of the class `other`. The cats are in the proportions of the test images among each other.

    Raises:
        ConfigError: `other_share` is given, but there is no such class.
    """
    test, classes = load_labels(dataset, "test"), dataset.classes
    if other_share is None:
        return labels_like(test, count, len(classes))
    groups.require_other(classes, "evaluate.other_share", other_share)
    other = groups.members(test, classes, OTHER)
    parts = [labels_like(test[other], round(count * other_share), len(classes))]
    parts.append(labels_like(test[~other], count - len(parts[0]), len(classes)))
    return torch.cat(parts).sort().values


def draw_samples(
    model: Weights | OnnxModel,
    dataset: Dataset,
    config: SampleConfig,
    count: int,
    path: Path,
    device: str = "auto",
    occasion: str = "",
    other_share: float | None = None,
) -> SampleSet:
    """Draw `count` images, with the classes in the proportions of the test images, and write them to `path`.

    Args:
        device: of the weights; an ONNX file runs on the CPU.
        occasion: recorded in the settings, so that the same images drawn again are another sample set.
        other_share: of the class `other` among the images, in place of that among the test images.

    Raises:
        ConfigError: `other_share` is given, but there is no such class.
        TinycatsError: the model's file is missing or has changed.
        EvaluationError: the model draws other classes or another size than those of the data set.
    """
    classes, size = dataset.classes, dataset.image_size
    labels = labels_to_draw(dataset, count, other_share)
    model.verify()
    if isinstance(model, OnnxModel):
        velocity, target, runtime = onnx_velocity(model.path), "cpu", f"onnx-{model.precision}"
        patch_size = model.facts.get("patch_size")
    else:
        target, runtime = pick_device(device), "pytorch"
        velocity, header = load_generator(model.path, target)
        patch_size = header.model.patch_size
        if (header.model.image_size, header.classes) != (size, classes):
            raise EvaluationError(
                f"{model.path} draws {len(header.classes)} classes at {header.model.image_size} px, but the data set has "
                f"{len(classes)} at {size} px. Give a release of another kind another publish.name."
            )
    logger.info("drawing %d images with %s, %s, %d steps", count, runtime, config.sampler, config.steps)
    settings = {"model": model.sha256, "runtime": runtime, "occasion": occasion, "patch_size": patch_size}
    return generate(velocity, labels, size, len(classes), config, path, settings, target)
