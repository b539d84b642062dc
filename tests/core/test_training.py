"""The training loop: it learns, it goes on to the bit where it stopped, and it never reports a failure as success."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinycats_core import training
from tinycats_core.checkpoint import load_generator, read_header
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.errors import CheckpointError, ComputeError, TrainingError
from tinycats_core.files import sha256_of
from tinycats_core.records import Dataset
from tinycats_core.training import (
    batch_indices,
    draw_batch,
    ema_decay,
    learning_rate,
    mix,
    pick_precision,
    read_log,
    train,
)

MODEL = ModelConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, num_classes=2)


def config(**changes: object) -> TrainConfig:
    settings = {
        "steps": 12,
        "batch_size": 8,
        "lr": 2e-3,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "sample_every": 6,
        "log_every": 3,
    }
    return TrainConfig.model_validate(settings | changes)


@pytest.fixture
def two_colours(tmp_path: Path) -> Dataset:
    """Twenty pictures of two classes: dark ones and bright ones."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    noise = torch.randint(0, 30, (20, 3, 8, 8), generator=generator)
    images = (noise + 200 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    path = tmp_path / "data" / "images.safetensors"
    path.parent.mkdir()
    save_file(
        {
            "train_images": images,
            "train_labels": labels,
            "test_images": images[:4].clone(),
            "test_labels": labels[:4].clone(),
        },
        path,
    )
    return Dataset(
        path=path,
        sha256=sha256_of(path),
        source="folder",
        image_size=8,
        classes=("dark", "bright"),
        train_count=20,
        test_count=4,
    )


def test_a_run_leaves_weights_log_checkpoints_and_pictures(two_colours: Dataset, tmp_path: Path):
    rows = []
    made = train(two_colours, MODEL, config(), tmp_path / "run", on_log=rows.append)
    folder = tmp_path / "run"
    assert made.verify().step == 12
    assert made.path == folder / "ema.safetensors"
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert read_log(folder) == rows
    assert rows[0].keys() == {"step", "steps", "loss", "lr", "images_per_s", "grad_norm", "device_memory_mb"}
    assert sorted(os.listdir(folder / "checkpoints")) == [f"step-{n:08d}.safetensors" for n in (4, 8, 12)]
    assert sorted(os.listdir(folder / "samples")) == [f"step-{n:08d}.png" for n in (6, 12)]
    header = read_header(made.path, "generator")
    assert header["classes"] == ["dark", "bright"]
    assert header["facts"]["images_seen"] == 12 * 8


def test_it_learns_what_the_classes_look_like(two_colours: Dataset, tmp_path: Path):
    from tinycats_core.config import SampleConfig
    from tinycats_core.sampling import sample

    quick = config(steps=250, lr=1e-2, batch_size=16, ema_decay=0.95, log_every=50, sample_every=250, checkpoint_every=250)
    made = train(two_colours, MODEL, quick, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] / 2
    net, _ = load_generator(made.path)
    images = sample(net, torch.tensor([0] * 8 + [1] * 8), 8, 2, SampleConfig(steps=10, guidance=1)).float()
    assert images[:8].mean() < 80
    assert images[8:].mean() > 170


def test_the_shipped_weights_are_the_average_not_the_raw_ones(two_colours: Dataset, tmp_path: Path):
    from tinycats_core.checkpoint import read_safetensors

    made = train(two_colours, MODEL, config(), tmp_path / "run")
    last, _ = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000012.safetensors", "training")
    shipped, _ = read_safetensors(made.path, "generator")
    assert all(torch.equal(shipped[name], last[f"ema/{name}"]) for name in shipped)
    assert any(not torch.equal(shipped[name], last[f"net/{name}"]) for name in shipped)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_going_on_gives_the_same_bits_as_never_stopping(two_colours: Dataset, tmp_path: Path, accumulation: int):
    settings = config(accumulation=accumulation)
    whole = train(two_colours, MODEL, settings, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at_nine(row: dict) -> None:
        if row["step"] == 9:
            raise Stop

    with pytest.raises(Stop):
        train(two_colours, MODEL, settings, tmp_path / "parts", on_log=stop_at_nine)
    resumed_at = []
    parts = train(two_colours, MODEL, settings, tmp_path / "parts", on_log=lambda row: resumed_at.append(row["step"]))
    assert resumed_at == [9, 12]  # from the checkpoint of step 8
    assert parts.sha256 == whole.sha256

    def curve(folder: str) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_log(tmp_path / folder) if row["step"] != 9]

    assert curve("parts") == curve("whole")


def test_a_finished_run_is_returned_at_once(two_colours: Dataset, tmp_path: Path):
    first = train(two_colours, MODEL, config(), tmp_path / "run")
    stamp = first.path.stat().st_mtime_ns
    again = train(two_colours, MODEL, config(), tmp_path / "run", on_log=lambda row: pytest.fail("trained again"))
    assert again == first
    assert first.path.stat().st_mtime_ns == stamp


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    two_colours: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = train(two_colours, MODEL, config(), tmp_path / "run")
    (tmp_path / "run" / "ema.safetensors").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = train(two_colours, MODEL, config(), tmp_path / "run")
    assert "step-00000012" in caplog.text
    assert "Using the one before" in caplog.text
    assert again.sha256 == whole.sha256


def test_only_the_last_five_checkpoints_are_kept(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(checkpoint_every=1, sample_every=100), tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step-{n:08d}.safetensors" for n in range(8, 13)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint(two_colours: Dataset, tmp_path: Path, number: signal.Signals):
    class Ended(BaseException):
        pass

    def ended(*_: object) -> None:
        raise Ended

    before = signal.signal(number, ended)
    try:
        with pytest.raises(Ended):
            train(two_colours, MODEL, config(), tmp_path / "run", on_log=lambda row: os.kill(os.getpid(), number))
        assert signal.getsignal(number) is ended
    finally:
        signal.signal(number, before)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003.safetensors"]
    assert not (tmp_path / "run" / "ema.safetensors").exists()
    whole = train(two_colours, MODEL, config(), tmp_path / "whole")
    assert train(two_colours, MODEL, config(), tmp_path / "run").sha256 == whole.sha256


def test_a_signal_that_nobody_acts_on_is_not_reported_as_success(two_colours: Dataset, tmp_path: Path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(TrainingError, match="stopped at step 3 of 12"):
            train(two_colours, MODEL, config(), tmp_path / "run", on_log=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_trains_in_a_thread_which_cannot_see_signals(two_colours: Dataset, tmp_path: Path):
    made = []
    thread = threading.Thread(target=lambda: made.append(train(two_colours, MODEL, config(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert made[0].step == 12


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(
    two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = training.flow_matching_loss
    steps: Iterator[int] = iter(range(1, 100))

    def poisoned(*args: object) -> torch.Tensor:
        loss = real(*args)  # pyright: ignore[reportArgumentType]
        return loss * float("nan") if next(steps) == 8 else loss

    monkeypatch.setattr(training, "flow_matching_loss", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 8; the last good checkpoint is .*step-00000004"):
        train(two_colours, MODEL, config(), tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004.safetensors"]
    assert not (tmp_path / "run" / "ema.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "settings", "difference"),
    [
        ({"width": 32}, {}, "model.width is 16 there and 32 here"),
        ({}, {"lr": 1e-4}, "train.lr is 0.002 there and 0.0001 here"),
    ],
)
def test_a_folder_of_another_run_is_refused(two_colours: Dataset, tmp_path: Path, model: dict, settings: dict, difference: str):
    train(two_colours, MODEL, config(), tmp_path / "run")
    with pytest.raises(CheckpointError, match=difference):
        train(two_colours, MODEL.model_copy(update=model), config(**settings), tmp_path / "run")


def test_another_data_set_is_refused(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "run")
    other = two_colours.model_copy(update={"source": "toycats"})
    with pytest.raises(CheckpointError, match="the data set is"):
        train(other, MODEL, config(), tmp_path / "run")


def test_a_damaged_result_is_an_error_not_a_result(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(), tmp_path / "run")
    data = bytearray(made.path.read_bytes())
    data[-1] ^= 1
    made.path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        train(two_colours, MODEL, config(), tmp_path / "run")


def test_wrong_number_of_classes_is_refused_before_any_step(two_colours: Dataset, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"2 classes but model\.num_classes is 3"):
        train(two_colours, MODEL.model_copy(update={"num_classes": 3}), config(), tmp_path / "run")


def test_every_epoch_shows_every_image_once():
    seen = torch.cat([batch_indices(10, 4, step, seed=3) for step in range(5)])  # two epochs of ten
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert not torch.equal(batch_indices(10, 4, 0, seed=3), batch_indices(10, 4, 0, seed=4))


def test_a_batch_is_a_function_of_seed_and_step(two_colours: Dataset):
    images, labels = torch.randint(0, 256, (20, 3, 8, 8)).to(torch.uint8), torch.arange(20) % 2
    settings = config(batch_size=400, label_dropout=0.25)
    one, two = (draw_batch(images, labels, settings, 2, step=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = draw_batch(images, labels, settings, 2, step=6)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    x_1, x_0, t, kept = one
    assert (kept == 2).float().mean() == pytest.approx(0.25, abs=0.08)
    assert abs(float(x_0.mean())) < 0.02
    assert float(x_0.std()) == pytest.approx(1, abs=0.02)
    assert 0 < float(t.min()) < float(t.max()) < 1
    originals = training.to_model_space(images)[batch_indices(20, 400, 5, settings.seed)]
    mirrored = (x_1 == originals.flip(-1)).flatten(1).all(1)
    straight = (x_1 == originals).flatten(1).all(1)
    assert bool((mirrored ^ straight).all())
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.1)


def test_noise_and_data_are_never_the_same(two_colours: Dataset):
    images = torch.randint(0, 256, (20, 3, 8, 8)).to(torch.uint8)
    x_1, x_0, _, _ = draw_batch(images, torch.zeros(20, dtype=torch.int64), config(), 2, step=0)
    correlation = torch.corrcoef(torch.stack([x_1.flatten(), x_0.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_seeds_are_mixed():
    seeds = {mix(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert mix(1, 2) != mix(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    settings = config(steps=100, warmup_steps=10, lr=0.5, schedule="cosine")
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (n + 1) for n in range(10)])
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert learning_rate(settings.model_copy(update={"schedule": "constant"}), 90) == 0.5


def test_the_average_warms_up():
    assert ema_decay(0.9999, 0) == pytest.approx(0.1)
    assert ema_decay(0.9999, 90) == pytest.approx(0.91)
    assert ema_decay(0.9999, 10**6) == 0.9999


def test_precision_follows_the_device():
    assert pick_precision("auto", torch.device("cpu")) is None
    assert pick_precision("bf16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ComputeError, match=r"train\.precision is 'fp16'"):
        pick_precision("fp16", torch.device("cpu"))


def test_bf16_trains_too(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(precision="bf16", gradient_checkpointing=True), tmp_path / "run")
    assert all(0 < row["loss"] < 10 for row in read_log(tmp_path / "run"))


def test_an_output_folder_that_cannot_be_is_named(two_colours: Dataset, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"cannot write to .*file/run"):
        train(two_colours, MODEL, config(), tmp_path / "file" / "run")


def test_a_full_disk_stops_with_the_last_checkpoint_named(two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = training.write_safetensors

    def no_space(path: Path, tensors: dict, header: dict) -> Path:
        if header["step"] == 8:
            raise OSError(28, "No space left on device")
        return real(path, tensors, header)

    monkeypatch.setattr(training, "write_safetensors", no_space)
    with pytest.raises(TrainingError, match=r"step 8 could not be written.*No space left.*goes on from step-00000004"):
        train(two_colours, MODEL, config(), tmp_path / "run")


def test_the_run_file_says_what_the_folder_is_for(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["model"] == MODEL.model_dump(mode="json")
    assert found["dataset"] == two_colours.content
