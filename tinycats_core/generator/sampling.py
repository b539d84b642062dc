"""Drawing images by the samplers of `samplers`, with classifier-free guidance, seeded image by image."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycats_core import threads
from tinycats_core.config import SampleConfig
from tinycats_core.device import fast_arithmetic
from tinycats_core.errors import ConfigError
from tinycats_core.files import sha256_of, write_atomically
from tinycats_core.generator.drawing import noise
from tinycats_core.generator.samplers import integrate, plan_of
from tinycats_core.generator.weights import load_generator
from tinycats_core.pictures import contact_sheet
from tinycats_core.progress import steps
from tinycats_core.records import Picture, SampleSet, Weights
from tinycats_core.tensors import read_safetensors, write_safetensors

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A velocity field: noisy images (B, 3, S, S), times (B,), labels (B,) to velocities (B, 3, S, S)."""


def labels_like(labels: Tensor, count: int, num_classes: int) -> Tensor:
    """Return `count` labels in the proportions of `labels`, sorted by class; the same for the same input.

    Shares are rounded by the largest remainder, so that they add up and no class is off by one or more.
    """
    exact = torch.bincount(labels, minlength=num_classes).double() * count / max(len(labels), 1)
    counts = exact.floor().long()
    missing = count - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(num_classes), counts)


def initial_noise(indices: Sequence[int], image_size: int, seed: int) -> Tensor:
    """Return the noise of the images with these indices, (N, 3, S, S): a function of (seed, index) alone."""
    return torch.from_numpy(noise(indices, image_size, seed))


def guide(velocity: Velocity, labels: Tensor, null: int, guidance: float, interval: tuple[float, float]):
    """Return x, t ↦ v_null + guidance · (v_class − v_null), if t lies in the interval (2404.07724), else v_class.

    Both halves go through the network in one batch. `guidance` 1 costs nothing extra.
    """
    low, high = interval
    nulls = torch.full_like(labels, null)

    def guided(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if guidance == 1 or not low <= t <= high:
            return velocity(x, times, labels)
        both = velocity(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, nulls]))
        with_class, without = both.float().chunk(2)
        return without + guidance * (with_class - without)

    return guided


def sample(
    velocity: Velocity,
    labels: Tensor,
    image_size: int,
    num_classes: int,
    config: SampleConfig,
    device: str | torch.device = "cpu",
    first: int = 0,
) -> Tensor:
    """Draw one image for each label.

    Image i is a function of (config.seed, i, labels[i]): the batch size changes it by rounding only.

    Args:
        velocity: a network, or `onnx_file.onnx_velocity` of an ONNX file; one that runs its own threads has a true attribute
            `own_threads`, and one that draws an image differently beside others a true attribute `alone`.
        labels: int64 (N,).
        first: the number i of the first image, if this is a part of a larger set.

    Returns:
        uint8 (N, 3, S, S) on the CPU.

    Raises:
        ConfigError: a label is not a class, or the sampler is unknown.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ConfigError(f"label {int(labels.max())} is not a class; allowed: 0 to {num_classes - 1}")
    plan, done = plan_of(config), []
    batch_size = 1 if getattr(velocity, "alone", False) else config.batch_size
    # beside a library with threads of its own, PyTorch's would spin while they wait for work, and slow it down
    with threads.limited(1) if getattr(velocity, "own_threads", False) else nullcontext():
        for indices in steps(torch.arange(len(labels)).split(batch_size), "drawing"):
            batch = labels[indices].to(device)
            start = initial_noise((indices + first).tolist(), image_size, config.seed).to(device)
            field = guide(velocity, batch, num_classes, config.guidance, config.guidance_interval)
            with torch.inference_mode():
                end = integrate(field, start, plan)
            done.append(to_uint8(end))
    return torch.cat(done) if done else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)


def generate(
    velocity: Velocity,
    labels: Tensor,
    image_size: int,
    num_classes: int,
    config: SampleConfig,
    path: Path,
    settings: dict[str, Any],
    device: str | torch.device = "cpu",
) -> SampleSet:
    """Draw one image for each label and write them to a file, with the settings that made them."""
    with fast_arithmetic(torch.device(device)):
        images = sample(velocity, labels, image_size, num_classes, config, device)
    settings = {**config.model_dump(mode="json", exclude={"batch_size"}), **settings}
    write_safetensors(path, {"images": images, "labels": labels}, {"kind": "samples", "settings": settings})
    return SampleSet(path=path, sha256=sha256_of(path), count=len(images), settings=settings)


def load_samples(samples: SampleSet) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 3, S, S), and labels, int64 (N,), of a verified sample set."""
    tensors, _ = read_safetensors(samples.verify().path, "samples")
    return tensors["images"], tensors["labels"]


def to_model_space(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [−1, 1] to uint8 on the CPU; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def draw_ema_and_raw(ema: Weights, raw: Weights, config: SampleConfig, path: Path, device: str | torch.device = "cpu") -> Picture:
    """Draw four images of each class with the averaged and with the raw weights of a training, from the same noise, in pairs.

    Raises:
        TinycatsError: a file is gone or has changed.
    """
    drawn = []
    for weights in (ema, raw):
        network, header = load_generator(weights.verify().path, device)
        size, classes = header.model.image_size, header.classes
        labels = torch.arange(len(classes)).repeat_interleave(4)
        with fast_arithmetic(torch.device(device)):
            drawn.append(sample(network, labels, size, len(classes), config, device))
    sheet = contact_sheet(torch.cat(drawn, dim=-1), labels, classes, 4, max(1, 64 // size), captions=("EMA", "raw"))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
    return Picture(path=path, sha256=sha256_of(path))
