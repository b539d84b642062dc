import json
from pathlib import Path
from typing import Any

import pytest
import torch
from release_parts import FINISH
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinycats_core.compute import costs
from tinycats_core.compute.gpus import BROAD_REGIONS, GPUS, Gpu, parse_gpu, usd_per_second
from tinycats_core.config import ComputeConfig, ModelConfig, ReleaseConfig, TrainConfig
from tinycats_core.errors import ComputeError
from tinycats_core.files import home
from tinycats_core.generator.model import TinyDiT
from tinycats_core.presets import PRESETS, resolve

MODEL = ModelConfig()
TRAIN = TrainConfig()
HERE = ComputeConfig(where="local", device="cpu")
PEAK = 1e11
L4_USD_PER_HOUR = 0.7992 + 2 * 0.0000131 * 3600 + 16 * 0.00000222 * 3600  # with its cores and memory


def modal(gpu: str) -> ComputeConfig:
    return ComputeConfig(where="modal", gpu=gpu)


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return TrainConfig.model_validate(config.model_dump() | values)


def expected(model: ModelConfig, train: TrainConfig, compute: ComputeConfig) -> tuple[costs.Range, costs.Range]:
    """Return hours and images/s, which must be there."""
    found = costs.estimate(model, train, compute)
    assert found.hours
    assert found.images_per_s
    return found.hours, found.images_per_s


