"""Sheets show each image where it belongs."""

import numpy as np
import torch

from tinycats_core.grids import confusion_matrix, contact_sheet, neighbour_sheet


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


def test_a_cell_is_as_dark_as_its_share_of_the_row():
    def darkest(*rows: list[int]) -> int:
        return int((np.asarray(confusion_matrix(rows, ("Egyptian_Mau", "other"))) == (8, 48, 107)).all(axis=2).sum())

    one, both = darkest([5, 0], [0, 0]), darkest([5, 0], [0, 500])
    assert darkest([0, 0], [0, 0]) == 0  # classes without images stay white
    assert one > 1000
    assert 1.8 * one < both < 2.2 * one
