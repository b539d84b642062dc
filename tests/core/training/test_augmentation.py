"""Augmentation: what is told is what was done, images without a change stay as they are, and nothing of it is drawn."""

import math
from pathlib import Path

import pytest
import torch
from small_runs import MODEL, config
from torch import Tensor

from tinycats_core.config.training import Augmentation
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Dataset
from tinycats_core.tensors import read_header
from tinycats_core.training.augmentation import COLOUR, GEOMETRY, LABELS, apply, augment, draw_labels, source_of
from tinycats_core.training.recipe import draw_batch
from tinycats_core.training.start import train
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

TOLD: tuple[Augmentation, ...] = ("medium", "full")
NAMES = GEOMETRY + COLOUR


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=seeded()) * 2 - 1


def ramp(size: int = 64) -> Tensor:
    """Return an image whose channels are x, y and their mean, in [−0.5, 0.5]: moving it shows as numbers."""
    line = (2 * torch.arange(size) + 1) / size / 2 - 0.5
    x, y = line.expand(size, size), line.view(-1, 1).expand(size, size)
    return torch.stack([x, y, (x + y) / 2]).unsqueeze(0)


def label(**changes: float) -> Tensor:
    return torch.tensor([[changes.get(name, 0.0) for name in NAMES]])


def inner(images: Tensor) -> Tensor:
    """Return the middle of images, which reflection does not reach."""
    quarter = images.shape[-1] // 4
    return images[..., quarter:-quarter, quarter:-quarter]


@pytest.mark.parametrize("kind", LABELS)
def test_without_probability_only_flips_are_left(kind: Augmentation):
    images = noise(200)
    done, labels = augment(images, kind, seeded(), probability=0)
    assert labels.shape == (200, LABELS[kind])
    assert not labels.any()
    mirrored, straight = ((done == other).flatten(1).all(1) for other in (images.flip(-1), images))
    assert bool((mirrored | straight).all())
    assert mirrored.float().mean() == pytest.approx(0 if kind == "none" else 0.5, abs=0.1)


@pytest.mark.parametrize("kind", TOLD)
def test_an_image_is_as_it_was_exactly_if_its_label_is_zero(kind: Augmentation):
    images = noise(400)
    images = torch.cat([images, images.flip(-1)])  # so that a flip can be told from a change
    done, labels = augment(images, kind, seeded())
    plain = ~labels.any(1)
    assert 0.1 < plain.float().mean() < 0.9
    same = ((done == images) | (done == images.flip(-1))).flatten(1).all(1)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("kind", TOLD)
def test_each_change_is_as_frequent_and_as_large_as_it_should_be(kind: Augmentation):
    labels = draw_labels(40_000, kind, seeded())
    assert (labels != 0).float().mean(0).tolist() == pytest.approx([0.12] * LABELS[kind], abs=0.01)
    always = draw_labels(40_000, kind, seeded(), probability=1)
    means = dict.fromkeys(NAMES[: LABELS[kind]], 0.0)
    means |= {"zoom": math.log2(1.25) / 0.2 / 2} if kind == "medium" else {"turn_cos": -1.0}
    assert always.mean(0).tolist() == pytest.approx(list(means.values()), abs=0.03)
    assert labels.mean(0).tolist() == pytest.approx([0.12 * mean for mean in means.values()], abs=0.03)
    if kind == "medium":  # a zoom of at most 1.25, and shifts of at most a sixteenth
        assert 0 <= float(always[:, 0].min()) < float(torch.exp2(0.2 * always[:, 0]).max()) <= 1.2501
        assert always[:, 1:].abs().max() / 8 <= 1 / 16


def test_every_change_can_be_taken_back():
    """The matrix of the opposite label is the inverse: a turn's is its conjugate."""
    square = torch.tensor([[0.0, 0.0, 1.0]])
    turn = {"turn_cos": math.cos(0.7) - 1, "turn_sin": math.sin(0.7)}
    back = turn | {"turn_sin": -turn["turn_sin"]}
    for there, here in (
        (label(zoom=1.3), label(zoom=-1.3)),
        (label(shift_x=0.4, shift_y=-0.2), label(shift_x=-0.4, shift_y=0.2)),
        (label(**turn), label(**back)),
        (label(stretch_cos=0.9, stretch_sin=-0.5), label(stretch_cos=-0.9, stretch_sin=0.5)),
    ):
        one, other = (torch.cat([source_of(labels[:, :7])[0], square]) for labels in (there, here))
        assert torch.allclose(one @ other, torch.eye(3), atol=1e-6)
        assert not torch.allclose(one, torch.eye(3), atol=1e-2)
        again = apply(apply(ramp(), there), here)
        assert (inner(again) - inner(ramp())).abs().max() < 0.01


