"""Flow matching on straight paths (Lipman et al., 2210.02747): path, times, loss.

Convention: t = 0 is noise, t = 1 is data, x_t = t·x_1 + (1 − t)·x_0, v = x_1 − x_0.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MIN_REMAINING = 0.05  # 1 − t is not taken smaller where it divides (JiT, 2511.13720)


def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t·x_1 + (1 − t)·x_0, for images (B, …) and times (B,)."""
    t = _like(t, x_1)
    return t * x_1 + (1 - t) * x_0


def velocity_from_data(x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the velocity that leads from x_t to x_1: (x_1 − x_t) / max(1 − t, 0.05)."""
    return (x_1 - x_t) / (1 - _like(t, x_t)).clamp_min(MIN_REMAINING)


def sample_timesteps(
    count: int, kind: Literal["uniform", "logit_normal"], mean: float, std: float, generator: torch.Generator
) -> Tensor:
    """Draw training times: (count,) in (0, 1), uniform or with a normally distributed logit (SD3, 2403.03206)."""
    device = generator.device
    if kind == "uniform":
        return torch.rand(count, generator=generator, device=device)
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))


def flow_matching_loss(
    velocity: Callable[..., Tensor],
    x_1: Tensor,
    x_0: Tensor,
    t: Tensor,
    labels: Tensor,
    prediction: Literal["x", "v"],
    *told: Tensor,
) -> Tensor:
    """Return the mean squared error of the velocity, a scalar. Whatever else is `told` reaches `velocity` as it is.

    With `prediction: x` the target divides by the same clamped 1 − t as the prediction does, so that the optimum is the
    clean image at every t, also beyond the clamp.
    """
    x_t = interpolate(x_1, x_0, t)
    target = x_1 - x_0 if prediction == "v" else velocity_from_data(x_1, x_t, t)
    return (velocity(x_t, t, labels, *told).float() - target).square().mean()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
