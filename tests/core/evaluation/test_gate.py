"""What the gate decides, term by term, from reports with given figures. Real images: test_canaries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinycats_core.config import EvaluateConfig
from tinycats_core.errors import ReleaseRejected, TinycatsError
from tinycats_core.evaluation import gate
from tinycats_core.files import digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Decision, FidelityReport, GroupFigures

CONFIG = EvaluateConfig(extractor="breed")
FLOOR: dict[str, float | None] = {"kid_breed": 0.01, "kid_breed_std": 0.02, "coverage": 0.9, "copy_rate": 0.0, "authenticity": 0.6}
FLOOR["altered_copy_rate"] = 0.0
NOBODY = {"images": 0, "copy_rate": 0.0, "altered_copy_rate": 0.0}


def make_report(path: Path, conditions: dict[str, Any] | None = None, **metrics: float | None) -> FidelityReport:
    measured = {"kid_breed": 0.1, "kid_breed_std": 0.02, "kid_breed_drawn_std": 0.01, "precision": 0.6, "recall": 0.3}
    measured |= {"spread": 0.9, "distinct": 1.0, "coverage": 0.8, "copy_rate": 0.0, "altered_copy_rate": 0.0, "authenticity": 0.6}
    facts: dict[str, Any] = {"extractor": "breed", "generated": 100, "reference": 100, **(conditions or {})}
    facts |= {"conditions_hash": digest_of(facts), "trivial_kid": {"noise": 9.0, "mean_image": 4.0}, "left_out": NOBODY} | (
        conditions or {}
    )
    facts["trivial_accuracy"] = 0.1 if "breed_accuracy" in metrics else None
    write_json(path, {"anything": "the gate reads the record"})
    return FidelityReport(path=path, sha256=sha256_of(path), metrics=measured | metrics, floor=FLOOR, conditions=facts)


def failed(decision: Decision) -> list[str]:
    return [term.name for term in decision.terms if not term.passed]


@pytest.fixture
def decide(tmp_path: Path) -> Callable[..., Decision]:
    def decide(candidate: FidelityReport, published: FidelityReport | None = None, **config: Any) -> Decision:
        bars = CONFIG.model_copy(update=config)
        return gate.decide(candidate, published, "0123456789ab" if published else None, bars, tmp_path / "decisions")

    return decide


def test_decision_is_a_file_and_says_what_was_held_against_what(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    decision = decide(make_report(tmp_path / "a.json"), make_report(tmp_path / "b.json"))
    written = read_json(decision.verify().path)
    assert (written["promoted"], written["baseline"]) == (True, "0123456789ab")
    assert written["terms"] == [term.model_dump(mode="json") for term in decision.terms]
    assert all(list(term) == ["name", "value", "bar", "passed", "why"] for term in written["terms"])


def test_kid_may_be_worse_by_the_tolerance_and_no_more(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    published = make_report(tmp_path / "published.json", kid_breed_drawn_std=0.03)
    # sqrt(0.04² + 0.03²) = 0.05: two of them make 0.1
    inside = make_report(tmp_path / "inside.json", kid_breed=0.199, kid_breed_drawn_std=0.04)
    outside = make_report(tmp_path / "outside.json", kid_breed=0.201, kid_breed_drawn_std=0.04)
    assert decide(inside, published).promoted
    assert failed(decide(outside, published)) == ["not_worse"]
    assert failed(decide(inside, published, tolerance=1.9)) == ["not_worse"]
    assert failed(decide(inside, published, tolerance=0)) == ["not_worse"]


def test_breed_accuracy_must_be_kept(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    few = {"generated": 100, "reference": 100}  # 3 standard errors of a difference: 0.134
    published = make_report(tmp_path / "published.json", few, breed_accuracy=0.9)
    assert decide(make_report(tmp_path / "a.json", few, breed_accuracy=0.77), published).promoted
    assert failed(decide(make_report(tmp_path / "b.json", few, breed_accuracy=0.76), published)) == ["breeds_kept"]
    many = {"generated": 10_000, "reference": 10_000}  # 0.013: less than the margin
    published = make_report(tmp_path / "published.json", many, breed_accuracy=0.9)
    assert decide(make_report(tmp_path / "c.json", many, breed_accuracy=0.86), published).promoted
    assert failed(decide(make_report(tmp_path / "d.json", many, breed_accuracy=0.84), published)) == ["breeds_kept"]
    assert failed(decide(make_report(tmp_path / "e.json", many), published)) == ["breeds_kept"]


def test_coverage_must_be_kept(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    many = {"generated": 10_000, "reference": 10_000}
    published = make_report(tmp_path / "published.json", many, coverage=0.5)
    assert decide(make_report(tmp_path / "a.json", many, coverage=0.46), published).promoted
    assert failed(decide(make_report(tmp_path / "b.json", many, coverage=0.44), published)) == ["coverage_kept"]
    assert failed(decide(make_report(tmp_path / "c.json", coverage=0.044))) == ["covered"]  # a twentieth of 0.9 is 0.045


def test_copies_are_refused_beyond_what_chance_explains(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    many = {"generated": 1_000, "reference": 1_000}
    assert decide(make_report(tmp_path / "a.json", many, copy_rate=0.005)).promoted
    assert failed(decide(make_report(tmp_path / "b.json", many, copy_rate=0.007))) == ["no_copies"]
    real = make_report(tmp_path / "c.json", many, copy_rate=0.05)
    assert decide(real.model_copy(update={"floor": FLOOR | {"copy_rate": 0.05}})).promoted  # as unseen real images do


@pytest.mark.parametrize(("rate", "term"), [("copy_rate", "no_copies"), ("altered_copy_rate", "no_altered_copies")])
def test_training_images_held_against_each_other_make_the_bar_of_few_test_images_narrow(
    rate: str, term: str, tmp_path: Path, decide: Callable[..., Decision]
) -> None:
    def refused(copies: float, real: float, images: int) -> list[str]:
        left_out = NOBODY | {"images": images, rate: real}
        few = {"generated": 520, "reference": 16, "left_out": left_out}
        return failed(decide(make_report(tmp_path / "a.json", few, **{rate: copies})))

    assert refused(0.22, 0.0, 0) == []  # the bar of 16 test images alone is 0.228
    assert refused(0.066, 0.0, 64) == [term]  # 3 standard errors of 80 real images and 520 generated ones: 0.055
    assert refused(0.05, 0.0, 64) == []
    assert refused(0.14, 0.1, 64) == []  # 0.08 of the real images are copies of others


def test_images_must_show_what_was_asked_for(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    assert failed(decide(make_report(tmp_path / "a.json", breed_accuracy=0.18))) == ["obeys"]  # 0.1, three times 0.03
    assert decide(make_report(tmp_path / "b.json", breed_accuracy=0.2)).promoted


def test_numbers_under_other_conditions_are_not_compared(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    published = make_report(tmp_path / "published.json", {"generated": 5000, "split": "train"}, kid_breed=0.01)
    decision = decide(make_report(tmp_path / "a.json"), published)
    assert failed(decision) == ["comparable"]
    assert "(generated, split)" in decision.terms[-1].why
    assert "not_worse" not in [term.name for term in decision.terms]


def test_releases_of_another_guidance_are_compared(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    reports = [make_report(tmp_path / "a.json"), make_report(tmp_path / "b.json")]
    guided = [
        report.model_copy(update={"conditions": {**report.conditions, "guidance": guidance, "guidance_interval": [0.0, guidance]}})
        for report, guidance in zip(reports, (0.5, 1.0), strict=True)
    ]
    assert decide(*guided).promoted


def test_configured_bars(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    report = make_report(tmp_path / "a.json", breed_accuracy=0.5)
    assert decide(report, max_kid=0.1, min_recall=0.3, min_breed_accuracy=0.5).promoted
    assert failed(decide(report, max_kid=0.09)) == ["max_kid"]
    assert failed(decide(report, min_recall=0.31)) == ["min_recall"]
    assert failed(decide(report, min_breed_accuracy=0.51)) == ["min_breed_accuracy"]
    unmeasured = decide(make_report(tmp_path / "b.json"), min_breed_accuracy=0.1)
    assert failed(unmeasured) == ["min_breed_accuracy"]
    assert "was not measured" in unmeasured.terms[-1].why


def test_an_extractor_that_separates_nothing_promotes_nothing(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    def report(trivial: float, floor: float, error: float) -> FidelityReport:
        made = make_report(tmp_path / "a.json", kid_breed=0.0)
        conditions = {**made.conditions, "trivial_kid": {"noise": trivial, "mean_image": 9.0}}
        measured = FLOOR | {"kid_breed": floor, "kid_breed_std": error}
        return made.model_copy(update={"conditions": conditions, "floor": measured})

    assert failed(decide(report(2e-7, 0.0, 0.0))) == ["sighted"]
    assert failed(decide(report(0.059, 0.01, 0.01))) == ["sighted"]
    assert decide(report(0.061, 0.01, 0.01)).promoted


def test_what_is_not_a_number_does_not_pass(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        decision = decide(make_report(tmp_path / "a.json", kid_breed=value))
        assert "finite" in failed(decision)
        decision.verify()
    assert "learnt" in failed(decide(make_report(tmp_path / "b.json", kid_breed=None)))
    assert "finite" in failed(decide(make_report(tmp_path / "c.json", fd_breed=float("nan"))))


def test_rejection_names_the_terms_and_carries_the_decision(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    decision = decide(make_report(tmp_path / "a.json", kid_breed=3.1, distinct=0.1))
    assert failed(decision) == ["learnt", "distinct"]
    with pytest.raises(ReleaseRejected) as raised:
        gate.require_promoted(decision)
    message = str(raised.value)
    assert "learnt: kid_breed is 3.1; it must be at most 3 (0.75 of what mean_image has)" in message
    assert "distinct is 0.1" in message
    assert "\n" not in message
    assert raised.value.decision is decision


def test_changed_report_is_not_judged(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    report, published = make_report(tmp_path / "a.json"), make_report(tmp_path / "b.json")
    published.path.write_text("{}")
    with pytest.raises(TinycatsError, match=r"b\.json has changed"):
        decide(report, published)
    report.path.unlink()
    with pytest.raises(TinycatsError, match=r"a\.json is gone"):
        decide(report)


def test_other_must_be_neither_noise_nor_copies_and_need_not_be_good(tmp_path: Path, decide: Callable[..., Decision]) -> None:
    def report(**metrics: float) -> FidelityReport:
        measured: dict[str, float | None] = {"kid_breed": 0.5, "coverage": 0.0, "spread": 0.0}
        measured |= {"copy_rate": 0.0, "altered_copy_rate": 0.0, **metrics}
        own = {"generated": 1_000, "reference": 1_000, "trivial_kid": {"noise": 1.0}}
        other = GroupFigures(name="other", metrics=measured, floor=FLOOR, conditions=own)
        return make_report(tmp_path / "a.json", {"group": "cats"}).model_copy(update={"groups": (other,)})

    assert decide(report()).promoted
    noise, copies = decide(report(kid_breed=0.76)), decide(report(copy_rate=0.007))  # bars: 0.75, and that of 1,000 images
    assert (failed(noise), failed(copies)) == (["other_learnt"], ["other_no_copies"])
    assert failed(decide(report(altered_copy_rate=0.007))) == ["other_no_altered_copies"]
    why = next(term.why for term in noise.terms if not term.passed)
    assert why == "of the images of other, kid_breed is 0.76; it must be at most 0.75 (0.75 of what noise has)"


def test_a_person_may_force_what_is_refused_and_only_that(tmp_path: Path) -> None:
    def decide(force: str | None, **metrics: float) -> Decision:
        return gate.decide(make_report(tmp_path / "a.json", None, **metrics), None, None, CONFIG, tmp_path / "decisions", force)

    forced = decide("they wait", kid_breed=3.1)
    assert (forced.promoted, forced.forced, failed(forced)) == (False, "they wait", ["learnt"])
    assert read_json(forced.verify().path)["forced"] == "they wait"
    assert gate.require_promoted(forced) is forced
    assert decide("they wait").forced is None
    old = {name: value for name, value in decide(None).model_dump().items() if name != "forced"}
    assert Decision.model_validate(old).forced is None
