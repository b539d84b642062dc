"""DINOv2 as a feature extractor: weights from a safetensors file that a person names, the network from timm."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinycats_core.errors import ConfigError, EvaluationError
from tinycats_core.evaluation.extractors import FeatureExtractor
from tinycats_core.files import sha256_of

LAYER = "dinov2"
SIZE, PATCH = 224, 14  # as in the figures of 2306.04675
MODELS = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by width
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DinoV2(nn.Module):
    """The class token of a vision transformer, from images of any size."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return the class tokens, ((N, D),), of uint8 images (N, 3, S, S)."""
        dtype = next(self.network.parameters()).dtype
        resized = F.interpolate(images.to(dtype), size=SIZE, mode="bicubic", antialias=True)  # as Pillow's
        mean, deviation = (resized.new_tensor(of).view(3, 1, 1) for of in (MEAN, DEVIATION))
        return (self.network((resized.round().clamp(0, 255) / 255 - mean) / deviation),)


def load_dinov2(path: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Load DINOv2 from a safetensors file with the names of its authors or of timm.

    Raises:
        ConfigError: timm is missing.
        EvaluationError: there is no such file, or it holds something else.
    """
    try:
        import timm
    except ImportError:
        raise ConfigError("evaluate.dinov2_weights needs the package timm: run `pip install 'tinycats[dinov2]'`") from None
    weights = _read(path)
    width = weights["cls_token"].shape[-1] if "cls_token" in weights else None
    if width not in MODELS:
        found = f"its class token has a width of {width}" if width else "it has no cls_token"
        raise _other(path, f"{found}; those of DINOv2 are {', '.join(map(str, MODELS))}")
    name = f"vit_{MODELS[width]}_patch{PATCH}_dinov2"
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0, img_size=SIZE)
    weights["pos_embed"] = _resampled(path, weights)
    if difference := _difference(weights, network.state_dict()):
        raise _other(path, f"{difference} in {name}")
    network.load_state_dict(weights, assign=True)
    notes = () if width == 1024 else (f"fd_dinov2 is of {name}: published figures are of vit_large_patch{PATCH}_dinov2.",)
    return FeatureExtractor(
        name="dinov2",
        network=DinoV2(network.eval().requires_grad_(False)).to(device),
        feature_layer=LAYER,
        logit_layer=None,
        sha256=sha256_of(path),
        resize=f"{SIZE} px, bicubic",
        notes=notes,
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise EvaluationError(f"evaluate.dinov2_weights is {path}, which is no file. Give a safetensors file, or leave it out.")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _other(path, f"it is no safetensors file ({error})") from None
    weights.pop("mask_token", None)  # only training needs it
    return {name: tensor.float() for name, tensor in weights.items()}


def _resampled(path: Path, weights: dict[str, Tensor]) -> Tensor:
    """Return the position embedding for SIZE pixels, resampled as DINOv2's own code does: with an offset, without antialiasing."""
    positions, grid = weights.get("pos_embed", torch.empty(0)), SIZE // PATCH
    side = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 and positions.shape[1] > 1 else 0
    if side == 0 or side**2 + 1 != positions.shape[1]:
        raise _other(path, f"its pos_embed has the shape {tuple(positions.shape)}; (1, 1 + N², D) is needed")
    if side == grid:
        return positions
    square = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], square.flatten(2).mT], 1)


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """Return the first difference of names or shapes; None if there is none."""
    for name in sorted({*found, *wanted}):
        mine, theirs = (tuple(of[name].shape) if name in of else None for of in (found, wanted))
        if mine != theirs:
            return (
                f"{name} {f'has the shape {mine}' if mine else 'is missing'}, which {f'has {theirs}' if theirs else 'is unknown'}"
            )
    return None


def _other(path: Path, why: str) -> EvaluationError:
    return EvaluationError(
        f"{path} does not hold the weights of DINOv2: {why}. Give them in evaluate.dinov2_weights, or leave it out."
    )
