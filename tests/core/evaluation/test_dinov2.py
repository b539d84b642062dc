"""Features of DINOv2 are those of its formulas, and a file of something else is refused in one line."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from small_sets import draw_cats
from torch import Tensor, nn

from tinycats_core.errors import EvaluationError
from tinycats_core.evaluation.dinov2 import DinoV2, load_dinov2
from tinycats_core.evaluation.distances import Moments, frechet
from tinycats_core.evaluation.extractors import FeatureExtractor

WIDTH, DEPTH, HEADS = 384, 12, 6
MEAN, DEVIATION = (torch.tensor(of).view(3, 1, 1) for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights of the shape and with the names of dinov2_vits14_pretrain.pth."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, WIDTH), "mask_token": (1, WIDTH), "pos_embed": (1, 1 + 37**2, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for block in (f"blocks.{number}." for number in range(DEPTH)):
        shapes |= {block + name: (WIDTH,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
        shapes |= {block + name: (WIDTH,) for name in ("ls1.gamma", "ls2.gamma")}
        shapes |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def path(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def extractor(path: Path) -> FeatureExtractor:
    return load_dinov2(path)


def plain(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network by its formulas."""
    of = {name: tensor.double() for name, tensor in weights.items()}
    pixels = (images.double() / 255 - MEAN) / DEVIATION
    patches = F.unfold(pixels, 14, stride=14).mT @ of["patch_embed.proj.weight"].flatten(1).T + of["patch_embed.proj.bias"]
    square = weights["pos_embed"][:, 1:].view(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    positions = F.interpolate(square, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").flatten(2).mT.double()
    first = (of["cls_token"] + of["pos_embed"][:, :1]).expand(len(images), 1, WIDTH)
    tokens = torch.cat([first, patches + positions], 1)

    def normed(tokens: Tensor, name: str) -> Tensor:
        mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
        return (tokens - mean) / (variance + 1e-6).sqrt() * of[f"{name}.weight"] + of[f"{name}.bias"]

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ of[f"{name}.weight"].T + of[f"{name}.bias"]

    for block in (f"blocks.{number}" for number in range(DEPTH)):
        queries, keys, values = linear(normed(tokens, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)
        queries, keys, values = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (queries, keys, values))
        mixed = (queries @ keys.mT / (WIDTH / HEADS) ** 0.5).softmax(-1) @ values
        tokens = tokens + of[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        inner = linear(normed(tokens, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        tokens = tokens + of[f"{block}.ls2.gamma"] * linear(inner, f"{block}.mlp.fc2")
    return normed(tokens, "norm")[:, 0]


def test_features_and_their_distance_are_those_of_the_formulas(extractor: FeatureExtractor, weights: dict[str, Tensor]) -> None:
    images = draw_cats(("Bombay", "other"), 2, 224, seed=0)[0]
    with torch.inference_mode():
        (found,) = extractor.network.double()(images)
    extractor.network.float()
    expected = plain(weights, images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (mine, theirs), (made, real) = expected.numpy().reshape(2, 2, WIDTH), found.view(2, 2, WIDTH)
    roots = [of - of.mean(0) for of in (mine, theirs)]  # of the covariances, which are divided by N - 1 = 1
    plainly = np.square(mine.mean(0) - theirs.mean(0)).sum() + sum(np.square(root).sum() for root in roots)
    plainly -= 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    assert frechet(made, Moments.of(real), 0).value == pytest.approx(plainly, rel=1e-6)


def test_images_are_enlarged_as_by_pillow() -> None:
    images, same = draw_cats(("Bombay", "other"), 2, 32, seed=0)[0], nn.Conv2d(3, 3, 1, bias=False)
    same.weight.data.copy_(torch.eye(3).view(3, 3, 1, 1))
    (found,) = DinoV2(same)(images)
    for image, large in zip(images, found, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        apart = (large * DEVIATION + MEAN) * 255 - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        assert apart.abs().mean() < 0.2  # of 255: Pillow rounds and clamps between rows and columns


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cls_token": None}, "it has no cls_token"),
        ({"cls_token": torch.zeros(1, 1, 100)}, "its class token has a width of 100; those of DINOv2 are 384, 768, 1024, 1536"),
        ({"register_tokens": torch.zeros(1, 4, WIDTH)}, "register_tokens has the shape (1, 4, 384), which is unknown in vit_small"),
        ({"norm.bias": None}, "norm.bias is missing, which has (384,) in vit_small_patch14_dinov2"),
        ({"norm.bias": torch.zeros(3)}, "norm.bias has the shape (3,), which has (384,) in vit_small_patch14_dinov2"),
        ({"pos_embed": torch.zeros(1, 12, WIDTH)}, "its pos_embed has the shape (1, 12, 384)"),
    ],
)
def test_other_weights_are_refused(change: dict[str, Tensor | None], why: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {**weights, **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, tmp_path / "w")
    with pytest.raises(EvaluationError) as refused:
        load_dinov2(tmp_path / "w")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "why"), [(b"PK\x03\x04 a pickle", "it is no safetensors file"), (None, "which is no file")])
def test_other_files_are_refused(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(EvaluationError, match=why):
        load_dinov2(tmp_path / "w")
