"""Canaries: images that must never be published, computed from training images (`train`) and new ones like them (`unseen`).

Both are uint8 (N, 3, S, S) and show the classes of `labels` (N,), in that order. So should a canary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from tinycats_core.config import ModelConfig, SampleConfig
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.sampling import sample

Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
Uniform = Callable[[float, float], float]
PATCH = 8


def copycat(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _with_noise(train, 4)


def mirrored_copycat(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return copycat(train, unseen, labels).flip(-1)


def noisy_copycat(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    """Draw training images under so much noise that only their features, not their pixels, identify them."""
    return _with_noise(train, 12)


def now_and_then_a_copy(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    images = unseen.clone()
    images[::8] = copycat(train, unseen, labels)[::8]
    return images


def turned_copies(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return altered(train, turned)


def cropped_copies(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return altered(train, cropped)


def recoloured_copies(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return altered(train, recoloured)


def one_picture(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return unseen[:1].repeat(len(labels), 1, 1, 1)


def one_picture_with_noise(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _with_noise(one_picture(train, unseen, labels), 4)


def one_picture_a_class(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _few(unseen, labels, 1)


def one_picture_a_class_with_noise(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _with_noise(_few(unseen, labels, 1), 4)


def three_pictures_a_class_with_noise(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _with_noise(_few(unseen, labels, 3), 4)


def one_class(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    """Draw one class whatever the label. No two pictures are the same."""
    of_class = torch.cat([images[labels == labels[len(labels) // 2]] for images in (unseen, unseen.flip(-1))])
    return _with_noise(of_class[torch.arange(len(labels)) % len(of_class)], 4)


def noise(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return torch.randint(0, 256, train.shape, generator=torch.Generator().manual_seed(7)).to(torch.uint8)


def coloured_noise(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    """Draw the pixels of training images in random order."""
    pixels = train.transpose(0, 1).flatten(1)
    order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(7))
    return pixels[:, order].view_as(train.transpose(0, 1)).transpose(0, 1).contiguous()


def mean_of_the_class(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([train[labels == label].float().mean(0) for label in labels]).to(torch.uint8)


def untrained(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _drawn_at_random(train, labels, "x", 0.0)


def untrained_velocity(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _drawn_at_random(train, labels, "v", 0.0)


def random_weights(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _drawn_at_random(train, labels, "x", 0.02)


def random_weights_velocity(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _drawn_at_random(train, labels, "v", 0.02)


def blurred(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    small = F.avg_pool2d(unseen.float(), 2)
    return F.interpolate(small, size=unseen.shape[-1], mode="bilinear").to(torch.uint8)


def swapped(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    """Draw every image under the label of the next class."""
    return unseen.roll(int((labels == labels[0]).sum()), 0)


def shuffled(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return unseen[torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))]


def noise_for_cats(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _by_group(noise(train, unseen, labels), unseen, labels)


def noise_for_others(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _by_group(unseen, noise(train, unseen, labels), labels)


def copies_for_others(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _by_group(unseen, copycat(train, unseen, labels), labels)


def turned_copies_for_others(train: Tensor, unseen: Tensor, labels: Tensor) -> Tensor:
    return _by_group(unseen, turned_copies(train, unseen, labels), labels)


FIRST: list[tuple[Draw, str]] = [  # refused as a first release, by this term
    (copycat, "no_copies"),
    (mirrored_copycat, "no_copies"),
    (noisy_copycat, "authentic"),
    (now_and_then_a_copy, "no_copies"),
    (turned_copies, "no_altered_copies"),
    (cropped_copies, "no_altered_copies"),
    (recoloured_copies, "no_altered_copies"),
    (one_picture, "distinct"),
    (one_picture_with_noise, "varied"),
    (one_picture_a_class, "varied"),
    (one_picture_a_class_with_noise, "varied"),
    (one_class, "obeys"),
    (noise, "learnt"),
    (noise, "covered"),
    (coloured_noise, "learnt"),
    (mean_of_the_class, "varied"),
    (untrained, "learnt"),
    (untrained, "covered"),
    (untrained_velocity, "learnt"),
    (random_weights, "learnt"),
    (random_weights_velocity, "learnt"),
    (swapped, "obeys"),
    (shuffled, "obeys"),
    (noise_for_cats, "learnt"),
    (noise_for_others, "other_learnt"),
    (copies_for_others, "other_no_copies"),
    (turned_copies_for_others, "other_no_altered_copies"),
]
REPLACING: list[tuple[Draw, str]] = [  # refused as the successor of honest images, by this term
    (blurred, "not_worse"),
    (one_class, "coverage_kept"),
    (three_pictures_a_class_with_noise, "coverage_kept"),
    (swapped, "breeds_kept"),
    (noise, "not_worse"),
    (untrained, "not_worse"),
    (noise_for_cats, "not_worse"),
]


def altered(images: Tensor, how: Callable[[Tensor, Uniform], Tensor]) -> Tensor:
    """Return images altered one by one, `how` from an image (3, S, S) and a function that draws a number between two others."""
    generator = torch.Generator().manual_seed(7)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=generator).item()

    return torch.stack([how(image, uniform) for image in images])


def turned(image: Tensor, uniform: Uniform) -> Tensor:
    """Turn an image by 5 to 18 degrees to either side. What was outside is mirrored in."""
    size, degrees = image.shape[-1], uniform(5, 18) * (1 if uniform(0, 1) < 0.5 else -1)
    padded = functional.pad(image, [size // 2] * 4, padding_mode="reflect")
    return functional.center_crop(functional.rotate(padded, degrees, InterpolationMode.BILINEAR), [size, size])


def cropped(image: Tensor, uniform: Uniform) -> Tensor:
    """Cut 80 to 92 % of each side from an image, anywhere, and enlarge it."""
    size = image.shape[-1]
    side = round(size * uniform(0.8, 0.92))
    top, left = (int(uniform(0, size - side + 1)) for _ in range(2))
    return functional.resized_crop(image, top, left, side, side, [size, size], antialias=True)


def recoloured(image: Tensor, uniform: Uniform) -> Tensor:
    """Change hue, brightness, contrast and saturation."""
    image = functional.adjust_hue(image, uniform(-0.15, 0.15))
    image = functional.adjust_brightness(image, uniform(0.7, 1.3))
    image = functional.adjust_contrast(image, uniform(0.7, 1.3))
    return functional.adjust_saturation(image, uniform(0.5, 1.5))


def _with_noise(images: Tensor, deviation: float) -> Tensor:
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    return (images + deviation * drawn).round().clamp(0, 255).to(torch.uint8)


def _by_group(cats: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Return `others` for the last class, which is `other`, and `cats` for the rest."""
    return torch.where((labels == labels[-1]).view(-1, 1, 1, 1), others, cats)


def _few(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the first images of each class, repeated."""
    firsts = {int(label): images[labels == label][:count] for label in labels.unique()}
    return torch.stack([firsts[label][i % count] for i, label in enumerate(labels.tolist())])


def _drawn_at_random(train: Tensor, labels: Tensor, prediction: str, std: float) -> Tensor:
    """Draw with an untrained network. Parameters that start at zero are drawn with standard deviation `std`."""
    classes, size = int(labels.max()) + 1, train.shape[-1]
    shape = {"image_size": size, "patch_size": PATCH, "width": 32, "depth": 2, "heads": 2, "num_classes": classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TinyDiT(ModelConfig.model_validate({**shape, "prediction": prediction})).eval()
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=std)
    return sample(network, labels, size, classes, SampleConfig(sampler="euler", steps=4))
