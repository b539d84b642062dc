"""The sampling stage: draw images from a checkpoint or from an ONNX file."""

from PIL import Image

from tasks import show
from tasks.stage import key_of, log, stage
from tinycats_core import pictures
from tinycats_core.config import ComputeConfig, SampleConfig
from tinycats_core.data import splits
from tinycats_core.device import pick_device
from tinycats_core.errors import EvaluationError
from tinycats_core.files import home
from tinycats_core.generator import onnx_file, sampling, weights
from tinycats_core.records import Dataset, OnnxModel, Picture, SampleSet, Weights


@stage(version=2)
def generate_samples(
    model: Weights | OnnxModel, dataset: Dataset, config: SampleConfig, count: int, compute: ComputeConfig, occasion: str = ""
) -> SampleSet:
    """Draw `count` images, with the classes in the proportions of the held-out images; anew for each occasion."""
    labels = sampling.labels_like(splits.load_split(dataset, "test")[1], count, len(dataset.classes))
    path = home() / "samples" / key_of(model, dataset, config, count, occasion) / "samples.safetensors"
    model.verify()
    if isinstance(model, OnnxModel):
        velocity, device, runtime = onnx_file.onnx_velocity(model.path), "cpu", f"onnx-{model.precision}"
        patch_size = model.facts.get("patch_size")
    else:
        device, runtime = pick_device(compute.device), "pytorch"
        velocity, header = weights.load_generator(model.path, device)
        patch_size = header.model.patch_size
        if (header.model.image_size, header.classes) != (dataset.image_size, dataset.classes):
            raise EvaluationError(
                f"{model.path} draws {len(header.classes)} classes at {header.model.image_size} px, but the data set "
                f"has {len(dataset.classes)} at {dataset.image_size} px. Give a release of another kind another "
                "publish.name."
            )
    log().info("drawing %d images with %s, %s, %d steps", count, runtime, config.sampler, config.steps)
    settings = {"model": model.sha256, "runtime": runtime, "occasion": occasion, "patch_size": patch_size}
    samples = sampling.generate(velocity, labels, dataset.image_size, len(dataset.classes), config, path, settings, device)
    images, _ = sampling.load_samples(samples)
    sheet = pictures.contact_sheet(images, labels, dataset.classes, scale=max(1, 64 // dataset.image_size))
    show.picture("sample-grid", sheet, f"Images drawn with {runtime}, a row a class")
    return samples


@stage(version=1)
def compare_with_raw(ema: Weights, raw: Weights, config: SampleConfig, compute: ComputeConfig) -> Picture:
    """Draw from the average and from the weights that no average was taken of: the same noise and classes."""
    path = home() / "samples" / key_of(ema, raw, config) / "ema_and_raw.png"
    picture = sampling.draw_ema_and_raw(ema, raw, config, path, pick_device(compute.device))
    with Image.open(path) as sheet:
        show.picture("ema-and-raw", sheet, "From the same noise: the average that is shipped, and the raw weights at its right")
    return picture
