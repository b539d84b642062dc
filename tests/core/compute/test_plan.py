"""The plan of a budget, on tables of speeds: which network, which way of computing, and what the minutes go to."""

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tinycats_core.compute import plan, shapes, speed
from tinycats_core.compute.clock import Clock
from tinycats_core.compute.plan import Pace, first_pace, fit, next_stop, require_enough, within_dollars
from tinycats_core.compute.shapes import SHAPES, Speed, Speeds, best_way, by_hand, candidates, choose, settle
from tinycats_core.config import ComputeConfig, ModelConfig, ReleaseConfig, SampleConfig, TrainConfig
from tinycats_core.errors import ConfigError, TinycatsError
from tinycats_core.presets import merge, resolve
from tinycats_core.records import Dataset

PACE = Pace(step=0.1, judging=10, closing=60)
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def speeds(first: float = 200.0, **changes: Any) -> Speeds:
    """Return speeds of all shapes, in fp32 and in bf16: patches of 4 cost three times as much, 128 px fifty times."""
    costs = dict(zip(SHAPES, (1, 3, 3, 50), strict=True))
    rows = tuple(
        Speed(
            model=s.model, batch_size=s.batch_size, precision=p, threads=2, images_per_s=first / cost * (1.5 if p == "bf16" else 1)
        )
        for s, cost in costs.items()
        for p in ("fp32", "bf16")
    )
    return Speeds(**{"rows": rows, "drawing": 3.0, "features_per_s": 12.0, "seconds": 5.0} | changes)


def config(minutes: float, **overrides: Any) -> ReleaseConfig:
    return resolve("photos", merge({"budget": {"minutes": minutes}}, overrides))


