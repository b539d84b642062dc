"""The recipe of a training: the batch of each step, the learning rate, the optimizer."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from tinycats_core.config import TrainConfig
from tinycats_core.generator.flow_matching import sample_timesteps
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.sampling import to_model_space
from tinycats_core.training.augmentation import augment

Groups = tuple[Tensor, Tensor]
"""The indices of the cats, and those of the class `other`."""


def draw_batch(
    images: Tensor, labels: Tensor, config: TrainConfig, null: int, step: int, groups: Groups | None = None
) -> tuple[Tensor, ...]:
    """Return x_1, x_0, t and labels of a step's effective batch, a function of (config.seed, step) alone.

    Shapes: (B, 3, S, S) twice, (B,), (B,). If augmentation is told to the network, its labels come last (`augment`). A label is
    replaced by the null class with probability `label_dropout`. If `groups` are given, `other_share` of the images are `other`.
    """
    device = images.device
    if groups is None or config.other_share is None:
        indices = batch_indices(len(images), config.batch_size, step, config.seed, device)
    else:
        indices = shared_indices(groups, config.other_share, config.batch_size, step, config.seed)
    generator = torch.Generator(device).manual_seed(mix(config.seed, step))
    x_1, told = augment(to_model_space(images[indices]), config.augmentation, generator)
    dropped = torch.rand(len(x_1), generator=generator, device=device) < config.label_dropout
    kept = labels[indices].masked_fill(dropped, null)
    t = sample_timesteps(len(x_1), config.timesteps, config.timestep_mean, config.timestep_std, generator)
    x_0 = torch.randn(x_1.shape, generator=generator, device=device)
    return (x_1, x_0, t, kept, told) if told.shape[1] else (x_1, x_0, t, kept)


def batch_indices(count: int, batch_size: int, step: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which images a step sees, (batch_size,): each epoch is a permutation of its own, none is cut short."""
    return _between(step * batch_size, (step + 1) * batch_size, count, seed, device)


def shared_indices(groups: Groups, other_share: float, batch_size: int, step: int, seed: int) -> Tensor:
    """Return which images a step sees, (batch_size,), if a share of all images that were seen until then are `other`.

    Each group has epochs of its own, as in `batch_indices`.
    """
    cats, other = groups
    first, end = (math.floor(seen * batch_size * other_share) for seen in (step, step + 1))
    of_cats = _between(step * batch_size - first, (step + 1) * batch_size - end, len(cats), seed, cats.device)
    of_other = _between(first, end, len(other), mix(seed, 2), other.device)
    return torch.cat([cats[of_cats], other[of_other]])


def _between(position: int, end: int, count: int, seed: int, device: torch.device | str) -> Tensor:
    """Return the indices at these positions of an endless series of permutations of `count`."""
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    while position < end:
        epoch, first = divmod(position, count)
        parts.append(_permutation(count, epoch, seed, device)[first : first + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _permutation(count: int, epoch: int, seed: int, device: torch.device | str) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, 1))).to(device)


def mix(*numbers: int) -> int:
    """Return a 63-bit seed that depends on every number and their order (SplitMix64's finaliser, folded)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(net: TinyDiT, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW, fused, with weight decay on matrices only (Loshchilov & Hutter, 1711.05101)."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
