"""The experiments of `benchmarks.recipe`: each of them trains, differs from the base, and ends in the documentation."""

import argparse
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.recipe import __main__ as recipe
from benchmarks.recipe.rows import AGAINST, BASE, ROWS, Row
from benchmarks.recipe.trials import draw_row
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

TRAINED = {row.training: row for row in [*ROWS, *AGAINST]}.values()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.tensor([0] * 36 + [1] * 4)


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_each_row_trains_and_draws(row: Row, images: tuple[Tensor, Tensor]):
    model = ModelConfig.model_validate(BASE["model"] | row.model | {"num_classes": 2, "depth": 1})
    config = TrainConfig.model_validate(BASE["train"] | row.train | {"batch_size": 4, "steps": 3, "warmup_steps": 0})
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
