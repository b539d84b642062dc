"""The sampling stage: draw images from weights or from an ONNX file."""

from PIL import Image

from tasks import show
from tasks.cache import key_of
from tasks.stage import stage
from tinycats_core import pictures
from tinycats_core.config import ComputeConfig, SampleConfig
from tinycats_core.device import pick_device
from tinycats_core.evaluation.samples import draw_samples
from tinycats_core.files import home
from tinycats_core.generator import sampling
from tinycats_core.records import Dataset, OnnxModel, Picture, SampleSet, Weights


@stage(draw_samples)
def generate_samples(
    model: Weights | OnnxModel,
    dataset: Dataset,
    config: SampleConfig,
    count: int,
    compute: ComputeConfig,
    occasion: str = "",
    other_share: float | None = None,
) -> SampleSet:
    """Draw `count` images with the classes in the proportions of the test images, anew for each occasion."""
    path = home("samples") / key_of(model, dataset, config, count, occasion, other_share) / "samples.safetensors"
    samples = draw_samples(model, dataset, config, count, path, compute.device, occasion, other_share)
    show_samples(samples, dataset)
    return samples


def show_samples(samples: SampleSet, dataset: Dataset) -> None:
    """Show the first images of a sample set."""
    images, labels = sampling.load_samples(samples)
    sheet = pictures.contact_sheet(images, labels, dataset.classes, scale=max(1, 64 // dataset.image_size))
    show.picture("sample-grid", sheet, f"Images drawn with {samples.settings['runtime']}, a row a class")


@stage(sampling.draw_ema_and_raw)
def compare_with_raw(ema: Weights, raw: Weights, config: SampleConfig, compute: ComputeConfig) -> Picture:
    """Draw from the EMA weights and from the raw weights, with the same noise and classes."""
    path = home("samples") / key_of(ema, raw, config) / "ema_and_raw.png"
    picture = sampling.draw_ema_and_raw(ema, raw, config, path, pick_device(compute.device))
    with Image.open(path) as sheet:
        show.picture("ema-and-raw", sheet, "From the same noise: the shipped EMA weights, and the raw weights to their right")
    return picture
