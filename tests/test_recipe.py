"""The experiments of `benchmarks.recipe`: each of them trains, differs from the base, and ends in the documentation."""

import argparse
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import recipe, variants
from benchmarks.rows import AGAINST, BASE, ROWS, Row
from benchmarks.trials import changed_as, draw_row
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.training import Run, draw_batch, training_step

TRAINED = {row.training: row for row in [*ROWS, *AGAINST]}.values()
SETTINGS = TrainConfig(batch_size=64)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.tensor([0] * 36 + [1] * 4)


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_each_row_trains_and_draws(row: Row, images: tuple[Tensor, Tensor]):
    model = ModelConfig.model_validate(BASE["model"] | row.model | {"num_classes": 2, "depth": 1})
    config = TrainConfig.model_validate(BASE["train"] | row.train | {"batch_size": 4, "steps": 3, "warmup_steps": 0})
    with changed_as(row):
        run = Run.from_images(*images, ("a", "b"), model, config, torch.device("cpu"))
        before = {name: weight.clone() for name, weight in run.weights.items()}
        losses = [float(training_step(run)[0]) for _ in range(3)]
    assert all(loss > 0 for loss in losses)
    unchanged = {name for name, weight in run.weights.items() if torch.equal(weight, before[name])}
    assert unchanged <= {"positions"}
    assert draw_row(row, run, torch.tensor([0, 1])).shape == (2, 3, 32, 32)


def test_names_are_unique_and_no_row_is_another_one_again():
    assert max(Counter(row.name for row in [*ROWS, *AGAINST]).values()) == 1
    assert max(Counter((row.training, str(row.sample), row.weights) for row in ROWS).values()) == 1
    assert [row.name for row in AGAINST] == ["recipe", "ancestor"]


def test_rotary_positions_make_attention_depend_on_places():
    turned = variants.RotaryAttention(64, 4, side=3)
    tokens = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(turned(tokens)[:, order], turned(tokens[:, order]), atol=1e-4)
    q = turned._turn(tokens.view(1, 9, 4, 16).transpose(1, 2))
    assert torch.allclose(q.norm(dim=-1), tokens.view(1, 9, 4, 16).transpose(1, 2).norm(dim=-1), atol=1e-5)


def test_a_balanced_batch_holds_the_classes_equally_often(images: tuple[Tensor, Tensor]):
    config = SETTINGS.model_copy(update={"label_dropout": 0.0})
    seen = torch.cat([variants.balanced(*images, config, 2, step)[3] for step in range(20)])
    rare = (seen == 1).double().mean()
    assert abs(float(rare) - 0.5) < 0.05


def test_crops_keep_a_plain_image_and_change_a_busy_one(images: tuple[Tensor, Tensor]):
    plain = torch.full((8, 3, 32, 32), 200, dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.long)
    before, after = draw_batch(plain, labels, SETTINGS, 2, 0)[0], variants.cropped(plain, labels, SETTINGS, 2, 0)[0]
    assert torch.allclose(before, after, atol=1e-6)
    busy = variants.cropped(*images, SETTINGS, 2, 0)[0]
    assert float((busy - draw_batch(*images, SETTINGS, 2, 0)[0]).abs().mean()) > 0.05
    assert busy.min() >= -1
    assert busy.max() <= 1


def test_the_network_is_told_of_every_change(images: tuple[Tensor, Tensor]):
    x_1 = variants.changed(*images, SETTINGS, 2, 0)[0]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(x_1, draw_batch(*images, SETTINGS, 2, 0)[0], strict=True)]
    told = variants.TimeAndChange.told
    assert told is not None
    assert same == [not row.any() for row in told]
    assert 0.2 < sum(same) / len(same) < 0.8


def test_the_interval_holds_both_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = {"fid": 1.0, "precision": 0.5, "recall": 0.5, "copy_rate": 0.0, "copy_rate_real": 0.0, "steps": 1000}
    runs = [{"kid": kid, "kid_std": 0.03, **measured} for kid in (0.1, 0.18)]
    given = argparse.Namespace(photos=None, steps=2400, seeds=2)
    row = recipe.summary(ROWS[0], runs, given)
    assert row["kid"] == pytest.approx(0.14)
    assert row["kid_interval"] == pytest.approx(1.96 * ((0.03**2 + 0.0032) / 2) ** 0.5)
    page = tmp_path / "recipe.md"
    page.write_text(f"before\n{recipe.MARKS[0]}\nold\n{recipe.MARKS[1]}\nafter\n")
    monkeypatch.setattr(recipe, "DOCUMENT", page)
    text = recipe.document([row])
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| 0.1400 ± 0.0887 |" in text
    assert f"`{row['command']}`" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rop"], "rop: no such row; there are base"),
        (["--steps", "0"], "--steps: 0 is not a whole number of 1 or more"),
        (["--seeds", "two"], "--seeds: two is not"),
        (["--minutes", "0", "--against", "ancestor"], "--minutes is 0; it must be more than 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        recipe.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_folder_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert recipe.main(["--photos", "/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: data.folder /nowhere does not exist")