@pytest.fixture(autouse=True)
def a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home, and a device whose speed is known."""
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(costs, "_peak_here", lambda device, precision: PEAK)


def trained(name: str, config: ReleaseConfig, compute: ComputeConfig, **end: Any) -> dict[str, Any]:
    """Leave a completed training below the home, and return its record."""
    folder = home() / "training" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"event": "start", "step": 0}, FINISH | end]
    (folder / "diary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = costs.estimate(config.model, config.train, compute)
    cost = costs.record(folder, config.model, config.train, compute, before)
    assert cost
    kept = json.loads((folder / "cost.json").read_text())
    assert kept == cost.model_dump(mode="json")
    return kept


@pytest.mark.parametrize(
    "shape",
    [
        {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 2},
        {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 6},
        {"image_size": 64, "patch_size": 4, "width": 32, "depth": 3, "heads": 4, "num_classes": 2, "prediction": "v"},
        {"image_size": 128, "patch_size": 16, "width": 384, "depth": 1, "heads": 6},
    ],
)
def test_the_operations_are_those_that_pytorch_counts(shape: dict[str, Any]):
    model, count = ModelConfig(**shape), 2
    net = TinyDiT(model)
    images = torch.randn(count, 3, model.image_size, model.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel's scores count twice
        net(images, torch.rand(count), torch.zeros(count, dtype=torch.long)).square().mean().backward()
    assert counter.get_total_flops() / count == pytest.approx(costs.training_flops(model), rel=1e-9)


def test_twice_the_steps_take_twice_the_hours_and_dollars():
    once = costs.estimate(MODEL, TRAIN, modal("L4"))
    twice = costs.estimate(MODEL, changed(TRAIN, steps=2 * TRAIN.steps), modal("L4"))
    assert once.hours
    assert once.dollars
    assert twice.hours == pytest.approx([2 * hours for hours in once.hours])
    assert twice.dollars == pytest.approx([2 * dollars for dollars in once.dollars])
    assert twice.images_per_s == once.images_per_s


def test_hours_rate_and_dollars_belong_together():
    found = costs.estimate(MODEL, TRAIN, modal("L4"))
    assert found.hours
    assert found.images_per_s
    (low, high), (slow, fast) = found.hours, found.images_per_s
    assert 0 < low < high
    assert low * 3600 * fast == pytest.approx(TRAIN.steps * TRAIN.batch_size)
    assert high * 3600 * slow == pytest.approx(TRAIN.steps * TRAIN.batch_size)
    assert found.dollars == pytest.approx((low * L4_USD_PER_HOUR, high * L4_USD_PER_HOUR))
    share = slow * costs.training_flops(MODEL) / (121 * 1e12)
    assert share == pytest.approx(costs.SHARE_OF_DATA_SHEET[0])
    assert "assumed, not measured" in str(found)
    assert "not verified, dated 2026-07-01" in str(found)


def test_four_gpus_cost_four_times_as_much_an_hour_and_are_four_times_as_fast():
    large = MODEL.model_copy(update={"width": 1536, "depth": 24})  # one that keeps the GPUs busy
    one, four = (costs.estimate(large, TRAIN, modal(gpu)) for gpu in ("H100", "H100:4"))
    assert one.hours
    assert one.dollars
    assert four.hours
    assert four.dollars
    assert four.dollars[0] / four.hours[0] == pytest.approx(4 * one.dollars[0] / one.hours[0])
    assert four.hours == pytest.approx([hours / 4 for hours in one.hours])
    assert costs.where(four.place) == "H100:4"


def test_a_small_model_waits_for_its_kernels():
    small = resolve("smoke")
    (low, high), _ = expected(small.model, small.train, modal("H100"))
    quick, slow = costs.LAUNCH_SECONDS
    seconds = small.train.steps * small.model.depth
    assert (low, high) == pytest.approx((seconds * quick / 3600, seconds * slow / 3600))
    assert expected(small.model, small.train, modal("H100:4"))[0] == (low, high)


def test_computing_twice_what_was_forgotten_takes_longer():
    plain, forgetful = (expected(MODEL, changed(TRAIN, gradient_checkpointing=on), modal("L4"))[0] for on in (False, True))
    assert forgetful == pytest.approx([hours * 4 / 3 for hours in plain])


def test_here_the_rate_is_a_share_of_what_the_device_does():
    found = costs.estimate(MODEL, TRAIN, HERE)
    assert found.images_per_s == pytest.approx([share * PEAK / costs.training_flops(MODEL) for share in costs.SHARE_OF_PRODUCTS])
    assert (found.dollars, found.price) == (None, None)
    assert found.place == costs.Hardware(None, "cpu", 1, "fp32")
    assert costs.HERE in str(found)


@pytest.mark.parametrize("gpu", ["a100-80gb", "H100!", "T4:1"])
def test_names_are_read_as_modal_reads_them(gpu: str):
    assert parse_gpu(gpu) == (GPUS[gpu.upper().partition(":")[0]], 1)


@pytest.mark.parametrize("gpu", ["GTX-1080", "H100:0", "H100:", "H100:four", ""])
def test_an_unknown_gpu_is_refused_with_those_that_are_allowed(gpu: str):
    with pytest.raises(ComputeError, match=rf"^compute.gpu is '{gpu}'; allowed: T4, .*B200\+, or several of one, such as H100:4$"):
        costs.estimate(MODEL, TRAIN, modal(gpu))


def test_the_prices_say_that_nobody_has_verified_them():
    assert all("not verified" in str(gpu.price) for gpu in GPUS.values() if gpu.price)


@pytest.mark.parametrize(("region", "factor"), [(None, 1), ("us", 1.5), ("uk", 1.5), ("us-east", 1.75), ("jp", 1.75)])
def test_a_container_costs_its_gpus_cores_and_memory_times_its_region(region: str | None, factor: float):
    compute = ComputeConfig(where="modal", gpu="B200:2", cpu=4, memory_gb=32, region=region)
    hourly = 2 * (6.2496 + 4 * 0.04716 + 32 * 0.007992) * factor
    assert usd_per_second(compute) == pytest.approx(hourly / 3600)
    said = costs.estimate(MODEL, TRAIN, compute).charge
    assert "$6.2496/h a GPU (second-hand list, not verified, dated 2026-07-01), 8 cores and 64 GiB on top" in said
    assert said.endswith(f", times {factor:g} for the region {region}" if region else "on top")


def test_the_part_of_a_broad_region_is_none():
    assert not any("-" in region for region in BROAD_REGIONS)


@pytest.mark.parametrize(("gpu", "most"), [("H100:9", "8 of H100"), ("a10:5", "4 of A10"), ("B200+:16", "8 of B200\\+")])
def test_more_gpus_than_a_container_can_have_are_refused(gpu: str, most: str):
    with pytest.raises(ComputeError, match=rf"a container has at most {most}; ask for fewer$"):
        costs.estimate(MODEL, TRAIN, modal(gpu))


def test_a_gpu_without_a_price_gives_hours_and_says_why_there_are_no_dollars(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(GPUS, "B200", Gpu("B200", tflops=2250.0))
    found = costs.estimate(MODEL, TRAIN, modal("B200"))
    assert found.hours
    assert found.dollars is None
    assert "no price of B200 is known, see https://modal.com/pricing" in str(found)


@pytest.mark.parametrize(("gpu", "precision"), [("RTX-PRO-6000", "auto"), ("A100", "fp32"), ("T4", "bf16")])
def test_a_rate_that_nobody_knows_is_not_guessed(gpu: str, precision: str):
    found = costs.estimate(MODEL, changed(TRAIN, precision=precision), modal(gpu))
    assert (found.images_per_s, found.hours, found.dollars) == (None, None, None)
    assert f"no training like it on {gpu} was measured" in str(found)


def test_a_gpu_that_is_paid_for_and_not_used_is_not_estimated_as_one():
    compute = ComputeConfig(where="modal", gpu="L4", device="cpu")
    assert costs.estimate(MODEL, changed(TRAIN, precision="bf16"), compute).hours is None


def test_a_measured_rate_is_preferred_to_an_assumed_one():
    config = resolve("standard")
    trained("short", config, modal("L4"), images_per_s=1.0, seconds=costs.MEASURED_SECONDS / 2)
    assert "assumed" in costs.estimate(config.model, config.train, modal("L4")).basis
    trained("one", config, modal("L4"), images_per_s=700.0, seconds=100.0)
    trained("longer", config, modal("L4"), images_per_s=800.0, seconds=1000.0)
    found = costs.estimate(config.model, changed(config.train, steps=123, warmup_steps=1), modal("L4"))
    assert found.images_per_s == pytest.approx((720, 880))
    assert found.basis == f"measured by the training that ended {FINISH['time']}: 800 images/s, ±10%"


def test_a_rate_measured_otherwise_says_nothing():
    config = resolve("standard")
    trained("one", config, modal("L4"))
    assert "measured by" in costs.estimate(config.model, config.train, modal("l4:1")).basis
    others = [
        (config.model, config.train, modal("T4")),
        (config.model, config.train, modal("L4:2")),
        (config.model, config.train, HERE),
        (config.model.model_copy(update={"depth": 3}), config.train, modal("L4")),
        (config.model, changed(config.train, precision="fp16"), modal("L4")),
        (config.model, changed(config.train, accumulation=2), modal("L4")),
        (config.model, changed(config.train, compile="off"), modal("L4")),
    ]
    assert ["assumed" in costs.estimate(*other).basis for other in others] == [True] * len(others)


def test_a_training_here_measures_for_the_next_one_here():
    config = resolve("smoke")
    trained("one", config, HERE, device="cpu", precision="fp32", images_per_s=400.0, seconds=160.0)
    assert expected(config.model, config.train, HERE)[1] == pytest.approx((360, 440))


def test_the_record_of_a_training_on_modal():
    config = resolve("standard")
    cost = trained("one", config, modal("L4:2"), processes=2, images_per_s=1000.0, seconds=7200.0)
    assert cost["hours"] == 2
    assert cost["dollars"] == pytest.approx(2 * 2 * L4_USD_PER_HOUR)
    assert cost["price"] == {"usd_per_hour": 0.7992, "seen": "2026-07-01", "source": "second-hand list, not verified"}
    assert cost["tflop_per_s"] == pytest.approx(1000 * costs.training_flops(config.model) / 1e12)
    assert (cost["gpu"], cost["gpus"], cost["processes"], cost["model"]) == ("L4", 2, 2, config.model.digest())
    assert (cost["steps"], cost["attempts"], cost["seconds_lost"]) == (7, 2, 12.5)
    low, high = cost["estimate"]["hours"]
    assert 0 < low < high
    assert (cost["steps_run"], cost["billed_seconds"]) == (9, 7200.0)
    assert cost["charge"].endswith(", 4 cores and 32 GiB on top")
    said = "training took 2 h at 1,000 images/s on L4, 2 attempts with 9 steps for 7: $4.09, $0.7992/h a GPU ("
    assert costs.account(costs.Cost.model_validate(cost)).startswith(said)


def test_a_metered_training_costs_what_was_metered():
    config = resolve("standard")
    (home() / "training" / "one").mkdir(parents=True)
    (home() / "training" / "one" / "meter.json").write_text('{"attempts": [3600.0, 1800.0], "gpu": "L4", "usd": 4.5}')
    cost = trained("one", config, modal("T4"), seconds=3600.0)  # attached to a call that trained on another GPU
    assert (cost["hours"], cost["billed_seconds"]) == (1.0, 5400.0)
    assert (cost["gpu"], cost["dollars"]) == ("L4", 4.5)


@pytest.mark.parametrize(
    ("limit", "refused", "warned"), [(None, False, False), (1e6, False, False), (3.0, False, True), (0.01, True, False)]
)
def test_an_estimate_is_held_against_the_limit(limit: float | None, refused: bool, warned: bool, caplog: pytest.LogCaptureFixture):
    compute = modal("L4").model_copy(update={"max_cost_usd": limit})
    found = costs.estimate(MODEL, TRAIN, compute)
    assert found.dollars
    assert 0.01 < found.dollars[0] < 3 < found.dollars[1]
    if refused:
        with pytest.raises(
            ComputeError, match=r"^compute\.max_cost_usd is 0\.01 but the training will cost \$.* to .*; give a higher"
        ):
            costs.check_budget(found, compute)
    else:
        costs.check_budget(found, compute)
    assert ("may be stopped" in caplog.text) == warned
    costs.check_budget(found, compute.model_copy(update={"where": "local"}))


def test_the_record_of_a_training_here_has_no_dollars():
    cost = trained("one", resolve("smoke"), HERE, device="cpu", precision="fp32", seconds=36.0, attempts=1, images=7 * 16)
    assert (cost["dollars"], cost["price"], cost["gpu"]) == (None, None, None)
    said = costs.account(costs.Cost.model_validate(cost))
    assert said == f"training took 0.01 h at 0.504 images/s on cpu, 1 attempt: {costs.HERE}"


def test_the_estimate_from_before_the_training_stays():
    config = resolve("standard")
    first = trained("one", config, modal("L4"))["estimate"]
    again = costs.estimate(config.model, config.train, modal("L4"))
    assert "measured" in again.basis
    cost = costs.record(home() / "training" / "one", config.model, config.train, modal("L4"), again)
    assert cost
    assert cost.model_dump(mode="json")["estimate"] == first


@pytest.mark.parametrize("diary", [None, "", '{"event": "start", "step": 0}\n', '{"event": "finish", "st'])
def test_without_the_end_of_a_diary_there_is_no_record(diary: str | None, tmp_path: Path):
    if diary is not None:
        (tmp_path / "diary.jsonl").write_text(diary)
    assert costs.record(tmp_path, MODEL, TRAIN, HERE, costs.estimate(MODEL, TRAIN, HERE)) is None
    assert not (tmp_path / "cost.json").exists()


def test_a_damaged_record_stops_no_training(caplog: pytest.LogCaptureFixture):
    (home() / "training" / "one").mkdir(parents=True)
    for text, message in (("{", "cost.json is not a JSON file"), ("{}", "cost.json is not a record of this version")):
        (home() / "training" / "one" / "cost.json").write_text(text)
        assert "assumed" in costs.estimate(MODEL, TRAIN, modal("L4")).basis
        assert message in caplog.text


def test_the_peak_of_this_device_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    asked: list[Any] = []
    monkeypatch.setattr(costs, "matmul_peak", lambda *given: asked.append(given) or 1.0)
    assert costs._peak_here("cpu", "bf16") == 1.0
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    costs._peak_here.cache_clear()


def test_the_table_has_a_row_for_each_preset():
    head, *rows = costs.cost_table(None, None, {})
    assert head[0] == "preset"
    assert [row[0] for row in rows] == list(PRESETS)
    assert all("assumed, not measured" in row[-1] for row in rows)
    assert costs.HERE in rows[0][-1]


def test_the_table_of_one_preset_on_another_gpu():
    _, row = costs.cost_table("smoke", "h100:4", {"train": {"steps": 1000}})
    assert row[:3] == ["smoke", "1,000 × 16", "H100:4"]
