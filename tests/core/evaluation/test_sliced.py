"""The sliced distance is that of plain sorting, and its errors are those of repeated sets."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycats_core.evaluation.sliced import directions, sliced_distance


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    scales = torch.logspace(0, -1, width)
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scales + shift


def plain(made: Tensor, real: Tensor, seed: int) -> float:
    """Repeat the images of each set as often as the other one has images, sort, and subtract."""
    columns = directions(made.shape[1], seed).numpy()
    mine, theirs = made.double().numpy() @ columns, real.double().numpy() @ columns
    mine, theirs = (np.sort(np.repeat(of, len(other), 0), 0) for of, other in ((mine, theirs), (theirs, mine)))
    return float(3 * made.shape[1] * np.square(mine - theirs).mean())


@pytest.mark.parametrize(("made", "real"), [(40, 40), (40, 30), (17, 60)])
def test_the_distance_is_that_of_plain_sorting(made: int, real: int) -> None:
    mine, theirs = normal(made, 8, 0, 0.2), normal(real, 8, 1)
    assert sliced_distance(mine, theirs, 5).value == pytest.approx(plain(mine, theirs, 5), rel=1e-6)
    assert sliced_distance(mine, mine.flip(0), 5).value == pytest.approx(0, abs=1e-12)


def test_the_distance_of_shifted_sets_is_known() -> None:
    made = normal(50, 32, 0)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(9))
    # The square of a unit vector's component is 1 / D on average.
    assert sliced_distance(made, made + shift, 0).value == pytest.approx(3 * shift.square().sum().item(), rel=0.1)
    assert directions(32, 0).square().sum(0).sub(1).abs().max() < 1e-12


def test_the_errors_are_those_of_repeated_sets() -> None:
    theirs = normal(100, 6, 0, 0.5)
    found = [sliced_distance(normal(80, 6, seed), theirs, 0) for seed in range(1, 31)]
    drawn = np.mean([one.drawn_std for one in found])
    assert drawn == pytest.approx(np.std([one.value for one in found]), rel=0.3)
    both = [sliced_distance(normal(80, 6, seed), normal(100, 6, seed + 100, 0.5), 0) for seed in range(1, 31)]
    assert np.mean([one.std for one in both]) == pytest.approx(np.std([one.value for one in both]), rel=0.3)
    assert found[0].low < found[0].value < found[0].high


def test_errors_within_classes_leave_out_what_lies_between_them() -> None:
    labels = torch.arange(2).repeat_interleave(40)
    made, theirs = normal(80, 6, 0) + 5 * labels[:, None], normal(80, 6, 1) + 5
    assert sliced_distance(made, theirs, 0, labels).drawn_std < 0.5 * sliced_distance(made, theirs, 0).drawn_std
