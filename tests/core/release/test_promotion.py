"""`promote` publishes what the gate let through or a person forced, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import loopback_hub

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError, ReleaseRejected
from tinycats_core.release import manifest, promotion, registry


def make_candidate(folder: Path, **decision: Any) -> Path:
    place = registry.open_registry(folder) / "cats" / "111"
    place.mkdir(parents=True)
    (place / "README.md").write_text("---\nlicense: mit\n---\n")
    (place / "decision.json").write_text(json.dumps({"promoted": False, "terms": [], "baseline": None} | decision))
    manifest.seal(place, "cats", "111", "key", {})
    return place


@pytest.mark.parametrize(("decision", "how"), [({"promoted": True}, "release"), ({"promoted": False, "forced": "why"}, "forced")])
def test_a_built_release_is_published_later(tmp_path: Path, decision: dict[str, Any], how: str):
    place = make_candidate(tmp_path, **decision)
    assert promotion.plan_promotion(place)[0].action == "add"
    assert registry.find_published(PublishConfig(name="cats", folder=tmp_path)) is None
    assert promotion.promote(place).published
    (entry,) = registry.read_history(tmp_path, "cats")
    assert (entry.version, entry.how, entry.why) == ("111", how, decision.get("forced"))


@pytest.mark.parametrize("decision", [{"promoted": False}, {"promoted": False, "forced": None}])
def test_what_the_gate_refused_is_not_published(tmp_path: Path, decision: dict[str, Any]):
    place = make_candidate(tmp_path, **decision)
    for use in (promotion.promote, promotion.plan_promotion):
        with pytest.raises(ReleaseRejected, match=r"the gate refused cats 111.*--force --why"):
            use(place)
    assert not (tmp_path / "cats/latest").exists()


def test_a_decision_that_cannot_be_read_publishes_nothing(tmp_path: Path):
    with pytest.raises(RegistryError, match="decision.json is not as this project writes it: promoted"):
        promotion.promote(make_candidate(tmp_path, promoted="perhaps"))
    assert not (tmp_path / "cats/latest").exists()


def test_only_what_is_compared_with_the_published_one_is_published(tmp_path: Path):
    place = make_candidate(tmp_path, promoted=True, baseline="000")
    with pytest.raises(RegistryError, match="was compared with 000, and meanwhile that was withdrawn"):
        promotion.promote(place)


def test_a_release_outside_of_a_registry_has_nowhere_to_go_but_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_candidate(tmp_path / "registry", promoted=True)
    (tmp_path / "registry/registry.json").unlink()
    with pytest.raises(RegistryError, match="is not a registry"):
        promotion.promote(place)
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as hub:
        assert {change.action for change in promotion.plan_promotion(place, "someone/cats")} == {"add"}
        assert promotion.promote(place, "someone/cats").location.startswith(f"{hub.url}/someone/cats/tree/")
        assert "someone/cats" in hub.commits


def test_a_damaged_release_is_not_published(tmp_path: Path):
    place = make_candidate(tmp_path, promoted=True)
    (place / "README.md").write_text("changed")
    with pytest.raises(RegistryError, match="README.md has changed"):
        promotion.promote(place)
