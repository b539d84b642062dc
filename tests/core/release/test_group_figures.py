"""A release whose figures are of cats: what it says of other groups, and how it stands beside one from before groups."""

from typing import Any

import pandas
import pytest
from huggingface_hub import ModelCard

from tinycats_core.files import read_json
from tinycats_core.records import FidelityReport, GroupFigures, Release, ReleaseParts
from tinycats_core.release import bundle, figures, lineage, shipped
from tinycats_core.release.cats import Cats
from tinycats_core.release.comparison import compare


def by_group(report: FidelityReport) -> FidelityReport:
    """Return the report as one of cats, with other figures for all images."""
    doubled = {name: value and 2 * value for name, value in report.metrics.items()}
    own = {"generated": 52, "reference": 26, "floor": 26, "kid_subset_size": 13, "trivial_kid": {"noise": 3.0}}
    group = GroupFigures(name="all", metrics=doubled, floor=report.floor, conditions=own)
    conditions = {**report.conditions, "group": "cats", "groups": {"all": 52}, "generated": 48, "conditions_hash": "0" * 64}
    return report.model_copy(update={"groups": (group,), "conditions": conditions})


@pytest.fixture(scope="module")
def grouped(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Release:
    changes = {"report": by_group(parts["report"]), "onnx_reports": [by_group(parts["onnx_reports"][0])]}
    return bundle.build(tmp_path_factory.mktemp("registry"), ReleaseParts(**{**parts, **changes}))


def test_the_figures_of_each_group_are_shipped_and_read_back(grouped: Release, parts: dict[str, Any]) -> None:
    assert lineage.inspect(grouped.folder)["wrong"] == []
    written = read_json(grouped.folder / "metrics.json")
    assert [group["name"] for group in written["candidate"]["groups"]] == ["all"]
    assert "groups" not in written["baseline"]
    report = shipped.onnx_report(grouped).of_group("all")
    assert report is not None
    assert report.metrics["kid_breed"] == pytest.approx(0.0702)
    assert report.conditions["generated"] == 52
    frame = pandas.read_csv(grouped.folder / "metrics.csv", index_col="metric")
    assert frame.loc["kid_breed", ["candidate", "candidate, all"]].tolist() == pytest.approx([0.0345, 0.069])


def test_a_report_of_one_group_is_written_as_before_there_were_groups(parts: dict[str, Any], built: Release) -> None:
    assert "groups" not in parts["report"].model_dump(mode="json")
    assert "groups" not in (built.folder / "metrics.json").read_text()


def test_the_card_names_the_group_and_shows_all_beside_it(grouped: Release, built: Release) -> None:
    text = (grouped.folder / "README.md").read_text()
    assert "| headline | this model (cats) | real images (cats) | this model (all) | real images (all) | what it is |" in text
    assert "| `kid_breed` | 0.0345 | 0.0111 | 0.069 | 0.0111 |" in text
    assert "These are the figures of the cats alone" in text
    assert "| metric | cats | floor of cats | all | floor of all |" in text
    assert "48 of cats, 52 of all were measured" in text
    assert "Of its cats a share of 0.0022" in text
    data: Any = ModelCard(text).data
    assert {str(result.dataset_args) for result in data.eval_results} == {"{'group': 'cats'}"}
    before = (built.folder / "README.md").read_text()
    assert "cats)" not in before
    assert "floor of" not in before


def test_a_release_from_before_there_were_groups_is_not_compared(grouped: Release, built: Release) -> None:
    both = compare(Cats(grouped.folder), Cats(built.folder))
    assert "group: cats and None" in both.obstacles
    assert [row.better for row in both.rows if row.better is not None] == []
    same = compare(Cats(grouped.folder), Cats(grouped.folder))
    assert (same.obstacles, same.rows[-1].metric) == ((), "coverage of all")


def test_figures_from_before_there_were_groups_are_of_all(parts: dict[str, Any]) -> None:
    old, now = parts["report"], by_group(parts["report"])
    rows = {row.metric: row for row in figures._beside(old, now, same=True)}
    assert (rows["kid_breed"].recorded, rows["kid_breed"].now) == (0.0345, 0.069)
    assert "kid_breed of all" not in rows
    rows = {row.metric: row for row in figures._beside(now, now, same=True)}
    assert (rows["kid_breed"].now, rows["kid_breed of all"].now) == (0.0345, 0.069)
    assert all(row.holds for row in rows.values())
