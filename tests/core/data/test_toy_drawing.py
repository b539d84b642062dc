import numpy as np
import pytest

from tinycats_core.config import BREEDS, CLASSES
from tinycats_core.data.animals import BREEDS as TABLE
from tinycats_core.data.animals import GLOWS, OTHERS, SPOTS, STROKES
from tinycats_core.data.toy_drawing import MIN_SIZE, draw, generate
from tinycats_core.errors import DataError

Drawn = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return generate(per_class=24, size=32, seed=3)


def test_images_and_labels_have_the_promised_form(drawn: Drawn):
    images, labels = drawn
    assert images.shape == (24 * len(CLASSES), 3, 32, 32)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [24] * len(CLASSES)
    assert images.min() < 40
    assert images.max() > 230
    assert (images.reshape(len(images), -1).std(axis=1) > 15).all()  # no picture is empty


def test_channels_are_red_green_blue(drawn: Drawn):
    images, labels = drawn
    red, _, blue = images[labels == CLASSES.index("Abyssinian"), :, 12:24, 12:20].mean(axis=(0, 2, 3))
    assert red > blue + 40


def test_same_seed_draws_the_same_and_another_seed_does_not():
    first, _ = generate(2, 16, seed=5)
    again, _ = generate(2, 16, seed=5)
    other, _ = generate(2, 16, seed=6)
    assert np.array_equal(first, again)
    assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_picture_does_not_depend_on_how_many_are_drawn(drawn: Drawn):
    few, labels = generate(per_class=3, size=32, seed=3)
    many = drawn[0].reshape(len(CLASSES), 24, 3, 32, 32)
    assert np.array_equal(few.reshape(len(CLASSES), 3, 3, 32, 32), many[:, :3])
    assert labels.tolist() == sorted(labels.tolist())


def test_generate_is_draw_with_the_pictures_own_generator():
    images, _ = generate(per_class=2, size=24, seed=9)
    label = CLASSES.index("Siamese")
    alone = np.asarray(draw(label, np.random.default_rng((9, label, 1)), 24))
    assert np.array_equal(images[2 * label + 1], alone.transpose(2, 0, 1))


def test_no_two_pictures_are_equal(drawn: Drawn):
    images, _ = drawn
    assert len({image.tobytes() for image in images}) == len(images)


def test_individuals_of_a_class_differ_visibly(drawn: Drawn):
    images, labels = drawn
    for label in range(len(CLASSES)):
        own = images[labels == label].astype(float)
        assert own.std(axis=0).mean() > 15, CLASSES[label]


def test_every_breed_is_told_from_every_other(drawn: Drawn):
    """The nearest class mean recognises held-out draws, so the classes differ by more than their poses do."""
    images, labels = drawn
    held_out, truth = generate(per_class=10, size=32, seed=4)
    means = np.stack([images[labels == label].mean(axis=0).ravel() for label in range(len(BREEDS))])
    cats = held_out[truth < len(BREEDS)].reshape(-1, 1, 3 * 32 * 32).astype(float)
    found = ((cats - means) ** 2).sum(axis=-1).argmin(axis=1)
    right = (found == truth[truth < len(BREEDS)]).reshape(len(BREEDS), 10).mean(axis=1)
    assert right.mean() > 0.8
    assert right.min() >= 0.5, dict(zip(BREEDS, right, strict=True))


def test_the_table_covers_the_breeds_and_every_pattern_is_used():
    assert set(TABLE) == set(BREEDS)
    used = {animal.pattern for animal in (*TABLE.values(), *OTHERS)}
    assert used == {"solid", *GLOWS, *STROKES, *SPOTS}


def test_other_shows_several_animals():
    label = CLASSES.index("other")
    pictures = [np.asarray(draw(label, np.random.default_rng(i), 32), float)[10:26, 8:24] for i in range(24)]
    colours = np.array([picture.mean(axis=(0, 1)) for picture in pictures])
    assert colours.std(axis=0).max() > 25  # brown, orange, white: not one animal in many poses


@pytest.mark.parametrize("size", [MIN_SIZE, 33, 200])
def test_any_size_is_drawn(size: int):
    image = draw(0, np.random.default_rng(0), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"


def test_a_larger_picture_shows_the_same_cat():
    small = draw(1, np.random.default_rng(7), 32)
    large = draw(1, np.random.default_rng(7), 128).reduce(4)
    assert np.abs(np.asarray(small, float) - np.asarray(large, float)).mean() < 6


@pytest.mark.parametrize("per_class", [0, -1])
def test_no_pictures_is_an_error(per_class: int):
    with pytest.raises(DataError, match=f"per_class is {per_class}; .*at least 1"):
        generate(per_class, 32, seed=0)


@pytest.mark.parametrize("size", [MIN_SIZE - 1, 0, -4])
def test_too_small_is_an_error(size: int):
    with pytest.raises(DataError, match=f"size is {size} pixels; .*at least {MIN_SIZE}"):
        generate(1, size, seed=0)
    with pytest.raises(DataError, match=f"size is {size} pixels"):
        draw(0, np.random.default_rng(0), size)


@pytest.mark.parametrize("label", [-1, len(CLASSES)])
def test_unknown_class_is_an_error(label: int):
    with pytest.raises(DataError, match=f"label is {label}; allowed: 0 to 12"):
        draw(label, np.random.default_rng(0), 32)
