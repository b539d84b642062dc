import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tinycats_core.compute import costs
from tinycats_core.errors import TinycatsError
from tinycats_core.records import Release
from tinycats_core.release import card, manifest


def numbers_of(value: Any) -> set[str]:
    """Every number of a JSON value, written as the card writes numbers."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_of, value))
    return {card.number(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def tables(text: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_every_number_of_every_table_stands_in_the_files_of_the_release(built: Release):
    files = ("metrics.json", "benchmark.json", "precision.json", "decision.json", "sweep.json")
    known = set().union(*(numbers_of(json.loads((built.folder / file).read_text())) for file in files))
    cells = [cell for row in tables((built.folder / "README.md").read_text()) for cell in row[1:]]
    shown = [cell for cell in cells if re.fullmatch(r"-?[\d,.]+(e[+-]\d+)?", cell)]
    assert len(shown) > 30
    assert [cell for cell in shown if cell not in known] == []


def test_every_number_of_the_training_stands_in_its_record(built: Release):
    text = (built.folder / "README.md").read_text()
    section = text.split("## Training\n\n")[1].split("\n\n")[0]
    cost = json.loads((built.folder / "training_cost.json").read_text())
    shown = re.findall(r"(?<![\w-])[\d,.]*\d", section.replace(cost["price"]["seen"], ""))
    assert len(shown) == 10
    assert set(shown) <= numbers_of(cost) | set(re.findall(r"\d+", cost["charge"]))
    assert "7 steps in 1.269 hours at 0.5044 images/s on 1 × L4 of Modal (cuda: NVIDIA L4), bf16" in section
    assert "bf16, attempts: 2, steps run: 9; " in section
    assert f"second-hand list, not verified, dated {cost['price']['seen']}" in section


def test_a_training_without_dollars_says_why(built: Release, tmp_path: Path):
    for file in card.PARTS:
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text())
    cost = json.loads((built.folder / "training_cost.json").read_text())
    local = {"gpu": None, "gpus": None, "device": "cpu", "price": None, "dollars": None, "charge": costs.HERE}
    (tmp_path / "training_cost.json").write_text(json.dumps(cost | local))
    section = card.model_card(tmp_path, "tinycats", "abc").split("## Training\n\n")[1].split("\n\n")[0]
    assert "images/s on cpu, bf16" in section
    assert costs.HERE in section
    assert "$" not in section


def test_each_metric_stands_beside_the_floor_and_the_others(built: Release, parts: dict[str, Any]):
    rows = {row[0]: row[1:] for row in tables((built.folder / "README.md").read_text())}
    assert rows["metric"][:4] == ["this model", "onnx-int8", "published before", "floor"]
    assert rows["`kid_breed`"][:4] == ["0.0345", "0.0351", "0.0399", "0.0111"]
    assert rows["`is_breed`"][:4] == ["–"] * 4
    assert rows["`denoiser-int8.onnx`"][0] == f"{parts['models'][1].facts['bytes']:,}"
    assert rows["extractor"] == ["breed"]
    assert rows["kid_not_worse"][2] == "yes"


def test_the_choice_is_told_with_all_that_was_tried(built: Release, tmp_path: Path):
    text = (built.folder / "README.md").read_text()
    section = text.split("## Choice\n\n")[1].split("\n## ")[0]
    assert "decay 0.9 at step 7, drawn with guidance 1.5 for t from 0 to 1. The rule: the lowest kid_breed." in section
    assert "26 images were drawn and held against 13 validation images" in section
    assert "The training ended at step 14 of 21: the images of step 14 are copies of training images." in section
    assert "![KID and copy rates over the steps](samples/course.png)" in section
    rows = [(row[0], row[3], row[5], row[-1]) for row in tables(section)[1:]]
    assert rows == [("14", "1.5", "0.0333", "no"), ("7", "2.5", "0.0555", "no"), ("7", "1.5", "0.0444", "yes")]
    for file in ("data", "metrics", "benchmark", "decision", "release_config"):
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text())
    sweep = json.loads((built.folder / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(
        json.dumps(sweep | {"rows": [], "rule": "the first", "ended": None, "note": "there are too few."})
    )
    alone = card.model_card(tmp_path, "tinycats", "abc")
    assert "The rule: the first. Note: there are too few." in alone


def test_how_fast_each_runtime_draws_is_told_with_the_machine(built: Release):
    section = (built.folder / "README.md").read_text().split("## Speed\n\n")[1].split("\n## ")[0]
    head, pytorch, fp32, int8 = tables(section)
    assert head[:6] == ["runtime", "device", "p50", "p95", "p99", "images"]
    assert pytorch[:6] == ["pytorch", "cpu", "31.5", "47.25", "–", "80"]
    assert [row[0] for row in (fp32, int8)] == ["onnx-fp32", "onnx-int8"]
    assert int8[-2:] == ["24.38", "95.62"]
    assert "ab2 in 3 steps at guidance 1.5" in section
    assert "1.9 times as fast as the fp32 file" in section
    assert "- pytorch on cpu has no p99: it takes 100 images" in section
    assert "cpu A CPU, cores 2, torch_threads 1, torch 2.0." in section


def test_the_average_is_shown_beside_the_raw_weights(built: Release):
    assert "](samples/ema_and_raw.png)" in (built.folder / "README.md").read_text()


def test_copies_of_training_images_are_told(built: Release, tmp_path: Path):
    text = (built.folder / "README.md").read_text()
    assert "a share of 0.0022 lies three times nearer" in text
    assert "of the test images, which nobody could copy, 0.0111" in text
    rows = {row[0]: row[1:] for row in tables(text)}
    assert rows["`kid_breed_low`"][4].startswith("lower end of its 95 % interval")
    assert rows["`kid_breed_std`"][4] == "its standard error"
    assert rows["`coverage`"][:1] == ["0.5678"]
    for file in card.PARTS:
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    del metrics["candidate"]["metrics"]["copy_rate"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert "has not been measured" in card.model_card(tmp_path, "tinycats", "abc")


def test_other_measurements_give_another_card(built: Release, tmp_path: Path):
    for file in card.PARTS:
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text().replace("0.0345", "0.9876"))
    text = card.model_card(tmp_path, "tinycats", "abc")
    assert "0.9876" in text
    assert "0.0345" not in text


def test_the_header_is_read_by_the_library(built: Release, parts: dict[str, Any]):
    data: Any = ModelCard.load(built.folder / "README.md").data
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    told = {name: value for name, value in parts["report"].metrics.items() if value is not None}
    assert results == {
        name: value for name, value in told.items() if not name.endswith(("_std", "_low", "_high", "_infinite", "_k5"))
    }
    assert 3 < len(results) < len(told)
    assert data.license == "mit"
    assert data.pipeline_tag == "unconditional-image-generation"


@pytest.mark.parametrize(
    ("source", "licence", "text"),
    [("oxford_pets", "cc-by-sa-4.0", "Parkhi"), ("folder", "other", "your own photos"), ("toycats", "mit", "No photo was used")],
)
def test_the_licence_follows_the_data(built: Release, source: str, licence: str, text: str, tmp_path: Path):
    for file in card.PARTS:
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text())
    data = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(data | {"source": source}))
    found = ModelCard(card.model_card(tmp_path, "tinycats", "abc"))
    assert found.data.to_dict()["license"] == licence
    assert text in found.text


def test_the_files_that_the_card_names_are_there(built: Release):
    text = (built.folder / "README.md").read_text()
    named = re.findall(r"\]\(((?!http)[^)]+)\)", text) + re.findall(r"^\| `([a-z_/]+\.[a-z]+)`", text, re.MULTILINE)
    assert "samples/grid.png" in named
    assert {"training_log.jsonl", "training_diary.jsonl", "training_cost.json"} <= set(named)
    assert [file for file in named if not (built.folder / file).is_file()] == []


def test_the_snippets_of_the_card_run_from_anywhere_and_leave_the_release_intact(built: Release, tmp_path: Path):
    text = (built.folder / "README.md").read_text().replace("RELEASE", str(built.folder))
    (shell,) = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    install, command = shell.splitlines()
    assert install == "pip install numpy onnxruntime"
    python, *arguments = command.split()
    assert python == "python"
    subprocess.run([sys.executable, "-W", "error", *arguments], cwd=tmp_path, check=True)
    assert sorted(path.name for path in (tmp_path / "cats").iterdir()) == [f"Abyssinian-{i}.png" for i in range(4)]
    (snippet,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "cat.png").is_file()
    assert manifest.inspect(built.folder)[1] == []


def test_a_card_on_the_hub_says_how_to_download(built: Release):
    text = card.model_card(built.folder, "my-cats", "abc", repo_id="someone/my-cats")
    assert "hf download someone/my-cats --local-dir my-cats\npython my-cats/sample.py --class Abyssinian -n 4 --out cats\n" in text
    assert 'tinycats_core.load("someone/my-cats")' in text


def test_the_card_begins_with_the_picture_and_five_figures_and_folds_the_rest(built: Release):
    body = (built.folder / "README.md").read_text().split("---\n\n", 1)[1]
    front, *folded = body.split("<details>\n")
    assert re.match(r"# [\w.-]+\n\n!\[[^]]+\]\(samples/grid.png\)", front)
    named = [row[0] for row in tables(front.split("## ")[0]) if row[0].startswith("`")]
    assert named == ["`kid_breed`", "`fd_breed`", "`coverage`", "`copy_rate`"]  # breed_accuracy was not measured here
    titles = ["All measurements", "Choice of weights and guidance", "ONNX files and speed", "Training", "Files"]
    assert [text.split("</summary>")[0].removeprefix("<summary>") for text in folded] == titles
    assert body.count("</details>") == len(titles)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(TinycatsError, match=r"sweep.json does not exist"):
        card.model_card(tmp_path, "tinycats", "abc")


def test_a_forced_release_says_so_in_plain_words(built: Release, tmp_path: Path):
    assert f"model-index:\n- name: {built.name}\n" in (built.folder / "README.md").read_text()
    for file in card.PARTS:
        (tmp_path / f"{file}.json").write_text((built.folder / f"{file}.json").read_text())
    decision = json.loads((built.folder / "decision.json").read_text())
    (tmp_path / "decision.json").write_text(json.dumps(decision | {"promoted": False, "forced": "<b> they wait"}))
    text = card.model_card(tmp_path, "tinycats", "abc")
    assert "The gate refused this version; compared with version" in text
    assert "A person published it anyway: &lt;b&gt; they wait\n" in text
    (tmp_path / "decision.json").write_text(json.dumps({key: value for key, value in decision.items() if key != "forced"}))
    assert "anyway" not in card.model_card(tmp_path, "tinycats", "abc")  # of a release from before
