"""Copies are found, also mirrored or noisy ones; images of the same kind are none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.judge.canaries import altered, cropped, recoloured, turned
from tinycats_core.evaluation.memorization import (
    _squares,
    altered_copies,
    authenticity,
    copies,
    copy_rate,
    copy_rates_of_training,
    nearest_images,
    spacing,
)


@pytest.fixture
def train() -> torch.Tensor:
    return torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_copies_are_copies(train: torch.Tensor):
    noise = torch.randint(-9, 10, train.shape, generator=torch.Generator().manual_seed(1))
    noisy = (train.int() + noise).clamp(0, 255).to(torch.uint8)
    assert copy_rate(train, train) == 1
    assert copy_rate(train.flip(-1), train) == 1
    assert copy_rate(noisy, train) == 1


def test_other_images_of_the_same_kind_are_none(train: torch.Tensor):
    others = torch.randint(0, 256, (30, 3, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    assert copy_rate(others, train) == 0
    assert torch.equal(copies(torch.cat([others, train[:10]]), train, batch_size=7), torch.arange(40) >= 30)


def test_the_nearest_image_is_shown_as_it_lies_nearest(train: torch.Tensor):
    noise = torch.randint(-9, 10, train.shape, generator=torch.Generator().manual_seed(1))
    noisy = (train.int() + noise).clamp(0, 255).to(torch.uint8)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(3))
    assert torch.equal(nearest_images(noisy[order], train, batch_size=7), train[order])
    assert torch.equal(nearest_images(noisy.flip(-1), train), train.flip(-1))


@pytest.mark.parametrize("size", [7, 8, 20])
def test_distances_are_those_of_the_plain_formula(size: int):
    drawn = torch.randint(0, 256, (2, 9, 3, size, size), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    images, train = F.adaptive_avg_pool2d(drawn.float().flatten(0, 1), min(size, 16)).unflatten(0, (2, 9))
    straight, turned = (torch.cdist(images.flatten(1), others.flatten(1)) for others in (train, train.flip(-1)))
    ((squares, mirrored),) = _squares(*drawn, batch_size=9)
    torch.testing.assert_close(squares.sqrt(), torch.minimum(straight, turned), rtol=1e-4, atol=0.01)
    assert torch.equal(mirrored, turned < straight)


def test_what_lies_between_two_training_images_is_a_copy_of_neither(train: torch.Tensor):
    between = ((train[:20].int() + train[20:].int()) // 2).to(torch.uint8)
    assert copy_rate(between, train) == 0


def test_copies_of_large_images_are_found_in_their_thumbnails() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (40, 3, 6, 6), generator=generator).float()
    large = F.interpolate(coarse, size=48, mode="bilinear").to(torch.uint8)
    noisy = (large + 30 * torch.randn(large.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    assert copy_rate(noisy, large) == 1
    assert copy_rate(noisy[20:], large[:20]) == 0


def smooth(count: int, seed: int) -> torch.Tensor:
    """Return images (count, 3, 32, 32) as smooth as photos."""
    drawn = torch.randint(0, 256, (count, 3, 5, 5), generator=torch.Generator().manual_seed(seed)).float()
    return F.interpolate(drawn, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("how", [lambda image, _: image, lambda image, _: image.flip(-1), turned, cropped, recoloured])
def test_altered_copies_are_found(how: Callable[..., torch.Tensor]) -> None:
    train = smooth(100, 0)
    found = altered_copies(altered(train[::5], how), train)
    assert found.double().mean() >= (0.75 if how is recoloured else 0.9)  # colours as strong as these change the grey as well
    assert altered_copies(altered(smooth(20, 1), how), train).double().mean() <= 0.05
    assert torch.equal(altered_copies(train[:8].flip(-1), train), torch.ones(8, dtype=torch.bool))


def test_training_images_are_held_against_the_others() -> None:
    train = smooth(60, 0)
    train[7] = altered(train[:1], recoloured)[0]
    train[8] = train[1]
    assert copy_rates_of_training(train) == (60, pytest.approx(2 / 60), pytest.approx(4 / 60))
    assert copy_rates_of_training(train, torch.arange(60) < 4) == (4, pytest.approx(1 / 4), pytest.approx(2 / 4))
    assert copy_rates_of_training(train, torch.arange(60) > 60) == copy_rates_of_training(train[:3]) == (0, 0, 0)


def test_authentic_images_are_no_closer_than_neighbours() -> None:
    known = torch.tensor([[0.0], [10.0], [12.0]])  # the nearest others are 10, 2 and 2 away
    made = torch.tensor([[-9.0], [-11.0], [9.0], [7.0], [14.5], [12.0]])
    assert authenticity(made[:1], known, spacing(known)) == 0  # 9 from a training image that is itself 10 from the next
    assert authenticity(made[1:2], known, spacing(known)) == 1
    assert authenticity(made, known, spacing(known)) == pytest.approx(3 / 6)
    assert authenticity(made, known, spacing(known, batch_size=2), batch_size=2) == authenticity(made, known, spacing(known))


def test_copies_are_not_authentic() -> None:
    generator = torch.Generator().manual_seed(0)
    known, unseen = torch.randn(100, 8, generator=generator), torch.randn(100, 8, generator=generator)
    assert authenticity(known + 0.01 * torch.randn(known.shape, generator=generator), known, spacing(known)) == 0
    assert authenticity(unseen, known, spacing(known)) > 0.4
