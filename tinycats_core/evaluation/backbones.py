"""The networks that the breed classifier is built on."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from tinycats_core.errors import TrainingError


def make_backbone(name: str, pretrained: bool) -> nn.Module:
    """Return a network whose last linear layer names classes: a torchvision network, or `resnet8`.

    Raises:
        TrainingError: the ImageNet weights cannot be downloaded.
    """
    return narrow_resnet() if name == "resnet8" else _torchvision_network(name, pretrained)


def narrow_resnet(widths: Sequence[int] = (32, 64, 128)) -> nn.Module:
    """Return a residual network for small images: of He et al. (2016, section 4.2, n = 1), and twice as wide.

    0.3 million parameters instead of the 11 million of a ResNet-18, and no pooling before the last layer.
    """
    from torchvision.models.resnet import BasicBlock

    first = widths[0]
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, first, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(first)}
    layers["relu"] = nn.ReLU(inplace=True)
    for index, (before, width) in enumerate(pairwise([first, *widths])):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width)) if index else None
        layers[f"layer{index + 1}"] = BasicBlock(before, width, 2 if index else 1, shortcut)
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(widths[-1], 1000)}
    return nn.Sequential(OrderedDict(layers))


def _torchvision_network(backbone: str, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    try:
        return get_model(backbone, weights="DEFAULT" if pretrained else None, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no such page, or a file that does not match its hash
        raise TrainingError(
            f"the ImageNet weights of {backbone} cannot be downloaded ({error}). Set classifier.pretrained to false, "
            f"or put torchvision's file into {torch.hub.get_dir()}/checkpoints."
        ) from None