def photos(count: int) -> Dataset:
    return Dataset.model_construct(train_count=count, val_count=count // 9, test_count=count // 4)


def planned(minutes: float, count: int = 800, measured: Speeds | None = None, **overrides: Any) -> tuple[ReleaseConfig, Pace]:
    """Return what is made of a budget: the configuration and its pace."""
    measured, hand = measured or speeds(), by_hand(overrides)
    fitted = fit(settle(config(minutes, **overrides), measured, hand), measured, photos(count), hand)
    return fitted, first_pace(fitted, measured)


def played(minutes: float, pace: Pace, most: int = 10**6, legs: int = 5, slower: Callable[[float], float] = lambda _: 1.0) -> float:
    """Return the seconds of a release whose machine is slower than expected, by the second."""
    spent, done, now, real = 60.0, 0, pace, pace
    while (stop := next_stop(60 * minutes - spent - now.closing, done, most, legs, now)) is not None:
        factor = slower(spent)
        training, judging = (stop - done) * real.step * factor, real.judging * factor
        now, spent, done, legs = now.observed(stop - done, training, judging), spent + training + judging, stop, legs - 1
    return spent + real.closing * slower(spent)


def test_more_minutes_buy_a_larger_network():
    sizes = [(c.model.image_size, -c.model.patch_size) for c in (planned(minutes)[0] for minutes in (3, 5, 10, 20, 60, 240, 2880))]
    assert sizes == sorted(sizes)
    assert sizes[0] == (32, -8)
    assert sizes[4] == (32, -4)
    assert sizes[-1][0] > 32
    assert planned(20, measured=speeds(first=400_000))[0].model.image_size == 128


def test_the_network_and_its_batch_go_together():
    found = planned(2880, measured=speeds(first=10_000))[0]
    shape = SHAPES[-1]
    assert found.data.image_size == found.model.image_size == 128
    assert (found.train.batch_size, found.train.lr, found.model.width) == (shape.batch_size, shape.lr, shape.model.width)


@pytest.mark.parametrize("slower", [lambda _: 1.0, lambda _: 2.0, lambda _: 0.6, lambda at: 1.0 if at < 300 else 1.6])
def test_a_release_ends_with_its_budget_on_a_machine_of_another_speed(slower: Callable[[float], float]):
    for minutes in (10, 20, 60):
        assert played(minutes, PACE, slower=slower) == pytest.approx(60 * minutes, rel=0.15)


def test_a_steady_machine_is_never_above_the_budget_and_more_minutes_are_more_steps():
    ends = [played(minutes, PACE) for minutes in (4, 5, 10, 30, 90)]
    assert all(end <= 60 * minutes for end, minutes in zip(ends, (4, 5, 10, 30, 90), strict=True))
    steps = [next_stop(left, 0, 10**6, 4, PACE) for left in range(60, 6000, 60)]
    assert all(one <= other for one, other in pairwise(map(int, filter(None, steps))))


def test_the_photos_limit_the_steps():
    found, pace = planned(60, count=80)
    assert found.train.steps == 7_500  # 1,500 passes
    assert played(60, pace, most=7_500) < 3_600
    assert next_stop(10_000, 7_500, 7_500, 3, PACE) is None
    assert planned(60, count=80, train={"passes": 100})[0].train.steps == 500


def test_judging_fits_into_the_budget():
    short, pace = planned(5)
    assert short.evaluate.samples < 520
    assert short.sample.guidance == (1.5,)
    assert short.train.snapshots * pace.judging + pace.closing < 200
    full = planned(120)[0]
    assert (full.evaluate.samples, full.sample.sweep_images, full.sample.guidance) == (520, 312, (1.5, 3.0, 5.0))
    assert full.train.snapshots == 10


def test_what_is_set_by_hand_stays():
    given = {
        "model": {"width": 96},
        "train": {"steps": 900, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 7, "snapshots": 4},
        "sample": {"guidance": [2.0, 4.0], "sweep_images": 111},
        "evaluate": {"samples": 222},
    }
    own = config(5, **given)
    row = Speed(model=own.model, batch_size=16, precision="fp32", threads=2, images_per_s=100)
    found = planned(5, measured=speeds(rows=(row,)), **given)[0]
    for part, fields in given.items():
        dumped = getattr(found, part).model_dump(mode="json")
        assert {name: dumped[name] for name in fields} == fields
    assert {"model.width", "train.steps"} <= by_hand(given)
    said = plan.told(found, photos(800), 60, PACE, by_hand(given))
    assert "set by hand: evaluate.samples, model.width, sample.guidance" in said
    own = candidates(own.model, own.train, own.budget, {"data.image_size"})
    assert {shape.model.image_size for shape in own} == {32}


def test_a_budget_that_is_too_small_names_what_is_needed():
    with pytest.raises(
        ConfigError, match=r"budget\.minutes is 0\.1, .* takes at least 2\.5 on this machine: .* give at least 2\.5"
    ):
        require_enough(0.1, 60, PACE)
    require_enough(2.5, 60, PACE)


def test_another_way_of_computing_is_taken_where_it_is_clearly_faster():
    plain = Speed(model=SHAPES[0].model, batch_size=16, precision="fp32", threads=2, images_per_s=100)
    bf16 = plain.model_copy(update={"precision": "bf16", "images_per_s": 109})
    compiled = plain.model_copy(update={"compile": "default", "images_per_s": 130, "compile_seconds": 60})
    assert best_way([plain, bf16], 3600) is plain
    assert best_way([plain, bf16.model_copy(update={"images_per_s": 120})], 3600).precision == "bf16"
    assert best_way([plain, compiled], 100) is plain
    assert best_way([plain, compiled], 3600) is compiled
    assert choose(SHAPES[:2], [plain, compiled], 3600) == (SHAPES[0], compiled)


def test_fewer_threads_are_kept_for_the_training():
    row = Speed(model=config(5).model, batch_size=16, precision="fp32", threads=8, images_per_s=100)
    few = row.model_copy(update={"threads": 4, "images_per_s": 150})
    found = settle(resolve("photos", {}), speeds(rows=(row, few)), ())
    assert (found.compute.threads, found.train.precision, found.train.compile) == (4, "fp32", "off")
    assert found.train.batch_size == 16


def test_bf16_may_be_chosen_because_it_draws_as_well():
    measured = json.loads((RESULTS / "precision.json").read_text())
    assert ("bf16" in shapes.CPU_PRECISIONS) is measured["within"]
    assert abs(measured["kid_difference"]) <= measured["fp32"]["kid_interval"]


def test_speed_is_measured_for_long_trainings_on_a_cpu_and_within_a_budget():
    here = {"compute": {"device": "cpu"}}
    assert not speed.is_needed(resolve("smoke", here))
    assert speed.is_needed(resolve("photos", here))
    assert not speed.is_needed(resolve("photos", merge(here, {"train": {"precision": "fp32", "compile": "off"}})))
    assert speed.is_needed(resolve("smoke", merge(here, {"budget": {"minutes": 5}})))


def test_the_speed_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "TURN", 0.0)
    model = ModelConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2)
    given = model, TrainConfig(steps=10, batch_size=4, warmup_steps=1), SampleConfig(steps=1)
    found = speed.measure(*given, None, resolve().budget, ComputeConfig(device="cpu"), ())
    ways = [(row.precision, row.compile) for row in found.rows if row.threads == torch.get_num_threads()]
    assert ways == [("fp32", "off"), ("bf16", "off")]
    assert all(row.images_per_s > 0 for row in found.rows)
    assert found.drawing > 0