def test_a_change_does_what_its_label_says():
    image = ramp()
    moved = apply(image, label(shift_x=0.5))  # a sixteenth of the side to the right
    assert torch.allclose(inner(moved)[:, 0], inner(image)[:, 0] - 1 / 16, atol=1e-3)
    assert torch.allclose(inner(moved)[:, 1], inner(image)[:, 1], atol=1e-3)
    zoomed = apply(image, label(zoom=5.0))  # an octave
    assert torch.allclose(inner(zoomed), inner(image) / 2, atol=1e-3)
    turned = apply(image, label(turn_cos=-1.0, turn_sin=1.0))  # a right angle, clockwise
    assert torch.allclose(inner(turned), inner(torch.rot90(image, -1, (2, 3))), atol=1e-3)
    stretched = apply(image, label(stretch_cos=5.0))  # an octave along x, and its inverse along y
    assert torch.allclose(inner(stretched)[:, 0], inner(image)[:, 0] / 2, atol=1e-3)
    area = torch.linalg.det(source_of(label(stretch_cos=0.8, stretch_sin=2.0)[:, :7])[:, :, :2])
    assert area.item() == pytest.approx(1, abs=1e-5)


def test_colours_change_by_a_sum_by_contrast_and_by_saturation():
    image = noise(1) / 4
    assert torch.allclose(apply(image, label(brightness=1.0)), image + 0.2, atol=1e-6)
    assert torch.allclose(apply(image, label(contrast=2.0)), image * 2, atol=1e-6)
    grey = image.mean(1, keepdim=True)
    assert torch.allclose(apply(image, label(saturation=-60.0)), grey.expand_as(image), atol=1e-6)
    assert torch.allclose(apply(image, label(saturation=1.0)).mean(1, keepdim=True), grey, atol=1e-6)
    assert apply(noise(50), draw_labels(50, "full", seeded(), probability=1)).abs().max() <= 1


@pytest.mark.parametrize("kind", TOLD)
def test_the_network_is_told_and_without_it_stays_what_it_is(kind: Augmentation, two_colours: Dataset):
    plain, told = (Run.start(two_colours, MODEL, config(augmentation=kind), torch.device("cpu")) for kind in ("basic", kind))
    assert told.weights.keys() - plain.weights.keys() == {"label_layer.weight"}
    assert all(torch.equal(told.weights[name], plain.weights[name]) for name in plain.weights)
    assert told.emas[0.9999].keys() == plain.weights.keys()
    *_, labels = draw_batch(told.images, told.labels, told.config, 2, step=0)
    assert labels.shape == (8, LABELS[kind])
    assert len(draw_batch(plain.images, plain.labels, plain.config, 2, step=0)) == 4
    told.config = config(augmentation=kind, batch_size=64)
    for _ in range(3):
        training_step(told)
    assert told.weights["label_layer.weight"].any()


def test_what_is_told_changes_the_prediction_and_nothing_told_changes_nothing():
    torch.manual_seed(0)
    network = TinyDiT(MODEL, augmentation_labels=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, labels = noise(2), torch.rand(2), torch.tensor([0, 1])
    drawn = network(x, t, labels)
    assert torch.equal(network(x, t, labels, torch.zeros(2, 3)), drawn)
    assert not torch.allclose(network(x, t, labels, torch.ones(2, 3)), drawn, atol=1e-4)


def test_an_augmented_training_resumes_bit_by_bit_and_ships_a_plain_network(two_colours: Dataset, tmp_path: Path):
    settings = config(augmentation="full")
    whole = train(two_colours, MODEL, settings, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at_nine(row: dict) -> None:
        if row["step"] == 9:
            raise Stop

    with pytest.raises(Stop):
        train(two_colours, MODEL, settings, tmp_path / "parts", on_log=stop_at_nine)
    parts = train(two_colours, MODEL, settings, tmp_path / "parts")
    assert (parts.ema.sha256, parts.raw.sha256) == (whole.ema.sha256, whole.raw.sha256)
    for weights in (whole.ema, whole.raw):
        network, _ = load_generator(weights.path)
        assert not hasattr(network, "label_layer")
    checkpoint = read_header(tmp_path / "parts" / "checkpoints" / "step-00000012.safetensors", "training")
    assert checkpoint["identity"]["train"]["augmentation"] == "full"
