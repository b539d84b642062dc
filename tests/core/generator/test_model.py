"""TinyDiT: shapes, round trips, and that what it is told makes a difference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinycats_core.config import ModelConfig
from tinycats_core.generator.model import TinyDiT, sincos_positions, unpatchify
from tinycats_core.generator.weights import save_generator

SMALL = ModelConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2)


def moved(config: ModelConfig = SMALL) -> TinyDiT:
    """Return a network whose zero-initialised parts are not zero, so that every input has a way to the output."""
    torch.manual_seed(0)
    model = TinyDiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_patches_are_put_together_row_by_row():
    patches = torch.tensor([[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]])
    assert torch.equal(unpatchify(patches, 2), torch.arange(16).view(1, 1, 4, 4))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_patch_embedding_and_the_output_agree_on_where_a_patch_is(patch: int):
    """An embedding that is the identity cuts an image into what the output puts together again."""
    numbers = 3 * patch**2
    model = TinyDiT(ModelConfig(image_size=16, patch_size=patch, width=numbers, depth=1, heads=1))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        rows = torch.eye(numbers).view(numbers, patch, patch, 3).permute(0, 3, 1, 2)  # output channel i reads entry i of the patch
        model.patch_embed.weight.copy_(rows)
        tokens = model.patch_embed(images).flatten(2).transpose(1, 2)
    assert torch.allclose(unpatchify(tokens, patch), images)


def test_a_file_is_loaded_without_pytorchs_compiler(tmp_path: Path):
    save_generator(tmp_path / "weights", TinyDiT(SMALL).state_dict(), SMALL, [str(n) for n in range(SMALL.num_classes)], step=1)
    code = """
import sys
from pathlib import Path
from tinycats_core.generator.weights import load_generator
load_generator(Path(sys.argv[1]))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "weights")], check=True)


def test_the_plan_has_33_million_parameters():
    with torch.device("meta"):
        model = TinyDiT(ModelConfig())
    assert 32e6 < sum(p.numel() for p in model.parameters()) < 34e6


def test_an_untrained_network_predicts_nothing():
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 0.5]), torch.tensor([0, 13])
    as_velocity = TinyDiT(SMALL.model_copy(update={"prediction": "v"}))
    assert torch.equal(as_velocity(x, t, labels), torch.zeros_like(x))
    as_image = TinyDiT(SMALL)  # the grey image: v = (0 − x_t) / (1 − t)
    assert torch.allclose(as_image(x, t, labels), -x / (1 - t).view(-1, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_time_class_and_every_patch_reach_the_output(prediction: str):
    model = moved(SMALL.model_copy(update={"prediction": prediction}))
    x, t, labels = torch.randn(1, 3, 16, 16), torch.tensor([0.3]), torch.tensor([2])
    base = model(x, t, labels)
    assert base.shape == x.shape
    assert not torch.allclose(base, model(x, torch.tensor([0.4]), labels), atol=1e-4)
    assert not torch.allclose(base, model(x, t, torch.tensor([13])), atol=1e-4)
    far = x.clone()
    far[..., -1, -1] += 1  # the last patch must be seen by the first
    assert not torch.allclose(base[..., :4, :4], model(far, t, labels)[..., :4, :4], atol=1e-6)


def test_images_of_a_batch_do_not_see_each_other():
    model = moved()
    x, t, labels = torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([0, 5, 13])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert torch.allclose(model(x, t, labels), alone, atol=1e-4)


def test_gradient_checkpointing_changes_memory_not_gradients():
    gradients = []
    for on in (False, True):
        model = moved().train()
        model.gradient_checkpointing = on
        torch.manual_seed(1)
        model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_positions_are_all_different():
    positions = sincos_positions(8, 32)[0]
    assert positions.shape == (64, 32)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.05
