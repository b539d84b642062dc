"""Weights on disk: exact round trips, and every kind of damage found."""

from pathlib import Path

import pytest
import torch

from tinycats_core.config import ModelConfig
from tinycats_core.errors import CheckpointError
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.weights import load_generator, save_generator
from tinycats_core.tensors import read_safetensors, write_safetensors

SMALL = ModelConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "ema.safetensors"
    save_generator(path, TinyDiT(SMALL).state_dict(), SMALL, [f"c{i}" for i in range(13)], 7, {"note": "x"})
    return path


def test_a_generator_comes_back_as_it_was(saved: Path):
    torch.manual_seed(0)
    original = TinyDiT(SMALL).eval()
    model, header = load_generator(saved)
    assert not model.training
    assert (header.step, header.model, len(header.classes), header.facts) == (7, SMALL, 13, {"note": "x"})
    x, t, labels = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 13])
    assert torch.equal(model(x, t, labels), original(x, t, labels))


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    one = write_safetensors(tmp_path / "1", tensors, {"kind": "k", "x": 1})
    two = write_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"x": 1, "kind": "k"})
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, keep: float):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * keep) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors") as error:
        load_generator(saved)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_anywhere_is_found(saved: Path):
    data = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(data), (60,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_safetensors(saved, "generator")


def test_weights_of_another_architecture_are_refused(tmp_path: Path):
    wide = TinyDiT(SMALL.model_copy(update={"width": 64}))
    path = tmp_path / "wide.safetensors"
    save_generator(path, wide.state_dict(), SMALL, ["a"], 1)
    with pytest.raises(CheckpointError, match=r"another architecture: \d+ tensors do not fit"):
        load_generator(path)


def test_a_missing_file_and_a_file_of_another_kind_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist"):
        load_generator(tmp_path / "nothing.safetensors")
    path = write_safetensors(tmp_path / "c.safetensors", {"a": torch.ones(1)}, {"kind": "classifier"})
    with pytest.raises(CheckpointError, match="is a 'classifier' file, not a 'generator' one"):
        load_generator(path)
    text = tmp_path / "t.safetensors"
    text.write_text("these are not weights at all, whatever the name says")
    with pytest.raises(CheckpointError, match="not a complete generator file"):
        load_generator(text)
