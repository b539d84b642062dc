"""Copies are found, also mirrored or noisy ones; images of the same kind are none."""

import pytest
import torch

from tinycats_core.memorization import copy_rate


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
    assert copy_rate(torch.cat([others, train[:10]]), train, batch_size=7) == pytest.approx(0.25)


def test_what_lies_between_two_training_images_is_a_copy_of_neither(train: torch.Tensor):
    between = ((train[:20].int() + train[20:].int()) // 2).to(torch.uint8)
    assert copy_rate(between, train) == 0
