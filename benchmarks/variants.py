"""What the recipe was tried with and does without: other networks, another optimizer, other batches.

Each is TinyDiT, or a part of its training, with one thing changed. `benchmarks.recipe` measures them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.flow_matching import velocity_from_data
from tinycats_core.model import Attention, Block, TinyDiT, rms_normalise, sincos_positions, time_features, unpatchify
from tinycats_core.training import draw_batch, make_optimizer, mix  # noqa: F401  rows name them


class LearnedPositions(TinyDiT):
    """Positions that are weights, beginning as the fixed ones."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        fixed = self.positions
        del self.positions
        self.positions = nn.Parameter(fixed.clone())


class Bottleneck(TinyDiT):
    """Patches go through a narrow linear layer before they become tokens (JiT, 2511.13720)."""

    narrow = 48

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        cut = nn.Conv2d(3, self.narrow, config.patch_size, stride=config.patch_size, bias=False)
        self.patch_embed = nn.Sequential(cut, nn.Conv2d(self.narrow, config.width, 1))  # pyright: ignore
        self._initialise()


class RotaryAttention(Attention):
    """Queries and keys are turned by row and column (RoPE, 2104.09864, on two axes)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, side: int):
        super().__init__(width, heads)
        quarter = width // heads // 4
        frequencies = 1 / 100 ** (torch.arange(quarter) / quarter)  # of a grid that is short
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (rows, columns)], dim=1)  # (N, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, width = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self._turn(rms_normalise(q, self.q_scale)), self._turn(rms_normalise(k, self.k_scale))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate pairs of numbers of (B, heads, N, D); tokens before the grid's (of a class) stay as they are."""
        ahead = x.shape[2] - len(self.cos)
        left, right = x[:, :, ahead:].chunk(2, dim=-1)
        turned = torch.cat([left * self.cos - right * self.sin, right * self.cos + left * self.sin], dim=-1)
        return torch.cat([x[:, :, :ahead], turned], dim=2) if ahead else turned


class Rotary(TinyDiT):
    """Rotary positions in every block in place of added ones."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        side = config.image_size // config.patch_size
        for block in self.blocks:
            block.attention = RotaryAttention(config.width, config.heads, side)
        self.register_buffer("positions", torch.zeros_like(sincos_positions(side, config.width)))
        self._initialise()


class ClassTokens(TinyDiT):
    """The class also stands before the patches as tokens that blocks can look at (JiT, 2511.13720)."""

    count = 4

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.class_places = nn.Parameter(torch.zeros(1, self.count, config.width))
        self._initialise()
        nn.init.normal_(self.class_places, std=0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions
        seen = self.class_embed(labels)
        condition = F.silu(self.time_embed(time_features(t)) + seen)
        tokens = torch.cat([seen[:, None] + self.class_places, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.final_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        normal = F.layer_norm(tokens[:, self.count :], tokens.shape[-1:], eps=1e-6)
        drawn = unpatchify(self.final_linear(normal * (1 + scale) + shift), self.config.patch_size)
        return drawn if self.config.prediction == "v" else velocity_from_data(drawn.float(), x, t)


class GatedMLP(nn.Module):
    """SwiGLU (2002.05202) with as many weights as the plain MLP of four times the width."""

    def __init__(self, width: int):
        super().__init__()
        inner = width * 8 // 3 // 8 * 8
        self.open, self.close = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.open(tokens).chunk(2, dim=-1)
        return self.close(F.silu(gate) * value)


class GatedBlock(Block):
    """SwiGLU, and RMS norms in place of layer norms."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.mlp = GatedMLP(width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        tokens = tokens + gate_a * self.attention(_rms(tokens) * (1 + scale_a) + shift_a)
        return tokens + gate_m * self.mlp(_rms(tokens) * (1 + scale_m) + shift_m)


class Gated(TinyDiT):
    """SwiGLU and RMS norms in every block."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(GatedBlock(config.width, config.heads) for _ in range(config.depth))
        self._initialise()


class TimeAndChange(nn.Sequential):
    """The embedding of the time, plus that of how the images of the batch were changed."""

    numbers = 6
    told: ClassVar[Tensor | None] = None  # of the batch that is being trained on: one network is trained at a time

    def __init__(self, time_embed: nn.Sequential, width: int):
        super().__init__(*time_embed)
        self.change_embed = nn.Parameter(torch.zeros(self.numbers, width))

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return input + self.told @ self.change_embed if self.training and self.told is not None else input


class Augmented(TinyDiT):
    """Told how its training image was changed; not told of any change when it draws (Karras et al., 2206.00364, F.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.time_embed = TimeAndChange(self.time_embed, config.width)


def _rms(tokens: Tensor) -> Tensor:
    return F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the blocks' matrices and AdamW on the rest; a step that is not finite is not taken."""

    def __init__(self, net: TinyDiT, config: TrainConfig):
        hidden = [p for name, p in net.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
        rest = [p for p in net.parameters() if all(p is not other for other in hidden)]
        self.muon = torch.optim.Muon(hidden, lr=config.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True)
        super().__init__(list(net.parameters()), {"lr": config.lr})

    def step(self, closure: Any = None) -> None:
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


Draw = Callable[[Tensor, Tensor, TrainConfig, int, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def balanced(images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the classes equally often, however many images each of them has."""
    generator = torch.Generator().manual_seed(mix(config.seed, step, 2))
    weights = 1 / torch.bincount(labels).clamp_min(1).double()[labels]
    chosen = torch.multinomial(weights, config.batch_size, replacement=True, generator=generator)
    return draw_batch(images[chosen], labels[chosen], config, null, step)


def cropped(images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut out a square of 7/8 to 1 of the side and enlarge it: what photos do by themselves, so the network is not told."""
    x_1, x_0, t, kept = draw_batch(images, labels, config, null, step)
    generator = torch.Generator().manual_seed(mix(config.seed, step, 3))
    side = 1 - torch.rand(len(x_1), generator=generator) / 8
    centre = (2 * torch.rand(len(x_1), 2, generator=generator) - 1) * (1 - side)[:, None]
    return _look(x_1, side, torch.zeros(len(x_1)), centre), x_0, t, kept


def changed(images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn, zoom, shift, and change brightness and contrast of half of the images, and tell the network by how much."""
    x_1, x_0, t, kept = draw_batch(images, labels, config, null, step)
    generator = torch.Generator().manual_seed(mix(config.seed, step, 4))
    change = torch.randn(len(x_1), TimeAndChange.numbers, generator=generator).clamp(-2, 2)
    change *= (torch.rand(len(x_1), 1, generator=generator) < 0.5).float()
    turn, zoom, right, down, light, contrast = change.unbind(1)
    x_1 = _look(x_1, torch.exp(0.08 * zoom), 0.1 * turn, 0.08 * torch.stack([right, down], 1))
    x_1 = (x_1 * torch.exp(0.15 * contrast).view(-1, 1, 1, 1) + 0.1 * light.view(-1, 1, 1, 1)).clamp(-1, 1)
    TimeAndChange.told = change
    return x_1, x_0, t, kept


def _look(images: Tensor, side: Tensor, angle: Tensor, centre: Tensor) -> Tensor:
    """Return the squares of images (B, 3, S, S) with these sides (of 1), angles and centres (B, 2); mirrored beyond the edge."""
    cos, sin = side * angle.cos(), side * angle.sin()
    turn = torch.stack([torch.stack([cos, -sin, centre[:, 0]], 1), torch.stack([sin, cos, centre[:, 1]], 1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
