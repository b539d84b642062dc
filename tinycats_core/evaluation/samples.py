"""Sample sets: images drawn from a model, with the classes of a data set."""

import logging
from pathlib import Path

from tinycats_core.config import SampleConfig
from tinycats_core.data.splits import load_split
from tinycats_core.device import pick_device
from tinycats_core.errors import EvaluationError
from tinycats_core.generator.onnx_file import onnx_velocity
from tinycats_core.generator.sampling import generate, labels_like
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Dataset, OnnxModel, SampleSet, Weights

logger = logging.getLogger("tinycats.samples")


def draw_samples(
    model: Weights | OnnxModel,
    dataset: Dataset,
    config: SampleConfig,
    count: int,
    path: Path,
    device: str = "auto",
    occasion: str = "",
) -> SampleSet:
    """Draw `count` images, with the classes in the proportions of the test images, and write them to `path`.

    Args:
        device: of the weights; an ONNX file runs on the CPU.
        occasion: recorded in the settings, so that the same images drawn again are another sample set.

    Raises:
        TinycatsError: the model's file is missing or has changed.
        EvaluationError: the model draws other classes or another size than those of the data set.
    """
    classes, size = dataset.classes, dataset.image_size
    labels = labels_like(load_split(dataset, "test")[1], count, len(classes))
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