def test_dollars_are_steps_on_modal():
    preset = resolve("standard", {"budget": {"dollars": 5}})
    found = within_dollars(preset, (1000.0, 2000.0), ())
    assert 0 < found.train.steps < preset.train.steps
    assert found.compute.max_cost_usd == 5
    assert found.train.warmup_steps <= found.train.steps
    with pytest.raises(ConfigError, match=r"budget\.dollars is 5, but no speed of A100-80GB is known"):
        within_dollars(preset, None, ())
    with pytest.raises(ConfigError, match=r"budget\.dollars is 0\.001, but 200 steps cost about \$"):
        within_dollars(resolve("standard", {"budget": {"dollars": 0.001}}), (1000.0, 2000.0), ())


@pytest.mark.parametrize(
    ("preset", "budget", "said"),
    [
        ("smoke", {"minutes": 0}, "budget.minutes is 0: it must be above 0 and at most 2,880"),
        ("smoke", {"minutes": 10_000}, "budget.minutes is 10000: it must be above 0 and at most 2,880"),
        ("smoke", {"minutes": float("nan")}, "budget.minutes is nan: it must be above 0"),
        ("smoke", {"minutes": -1}, "budget.minutes is -1: it must be above 0"),
        ("smoke", {"dollars": 5}, "compute.where is 'local', which costs none; give budget.minutes"),
        ("standard", {"minutes": 5}, "compute.where is 'modal', where no speed is measured"),
        ("standard", {"minutes": 5, "dollars": 5}, "give one of them"),
    ],
)
def test_a_wrong_budget_is_one_line(preset: str, budget: dict[str, float], said: str):
    with pytest.raises(ConfigError, match="budget") as caught:
        resolve(preset, {"budget": budget})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clock_goes_on_where_a_killed_command_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "clock.json"
    first = Clock(path, 10, began=940)
    first.expect(PACE)
    stops = first.stops(10**6, 4)
    one = next(stops)
    now[0] += 200
    first.observe(one, training=180, judging=20)
    assert first.ledger.pace
    assert first.ledger.pace.step == pytest.approx(180 / one)
    assert first.ledger.pace.closing == 120
    two = next(stops)
    now[0] += 50
    first.write()  # then it is killed

    now[0] += 10_000  # in which nothing ran
    again = Clock(path, 10, began=now[0])
    again.expect(PACE)
    assert again.spent == 310
    rest = again.stops(10**6, 4)
    assert [next(rest), next(rest)] == [one, two]
    again.observe(two, training=1, judging=1)  # most of it was done before: it says nothing
    assert again.ledger.pace == first.ledger.pace
    now[0] += 400
    assert list(rest) == []
    path.write_text("{")
    with pytest.raises(TinycatsError, match="is damaged; delete it"):
        Clock(path, 10, began=0)
