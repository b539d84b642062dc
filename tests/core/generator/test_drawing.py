"""What a release ships as sample.py: the noise, the batches and the PNG files."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinycats_core.generator import drawing
from tinycats_core.generator.sampling import initial_noise


class Session:
    """Stands for onnxruntime: it draws each noise as an image of its label, and notes the size of each batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={"image_size": "4", "classes": json.dumps(["a", "b", "c"])})

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert (names, feeds["guidance"].dtype, feeds["guidance"].shape) == (["images"], np.float32, ())
        self.batches.append(len(feeds["labels"]))
        return [np.broadcast_to(feeds["labels"].reshape(-1, 1, 1, 1), feeds["noise"].shape).astype(np.uint8)]


def test_images_come_in_the_order_of_their_labels():
    session, seen = Session(), []
    labels = [2, 0, 1, 1, 2]
    images = drawing.draw(session, labels, 3, 1.5, 2, lambda parts: (seen.append(len(parts)), parts)[1])
    assert (images.shape, session.batches, seen) == ((5, 4, 4, 3), [2, 2, 1], [3])
    assert images[:, 0, 0, 0].tolist() == labels


def test_the_noise_is_that_of_the_samplers():
    assert np.array_equal(drawing.noise([5, 0], 8, 3), initial_noise([5, 0], 8, 3).numpy())


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (16, 16, 3)])
def test_a_png_file_holds_the_pixels(shape: tuple[int, int, int]):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(drawing.png(image))) as read:
        assert (read.format, read.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(read), image)
