"""TinyDiT: a class-conditional diffusion transformer on image patches (Peebles & Xie, 2212.09748).

Convention: t = 0 is noise, t = 1 is data, x_t = t·x_1 + (1 − t)·x_0, v = x_1 − x_0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinycats_core.config import ModelConfig
from tinycats_core.generator.flow_matching import velocity_from_data

LABEL_LAYER = "label_layer"  # of augmentation: only the training has it


class TinyDiT(nn.Module):
    """Predict the velocity of a noisy image, given the time and the class.

    With `prediction: x` the network draws the clean image and the velocity follows from it (JiT, 2511.13720), which
    works where a patch holds more numbers than the network is wide; with `prediction: v` it draws the velocity itself.
    """

    def __init__(self, config: ModelConfig, augmentation_labels: int = 0):
        super().__init__()
        self.config = config
        width = config.width
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.register_buffer("positions", sincos_positions(config.image_size // config.patch_size, width))
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embed = nn.Embedding(config.num_classes + 1, width)  # the last one is the null class
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_linear = nn.Linear(width, config.patch_size**2 * 3)
        self._initialise()
        if augmentation_labels:  # after the other weights, whose random numbers stay the same
            self.label_layer = nn.Linear(augmentation_labels, width, bias=False)
            nn.init.zeros_(self.label_layer.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Return the velocity.

        Args:
            x: noisy images in model space, (B, 3, S, S).
            t: times in [0, 1], (B,).
            labels: class indices, (B,); `num_classes` is the null class.
            augmentation: what was done to the images, (B, augmentation_labels); None and zeros mean nothing.
        """
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions  # (B, N, width)
        condition = self.time_embed(time_features(t)) + self.class_embed(labels)  # (B, width)
        if augmentation is not None:
            condition = condition + self.label_layer(augmentation)
        condition = F.silu(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)  # (B, N, width)
        shift, scale = self.final_modulation(condition).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, width) each
        patches = self.final_linear(normalise(tokens) * (1 + scale) + shift)  # (B, N, p²·3)
        drawn = unpatchify(patches, self.config.patch_size)  # (B, 3, S, S)
        return drawn if self.config.prediction == "v" else velocity_from_data(drawn.float(), x, t)

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier for matrices, 0.02 for embeddings, zero for gates and the output."""
        for name, parameter in self.named_parameters():
            if "scale" in name:
                continue  # of queries and keys: ones
            if parameter.dim() == 1 or "modulation" in name or "final" in name:
                nn.init.zeros_(parameter)
            elif "time_embed" in name or "class_embed" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        tokens = tokens + gate_a * self.attention(normalise(tokens) * (1 + scale_a) + shift_a)  # (B, N, width)
        return tokens + gate_m * self.mlp(normalise(tokens) * (1 + scale_m) + shift_m)  # (B, N, width)


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_scale = nn.Parameter(torch.ones(width // heads))
        self.k_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, width = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, width/heads) each
        q, k = rms_normalise(q, self.q_scale), rms_normalise(k, self.k_scale)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, width/heads)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))  # (B, N, width)


def normalise(tokens: Tensor) -> Tensor:
    """Layer norm without weights: adaLN brings them."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def rms_normalise(vectors: Tensor, scale: Tensor) -> Tensor:
    """Divide vectors (…, D) by their root mean square and scale them, in their own type also under autocast."""
    return F.rms_norm(vectors, vectors.shape[-1:], scale.to(vectors.dtype), eps=1e-6)


def time_features(t: Tensor, dim: int = 256) -> Tensor:
    """Return sinusoidal features of times in [0, 1]: (B,) to (B, dim), periods 2π/1000 to 20π."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000 * t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


def sincos_positions(side: int, width: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions of a side × side grid, row by row: (1, side², width)."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, width/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, side * side, width)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Put patches together, row by row: (B, N, patch²·C) to (B, C, S, S)."""
    b, n, numbers = patches.shape
    side, c = math.isqrt(n), numbers // (patch * patch)
    blocks = patches.reshape(b, side, side, patch, patch, c)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)
