"""Flow matching: the identities of the straight path, and losses that are zero exactly where they should be."""

from typing import Literal

import pytest
import torch

from tinycats_core.generator.flow_matching import flow_matching_loss, interpolate, sample_timesteps, velocity_from_data


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_1, x_0 = torch.randn(2, 5, 3, 4, 4, generator=generator)
    return x_1, x_0, torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])


def test_the_path_starts_in_noise_and_ends_in_data(pair: tuple):
    x_1, x_0, t = pair
    x_t = interpolate(x_1, x_0, t)
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[-1], x_1[-1])


def test_the_velocity_is_the_paths_derivative(pair: tuple):
    x_1, x_0, t = (part.double() for part in pair)
    h = 1e-6
    derivative = (interpolate(x_1, x_0, t + h) - interpolate(x_1, x_0, t - h)) / (2 * h)
    assert torch.allclose(derivative, x_1 - x_0, atol=1e-8)


def test_following_the_velocity_reaches_the_data(pair: tuple):
    x_1, x_0, t = pair
    t = t[:4]  # before the clamp
    x_t = interpolate(x_1[:4], x_0[:4], t)
    v = velocity_from_data(x_1[:4], x_t, t)
    assert torch.allclose(v, x_1[:4] - x_0[:4], atol=1e-5)
    assert torch.allclose(x_t + (1 - t).view(-1, 1, 1, 1) * v, x_1[:4], atol=1e-5)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_loss_is_zero_for_the_right_answer_and_not_for_noise_equal_to_data(pair: tuple, prediction: Literal["x", "v"]):
    x_1, x_0, t = pair
    labels = torch.zeros(5, dtype=torch.int64)

    def right(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x_1 - x_0 if prediction == "v" else velocity_from_data(x_1, x_t, t)

    def nothing(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_t)

    assert flow_matching_loss(right, x_1, x_0, t, labels, prediction) == 0
    assert flow_matching_loss(nothing, x_1, x_0, t, labels, prediction) > 0.5


def test_the_loss_of_predicting_the_mean_is_the_velocitys_variance():
    """E‖v‖² = Var(x_1) + Var(x_0) = 2 for independent unit normals: what an untrained v network scores."""
    generator = torch.Generator().manual_seed(0)
    x_1, x_0 = torch.randn(2, 512, 3, 4, 4, generator=generator)
    loss = flow_matching_loss(lambda x, t, c: torch.zeros_like(x), x_1, x_0, torch.rand(512), torch.zeros(512), "v")
    assert loss == pytest.approx(2, rel=0.03)


def test_times_are_drawn_as_asked():
    generator = torch.Generator().manual_seed(0)
    uniform = sample_timesteps(20_000, "uniform", 0, 1, generator)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, rel=0.03)
    skewed = torch.logit(sample_timesteps(20_000, "logit_normal", -0.8, 0.5, generator))
    assert skewed.mean() == pytest.approx(-0.8, abs=0.02)
    assert skewed.std() == pytest.approx(0.5, rel=0.03)
