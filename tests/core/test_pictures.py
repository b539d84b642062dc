"""Sheets show each image where it belongs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from release_parts import make_checkpoint

from tinycats_core.config import SampleConfig
from tinycats_core.errors import TinycatsError
from tinycats_core.evaluation.memorization import neighbour_sheet
from tinycats_core.generator import sampling
from tinycats_core.generator.sampling import draw_ema_and_raw
from tinycats_core.generator.weights import load_generator
from tinycats_core.pictures import confusion_matrix, contact_sheet, legible, sheet_names


def test_a_row_holds_a_class_and_a_place_an_image():
    levels = torch.tensor([10, 20, 30, 40])
    images = levels.view(-1, 1, 1, 1).expand(4, 3, 6, 8).to(torch.uint8)
    sheet = np.asarray(contact_sheet(images, torch.tensor([1, 0, 1, 0]), ("a", "b"), per_class=2, scale=2))
    assert sheet.shape == (2 * (12 + 2), 130 + 2 * (16 + 2), 3)
    places = [(0, 130), (0, 148), (14, 130), (14, 148)]
    assert [int(sheet[top + 11, left + 15, 0]) for top, left in places] == [20, 40, 10, 30]


def test_each_image_stands_beside_its_nearest_training_image():
    train = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images, labels = train[[4, 2]] // 2 + 60, torch.tensor([0, 1])
    sheet = np.asarray(neighbour_sheet(images, labels, train, ("a", "b")))
    for row, of in enumerate((4, 2)):
        top = row * 10
        shown = torch.from_numpy(sheet[top : top + 8, 130 : 130 + 16].copy()).permute(2, 0, 1)
        assert torch.equal(shown[:, :, :8], images[row])
        assert torch.equal(shown[:, :, 8:], train[of])


def test_captions_stand_above_the_parts_of_each_image():
    images = torch.zeros(2, 3, 8, 80, dtype=torch.uint8)
    plain = np.asarray(contact_sheet(images, torch.tensor([0, 1]), ("a", "b"), per_class=1))
    captioned = np.asarray(contact_sheet(images, torch.tensor([0, 1]), ("a", "b"), per_class=1, captions=("I", "raw")))
    assert (captioned[20:] == plain).all()
    left, right = ((captioned[:20, start : start + 40] < 128).sum() for start in (130, 170))
    assert 0 < left < right


def test_the_average_and_the_raw_weights_draw_from_the_same_noise_side_by_side(tmp_path: Path):
    ema, raw = (make_checkpoint(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2))
    settings = SampleConfig(steps=3, seed=5)
    picture = draw_ema_and_raw(ema, raw, settings, tmp_path / "pictures" / "ema_and_raw.png").verify()
    with Image.open(picture.path) as opened:
        sheet = torch.from_numpy(np.asarray(opened).copy()).permute(2, 0, 1)[:, 20:, 130:]
    labels = torch.arange(13).repeat_interleave(4)
    for place, weights in enumerate((ema, raw)):
        wanted = sampling.sample(load_generator(weights.path)[0], labels, 16, 13, settings)
        assert wanted.float().std() > 10
        for index in (0, 3, 4 * 7 + 2):  # a row a class, four pairs in each; 16 pixels enlarged to 64
            top, left = index // 4 * 66, index % 4 * 130 + place * 64
            shown = sheet[:, top : top + 64 : 4, left : left + 64 : 4]
            assert (shown.int() - wanted[index].int()).abs().max() <= 1
    again = draw_ema_and_raw(ema, raw, settings, tmp_path / "again.png")
    assert again.content == picture.content
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(TinycatsError, match=r"1.safetensors is gone"):
        draw_ema_and_raw(ema, raw, settings, tmp_path / "third.png")


def test_a_cell_is_as_dark_as_its_share_of_the_row():
    def darkest(*rows: list[int]) -> int:
        return int((np.asarray(confusion_matrix(rows, ("Egyptian_Mau", "other"))) == (8, 48, 107)).all(axis=2).sum())

    one, both = darkest([5, 0], [0, 0]), darkest([5, 0], [0, 500])
    assert darkest([0, 0], [0, 0]) == 0  # classes without images stay white
    assert one > 1000
    assert 1.8 * one < both < 2.2 * one


ODD_NAMES = ("Мурка", "猫", "🐱", "$^$", "grid", "Grid", "a\nb", "x" * 300, "..", "con", "Éva", "British_Shorthair")


def test_names_in_any_script_are_legible_on_pictures():
    shown = [legible(name) for name in ODD_NAMES]
    assert shown[:3] == ["Murka", "Mao", "cat face"]
    assert shown[-2:] == ["Eva", "British Shorthair"]
    assert all(name.isascii() and name.isprintable() for name in shown)
    images, labels = torch.zeros(len(ODD_NAMES), 3, 32, 32, dtype=torch.uint8), torch.arange(len(ODD_NAMES))
    sheet = np.asarray(contact_sheet(images, labels, ODD_NAMES, per_class=1))
    assert (sheet[:, 124:130] == 255).all()  # no name runs into the images
    confusion_matrix([[1] * len(ODD_NAMES)] * len(ODD_NAMES), ODD_NAMES)


def test_each_class_has_a_sheet_of_its_own_on_every_system():
    names = sheet_names(ODD_NAMES)
    assert len({name.lower() for name in names}) == len(names)
    assert not {name.lower() for name in names} & {"grid", "neighbours", "con"}
    assert all(len(name) <= 70 and name.strip(".") and name.isascii() and not set(name) & set('/\\:*?"<>|\n$^') for name in names)
    assert names[-1] == "British_Shorthair"
