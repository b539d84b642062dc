"""The training loop: it learns, it goes on to the bit where it stopped, and it never reports a failure as success."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MODEL, config

from tinycats_core.data.splits import load_split
from tinycats_core.errors import CheckpointError, ComputeError, ConfigError, TinycatsError, TrainingError
from tinycats_core.generator.weights import ema_decay, load_generator
from tinycats_core.records import Dataset
from tinycats_core.signals import Stop, stop_on_signals
from tinycats_core.tensors import read_header, read_safetensors
from tinycats_core.training import recipe, run_folder, state, step
from tinycats_core.training.recipe import batch_indices, draw_batch, learning_rate, mix, shared_indices
from tinycats_core.training.run_folder import RunFolder, read_log
from tinycats_core.training.start import train, training_code
from tinycats_core.training.state import Run


def curve(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(folder)]


def test_a_run_leaves_weights_log_checkpoints_and_pictures(two_colours: Dataset, tmp_path: Path):
    rows = []
    made = train(two_colours, MODEL, config(), tmp_path / "run", on_log=rows.append)
    folder = tmp_path / "run"
    assert made.verify().ema.step == 12
    assert made.ema.path == folder / "ema.safetensors"
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert read_log(folder) == rows
    assert rows[0].keys() == {"step", "steps", "loss", "lr", "images_per_s", "grad_norm", "skipped", "device_memory_mb"}
    assert sorted(os.listdir(folder / "checkpoints")) == [f"step-{n:08d}.safetensors" for n in (4, 8, 12)]
    assert sorted(os.listdir(folder / "samples")) == [f"step-{n:08d}.png" for n in (6, 12)]
    header = read_header(made.ema.path, "generator")
    assert header["classes"] == ["dark", "bright"]
    assert header["facts"]["images_seen"] == 12 * 8


def test_it_learns_what_the_classes_look_like(two_colours: Dataset, tmp_path: Path):
    from tinycats_core.config import SampleConfig
    from tinycats_core.generator.sampling import sample

    quick = config(steps=250, lr=1e-2, batch_size=16, ema_decays=(0.95,), log_every=50, sample_every=250, checkpoint_every=250)
    made = train(two_colours, MODEL, quick, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] / 2
    net, _ = load_generator(made.ema.path)
    images = sample(net, torch.tensor([0] * 8 + [1] * 8), 8, 2, SampleConfig(steps=10, guidance=1)).float()
    assert images[:8].mean() < 80
    assert images[8:].mean() > 170


def test_the_shipped_weights_are_the_average_not_the_raw_ones(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(), tmp_path / "run")
    last, _ = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000012.safetensors", "training")
    shipped, _ = read_safetensors(made.ema.path, "generator")
    assert all(torch.equal(shipped[name], last[f"ema/0.9999/{name}"]) for name in shipped)
    assert any(not torch.equal(shipped[name], last[f"net/{name}"]) for name in shipped)


def test_the_raw_weights_lie_beside_the_averages_and_are_none_of_them(two_colours: Dataset, tmp_path: Path):
    settings = config(ema_decays=(0.9,))
    made = train(two_colours, MODEL, settings, tmp_path / "run")
    last, _ = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000012.safetensors", "training")
    assert made.raw.path == tmp_path / "run" / "raw.safetensors"
    assert (made.raw.step, made.raw.facts["ema_decay"]) == (12, None)
    assert made.averages == (made.ema,)
    raw, _ = read_safetensors(made.raw.path, "generator")
    assert all(torch.equal(raw[name], last[f"net/{name}"]) for name in raw)
    made.raw.path.unlink()
    assert not made.is_intact()
    again = train(two_colours, MODEL, settings, tmp_path / "run", on_log=lambda row: pytest.fail("trained again"))
    assert again == made.verify()


def test_weights_moved_to_another_folder_are_found_there(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(ema_decays=(0.9, 0.5)), tmp_path / "run")
    moved = made.in_folder(Path(shutil.copytree(tmp_path / "run", tmp_path / "there"))).verify()
    assert {file.path.parent for file in moved.files} == {tmp_path / "there"}
    assert len(moved.files) == 3
    assert moved.content == made.content


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
    assert resumed_at == [9, 12]  # from the checkpoint of step 8, in the middle of a log interval
    assert parts.ema.sha256 == whole.ema.sha256
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_finished_run_is_returned_at_once(two_colours: Dataset, tmp_path: Path):
    first = train(two_colours, MODEL, config(), tmp_path / "run")
    stamp = first.ema.path.stat().st_mtime_ns
    again = train(two_colours, MODEL, config(), tmp_path / "run", on_log=lambda row: pytest.fail("trained again"))
    assert again == first
    assert first.ema.path.stat().st_mtime_ns == stamp


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
    assert again.ema.sha256 == whole.ema.sha256


def test_only_the_last_five_checkpoints_are_kept(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(checkpoint_every=1, sample_every=100), tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step-{n:08d}.safetensors" for n in range(8, 13)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_a_checkpoint(two_colours: Dataset, tmp_path: Path, number: signal.Signals):
    class Ended(BaseException):
        pass

    def ended(*_: object) -> None:
        raise Ended

    before = signal.signal(number, ended)
    try:
        with pytest.raises(Ended):
            train_until_a_signal(two_colours, tmp_path / "run", number)
        assert signal.getsignal(number) is ended
    finally:
        signal.signal(number, before)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003.safetensors"]
    assert not (tmp_path / "run" / "ema.safetensors").exists()
    assert RunFolder(tmp_path / "run").diary()[-1]["cause"] == number.name
    whole = train(two_colours, MODEL, config(), tmp_path / "whole")
    assert train(two_colours, MODEL, config(), tmp_path / "run").ema.sha256 == whole.ema.sha256


def train_until_a_signal(dataset: Dataset, folder: Path, number: signal.Signals) -> None:
    """Train as a flow does; after the first row of the log this process gets the signal twice."""

    def on_log(row: dict) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with stop_on_signals() as stop:
        train(dataset, MODEL, config(), folder, on_log=on_log, stop=stop)


def test_a_stop_ends_with_a_checkpoint_and_its_reason(two_colours: Dataset, tmp_path: Path):
    stop = Stop()
    with pytest.raises(TrainingError, match="stopped at step 6 of 12; run the same command to resume"):
        train(two_colours, MODEL, config(log_every=6), tmp_path / "run", on_log=lambda row: stop.request("why"), stop=stop)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000004.safetensors", "step-00000006.safetensors"]
    assert RunFolder(tmp_path / "run").diary()[-1]["cause"] == "why"


def test_a_signal_that_nobody_acts_on_is_not_reported_as_success(two_colours: Dataset, tmp_path: Path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(TrainingError, match="stopped at step 3 of 12"):
            train_until_a_signal(two_colours, tmp_path / "run", signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_trains_in_a_thread_which_cannot_see_signals(two_colours: Dataset, tmp_path: Path):
    made = []
    thread = threading.Thread(target=lambda: made.append(train(two_colours, MODEL, config(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert made[0].ema.step == 12


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(
    two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, steps={8})
    with pytest.raises(TrainingError, match=r"not finite at step 8; 1 such steps.*last good checkpoint is step-00000004"):
        train(two_colours, MODEL, config(), tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004.safetensors"]
    assert not (tmp_path / "run" / "ema.safetensors").exists()


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps NaN, counted from one."""
    real, counted = step.flow_matching_loss, itertools.count(1)

    def poisoned(*args: object) -> torch.Tensor:
        loss = real(*args)  # pyright: ignore[reportArgumentType]
        return loss * float("nan") if next(counted) in steps else loss

    monkeypatch.setattr(step, "flow_matching_loss", poisoned)


def test_steps_that_are_not_finite_are_left_out_where_that_is_allowed(
    two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    poison(monkeypatch, steps={5, 8})
    made = train(two_colours, MODEL, config(max_skipped_steps=2), tmp_path / "run")
    net, _ = load_generator(made.ema.path)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert [row["skipped"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 2]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in read_log(tmp_path / "run"))
    assert "not finite at step 5" in caplog.text
    assert "not finite at step 8: skipped, 2 so far" in caplog.text
    noted = [row for row in RunFolder(tmp_path / "run").diary() if row["event"] == "skipped"]
    assert [row["steps"] for row in noted] == [[5], [8]]


def test_one_skipped_step_too_many_stops(two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, steps={2, 3, 5})
    with pytest.raises(TrainingError, match=r"not finite at step 5; 3 such steps, train\.max_skipped_steps allows 2"):
        train(two_colours, MODEL, config(max_skipped_steps=2, checkpoint_every=1), tmp_path / "run")


def test_a_step_that_is_left_out_changes_nothing(two_colours: Dataset, monkeypatch: pytest.MonkeyPatch):
    images, labels = load_split(two_colours, "train")
    run = state.Run.from_images(images, labels, ("dark", "bright"), MODEL, config(), torch.device("cpu"))
    step.training_step(run)
    before = {name: tensor.clone() for name, tensor in run.weights.items()}
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    counts = [float(state["step"]) for state in run.optimizer.state.values()]
    poison(monkeypatch, steps={1})
    loss, _ = step.training_step(run)
    assert not loss.isfinite()
    assert all(torch.equal(run.weights[name], before[name]) for name in before)
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(run.optimizer.state.values(), moments, strict=True))
    assert [float(state["step"]) for state in run.optimizer.state.values()] == counts
    assert run.step == 2


def test_too_little_memory_halves_what_goes_through_at_a_time(
    two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    small_memory(monkeypatch, most=3)
    short = train(two_colours, MODEL, config(), tmp_path / "short")
    assert "out of memory at step 0 with 8 images at a time: continuing with 4" in caplog.text
    noted = [row for row in RunFolder(tmp_path / "short").diary() if row["event"] == "out_of_memory"]
    assert [(row["before"], row["images_at_a_time"]) for row in noted] == [(8, 4), (4, 2)]
    monkeypatch.undo()
    train(two_colours, MODEL, config(), tmp_path / "ample")
    for one, other in zip(curve(tmp_path / "short"), curve(tmp_path / "ample"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    _, header = read_safetensors(tmp_path / "short" / "checkpoints" / "step-00000004.safetensors", "training")
    assert header["micro_batch"] == 2  # a resumed run does not try again what did not fit
    assert short.ema.step == 12


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let the allocator refuse more than this many images at a time."""
    real = step.flow_matching_loss

    def limited(*args: Any) -> torch.Tensor:
        if len(args[1]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args)

    monkeypatch.setattr(step, "flow_matching_loss", limited)


def test_too_little_memory_for_one_image_says_so(two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_memory(monkeypatch, most=0)
    with pytest.raises(TrainingError, match=r"out of memory at step 0 with 1 image at a time; make the model or model\.image_size"):
        train(two_colours, MODEL, config(), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="limits of a process's memory are Linux's")
def test_a_real_allocator_out_of_memory_is_survived(tmp_path: Path):
    """A process that may not have more than a little memory trains on, with smaller parts."""
    code = """
import logging, re, resource, sys, torch
from pathlib import Path
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.state import Run
from tinycats_core.training.step import step_within_memory, training_step
logging.basicConfig(level=logging.WARNING)
model = ModelConfig(image_size=64, patch_size=4, width=64, depth=2, heads=2, num_classes=2)
settings = TrainConfig(steps=2, batch_size=64, warmup_steps=0)
images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
run = Run.from_images(images, torch.zeros(64).long(), ("a", "b"), model, settings, torch.device("cpu"))
run.micro_batch = 4
training_step(run)  # threads and libraries have what they need now
run.micro_batch = 64
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
step_within_memory(run, RunFolder(Path(sys.argv[1])))
print(run.micro_batch, run.step)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    micro_batch, step = map(int, done.stdout.split())
    assert 1 <= micro_batch < 64
    assert step == 2
    assert "out of memory at step 1 with 64 images at a time: continuing with 32" in done.stderr


def test_every_average_is_kept_and_the_first_one_is_shipped(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(ema_decays=(0.9, 0.5)), tmp_path / "run")
    assert read_header(made.ema.path, "generator")["facts"]["ema_decay"] == 0.9
    assert read_header(tmp_path / "run" / "ema-0.5.safetensors", "generator")["facts"]["ema_decay"] == 0.5
    last, _ = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000012.safetensors", "training")
    for decay, name in ((0.9, "ema.safetensors"), (0.5, "ema-0.5.safetensors")):
        weights, _ = read_safetensors(tmp_path / "run" / name, "generator")
        assert all(torch.equal(weights[key], last[f"ema/{decay}/{key}"]) for key in weights)
    alone = train(two_colours, MODEL, config(ema_decays=(0.5,)), tmp_path / "alone")
    other, _ = read_safetensors(tmp_path / "run" / "ema-0.5.safetensors", "generator")
    weights, _ = read_safetensors(alone.ema.path, "generator")
    assert all(torch.equal(weights[key], other[key]) for key in weights)  # one does not change another


def test_an_average_of_no_steps_is_the_last_weights(two_colours: Dataset):
    images, labels = load_split(two_colours, "train")
    run = state.Run.from_images(images, labels, ("dark", "bright"), MODEL, config(ema_decays=0.0), torch.device("cpu"))
    for _ in range(3):
        step.training_step(run)
    assert all(torch.equal(run.emas[0.0][name], weight) for name, weight in run.weights.items())


def test_the_averages_are_kept_at_every_snapshot(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(snapshots=3, ema_decays=(0.9, 0.5)), tmp_path / "run")
    kept = [(one.step, one.facts["ema_decay"], one.path.name) for one in made.averages]
    assert kept == [
        *((12, 0.9, "ema.safetensors"), (12, 0.5, "ema-0.5.safetensors")),
        *((8, 0.9, "step-00000008-ema.safetensors"), (8, 0.5, "step-00000008-ema-0.5.safetensors")),
        *((4, 0.9, "step-00000004-ema.safetensors"), (4, 0.5, "step-00000004-ema-0.5.safetensors")),
    ]
    assert (made.raw.step, made.raw.path.name) == (12, "raw.safetensors")
    checkpoint, _ = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000008.safetensors", "training")
    weights, _ = read_safetensors(made.averages[3].path, "generator")
    assert all(torch.equal(weights[key], checkpoint[f"ema/0.5/{key}"]) for key in weights)


def test_a_training_in_parts_is_the_whole_one(two_colours: Dataset, tmp_path: Path):
    settings, folder = config(snapshots=3, ema_decays=(0.9,)), tmp_path / "parts"
    whole = train(two_colours, MODEL, settings, tmp_path / "whole")
    first = train(two_colours, MODEL, settings.until(4), folder)
    assert [one.path.name for one in first.files] == ["step-00000004-ema.safetensors", "step-00000004-raw.safetensors"]
    second = train(two_colours, MODEL, settings.until(8), folder)
    assert [one.step for one in second.averages] == [8, 4]
    assert train(two_colours, MODEL, settings.until(4), folder) == first.verify()  # which later parts leave alone
    last = train(two_colours, MODEL, settings, folder)
    assert [one.sha256 for one in last.files] == [one.sha256 for one in whole.files]
    assert curve(folder) == curve(tmp_path / "whole")
    *_, end = RunFolder(folder).diary()
    assert (end["event"], end["step"], end["images"], end["attempts"]) == ("finish", 12, 12 * 8, 3)
    second.ema.path.unlink()
    assert train(two_colours, MODEL, settings.until(8), folder) == second.verify()  # not from a later checkpoint


def test_snapshots_are_evenly_spaced_and_few_photos_get_few_steps():
    assert config(steps=10, snapshots=4).snapshot_steps() == (2, 5, 7, 10)
    assert config(steps=10, snapshots=4).until(5).snapshot_steps() == (2, 5)
    assert config(steps=2, snapshots=4, warmup_steps=0).snapshot_steps() == (1, 2)
    long = config(steps=1_000, passes=100, batch_size=8, warmup_steps=50)
    assert [(of.steps, of.warmup_steps) for of in (long.for_photos(count) for count in (20, 80, 900))] == [
        (250, 25),
        (1_000, 50),
        (1_000, 50),
    ]
    assert config().for_photos(5) == config()


def test_a_lost_average_is_made_again_and_a_damaged_one_is_no_result(two_colours: Dataset, tmp_path: Path):
    settings = config(ema_decays=(0.9, 0.5))
    made = train(two_colours, MODEL, settings, tmp_path / "run")
    _, average = made.averages
    assert (average.facts["ema_decay"], average.path.name) == (0.5, "ema-0.5.safetensors")
    assert train(two_colours, MODEL, settings, tmp_path / "run", on_log=lambda row: pytest.fail("trained again")) == made
    average.path.unlink()
    assert not made.is_intact()
    with pytest.raises(TinycatsError, match="ema-0.5.safetensors is gone"):
        made.verify()
    assert train(two_colours, MODEL, settings, tmp_path / "run") == made.verify()
    average.path.write_bytes(average.path.read_bytes()[:-1] + b"?")
    assert not made.is_intact()
    with pytest.raises(CheckpointError, match="damaged"):
        train(two_colours, MODEL, settings, tmp_path / "run")


def test_a_finished_run_can_be_lengthened_and_says_what_that_does(
    two_colours: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(two_colours, MODEL, config(), tmp_path / "run")
    longer = train(two_colours, MODEL, config(steps=18), tmp_path / "run")
    assert longer.ema.step == 18
    assert [row["step"] for row in read_log(tmp_path / "run")] == [3, 6, 9, 12, 15, 18]
    assert "lengthened from 12 to 18 steps: the learning rate after step 12 is 0.00e+00 in the shorter" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["steps"] == 18
    [noted] = [row for row in RunFolder(tmp_path / "run").diary() if row["event"] == "lengthened"]
    assert (noted["steps_before"], noted["steps"], noted["step"]) == (12, 18, 12)
    with pytest.raises(CheckpointError, match=r"train\.steps is 18 there and 12 here, and a run can be lengthened but not"):
        train(two_colours, MODEL, config(), tmp_path / "run")


def test_a_constant_rate_makes_a_lengthened_run_what_the_long_one_is(two_colours: Dataset, tmp_path: Path):
    settings = {"schedule": "constant"}
    long = train(two_colours, MODEL, config(steps=18, **settings), tmp_path / "long")
    train(two_colours, MODEL, config(**settings), tmp_path / "run")
    assert train(two_colours, MODEL, config(steps=18, **settings), tmp_path / "run").ema.sha256 == long.ema.sha256


def test_a_run_goes_on_from_another_folder_where_that_is_asked_for(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(schedule="constant"), tmp_path / "first")
    long = train(two_colours, MODEL, config(schedule="constant", steps=18), tmp_path / "long")
    settings = config(schedule="constant", steps=18, resume_from=tmp_path / "first")
    assert train(two_colours, MODEL, settings, tmp_path / "second").ema.sha256 == long.ema.sha256
    assert [row["step"] for row in read_log(tmp_path / "second")] == [15, 18]
    [start] = [row for row in RunFolder(tmp_path / "second").diary() if row["event"] == "start"]
    assert start["from"] == "step-00000012.safetensors"
    one = tmp_path / "first" / "checkpoints" / "step-00000004.safetensors"
    settings = config(schedule="constant", steps=18, resume_from=one)
    assert train(two_colours, MODEL, settings, tmp_path / "third").ema.sha256 == long.ema.sha256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "which does not exist"),
        (lambda path: path.mkdir(), "which holds no checkpoint"),
        (lambda path: path.write_text("no weights"), "not a complete training file"),
    ],
)
def test_a_checkpoint_to_go_on_from_that_is_not_there_is_an_error(
    two_colours: Dataset, tmp_path: Path, make: Callable[[Path], object], message: str
):
    make(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=message):
        train(two_colours, MODEL, config(resume_from=tmp_path / "elsewhere"), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_source_that_cannot_be_read_says_why(two_colours: Dataset, tmp_path: Path):
    settings = config(resume_from=tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match=r"^train\.resume_from is .*x, which cannot be read \(File name too long\)\. Give"):
        train(two_colours, MODEL, settings, tmp_path / "run", "cpu")


def test_a_checkpoint_of_another_run_to_go_on_from_is_refused(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "first")
    wider = MODEL.model_copy(update={"width": 32})
    with pytest.raises(CheckpointError, match=r"train\.resume_from is .*first.* another run: model\.width is 16 there and 32 here"):
        train(two_colours, wider, config(resume_from=tmp_path / "first"), tmp_path / "run")


def test_how_often_to_look_may_change_on_the_way(two_colours: Dataset, tmp_path: Path):
    whole = train(two_colours, MODEL, config(), tmp_path / "whole")
    stop_at(two_colours, tmp_path / "run", 9)
    looked = config(log_every=4, checkpoint_every=6, sample_every=12)
    assert train(two_colours, MODEL, looked, tmp_path / "run").ema.sha256 == whole.ema.sha256


def stop_at(dataset: Dataset, folder: Path, step: int) -> None:
    class Stop(Exception):
        pass

    def stop(row: dict) -> None:
        if row["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        train(dataset, MODEL, config(), folder, on_log=stop)


def test_the_diary_tells_each_start_and_stop(two_colours: Dataset, tmp_path: Path):
    stop_at(two_colours, tmp_path / "run", 9)
    train(two_colours, MODEL, config(), tmp_path / "run")
    rows = RunFolder(tmp_path / "run").diary()
    assert [(row["event"], row["step"]) for row in rows] == [("start", 0), ("stop", 9), ("resume", 8), ("finish", 12)]
    start, stop, resume, finish = rows
    assert (start["device"], start["precision"], start["processes"], start["attempt"]) == ("cpu", "fp32", 1, 1)
    assert (stop["cause"], stop["steps"]) == ("Stop", 9)
    assert (resume["from"], resume["steps_lost"], resume["attempt"]) == ("step-00000008.safetensors", 1, 2)
    assert (finish["attempts"], finish["images"]) == (2, (9 + 4) * 8)
    assert finish["seconds"] >= stop["seconds"] >= 0
    assert finish["images_per_s"] == pytest.approx(finish["images"] / finish["seconds"], rel=0.01)


def test_a_second_process_in_the_folder_is_refused(two_colours: Dataset, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run").hold(), pytest.raises(TrainingError, match="another process trains in"):
        train(two_colours, MODEL, config(), tmp_path / "run")
    assert train(two_colours, MODEL, config(), tmp_path / "run").ema.step == 12


def test_a_file_system_that_cannot_lock_is_warned_of(
    two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert train(two_colours, MODEL, config(), tmp_path / "run").ema.step == 12
    assert f"{tmp_path / 'run'} cannot be locked on this file system" in caplog.text


def test_a_hangup_that_is_ignored_stays_ignored(two_colours: Dataset, tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        hang_up = lambda row: os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
        assert train(two_colours, MODEL, config(), tmp_path / "run", on_log=hang_up).ema.step == 12
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lines_that_a_killed_process_left_half_written_are_passed_over(two_colours: Dataset, tmp_path: Path):
    stop_at(two_colours, tmp_path / "run", 9)
    for name in ("log.jsonl", "diary.jsonl"):
        with open(tmp_path / "run" / name, "a") as file:
            file.write('{"step": 1')
    kept = tmp_path / "run" / "checkpoints"
    for leftover in (
        kept / ".step-00000012.safetensors.0000.tmp",
        kept / ".tmpX1y2Z3",
        tmp_path / "run" / ".ema.safetensors.0.tmp",
    ):
        leftover.write_text("half")
    train(two_colours, MODEL, config(), tmp_path / "run")
    assert [row["step"] for row in read_log(tmp_path / "run")] == [3, 6, 9, 12]
    assert RunFolder(tmp_path / "run").diary()[-1]["event"] == "finish"
    assert RunFolder(tmp_path / "run").leftovers() == []
    assert sorted(os.listdir(kept)) == ["step-00000004.safetensors", "step-00000008.safetensors", "step-00000012.safetensors"]


@pytest.mark.parametrize(
    ("model", "settings", "difference"),
    [
        ({"width": 32}, {}, "model.width is 16 there and 32 here"),
        ({}, {"lr": 1e-4}, "train.lr is 0.002 there and 0.0001 here"),
        ({}, {"steps": 6}, "train.steps is 12 there and 6 here, and a run can be lengthened but not shortened"),
    ],
)
def test_a_folder_of_another_run_is_refused(two_colours: Dataset, tmp_path: Path, model: dict, settings: dict, difference: str):
    train(two_colours, MODEL, config(), tmp_path / "run")
    with pytest.raises(CheckpointError, match=difference):
        train(two_colours, MODEL.model_copy(update=model), config(**settings), tmp_path / "run")


def test_a_folder_of_other_code_is_refused(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "run", code="a" * 64)
    with pytest.raises(CheckpointError, match=f"the code of the training is {'a' * 12} there and {training_code()[:12]} here"):
        train(two_colours, MODEL, config(), tmp_path / "run")


def test_another_data_set_is_refused(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "run")
    other = two_colours.model_copy(update={"source": "toycats"})
    with pytest.raises(CheckpointError, match="the data set is"):
        train(other, MODEL, config(), tmp_path / "run")


def test_a_damaged_result_is_an_error_not_a_result(two_colours: Dataset, tmp_path: Path):
    made = train(two_colours, MODEL, config(), tmp_path / "run")
    data = bytearray(made.ema.path.read_bytes())
    data[-1] ^= 1
    made.ema.path.write_bytes(data)
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


def test_a_share_of_other_is_kept_over_the_steps_and_each_group_has_epochs_of_its_own():
    cats, other = torch.arange(0, 14, 2), torch.arange(1, 60, 2)  # 7 cats and 30 others
    steps = [shared_indices((cats, other), 0.3, 4, step, seed=3) for step in range(70)]
    assert all(len(indices) == 4 for indices in steps)
    seen = torch.cat(steps)
    assert [int((torch.cat(steps[:step]) % 2).sum()) for step in (1, 10, 70)] == [1, 12, 84]
    assert torch.bincount(seen[seen % 2 == 0] // 2).tolist() == [28] * 7  # 196 cats: 28 epochs
    of_other = seen[seen % 2 == 1]
    assert sorted(of_other[:30].tolist()) == sorted(of_other[30:60].tolist()) == other.tolist()
    assert torch.equal(steps[5], shared_indices((cats, other), 0.3, 4, 5, seed=3))
    assert not torch.equal(steps[5], shared_indices((cats, other), 0.3, 4, 5, seed=4))
    assert not (torch.cat([shared_indices((cats, other), 0.0, 4, step, seed=3) for step in range(9)]) % 2).any()


def test_a_training_sees_the_share_of_other_that_is_set(two_colours: Dataset):
    images, labels = load_split(two_colours, "train")
    classes = ("cat", "other")
    run = Run.from_images(
        images, labels, classes, MODEL, config(other_share=0.25, batch_size=8, label_dropout=0), torch.device("cpu")
    )
    _, _, _, seen = draw_batch(run.images, run.labels, run.config, 2, 0, run.groups)
    assert torch.bincount(seen).tolist() == [6, 2]
    plain = Run.from_images(images, labels, classes, MODEL, config(), torch.device("cpu"))
    assert plain.groups is None
    with pytest.raises(ConfigError, match=r"other_share is 0.25, but the data has no class 'other' \(its classes: dark, bright"):
        Run.start(two_colours, MODEL, config(other_share=0.25), torch.device("cpu"))
    with pytest.raises(TrainingError, match="20 of 20 training images are of the class 'other'"):
        Run.from_images(images, torch.ones_like(labels), classes, MODEL, config(other_share=0.25), torch.device("cpu"))


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
    originals = recipe.to_model_space(images)[batch_indices(20, 400, 5, settings.seed)]
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


def test_compiling_is_for_long_runs_on_a_gpu_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(state, "has_compiler", lambda device: True)
    long = config(steps=10_000)
    assert state.compile_mode(long, gpu) == "reduce-overhead"
    assert state.compile_mode(long, gpu, processes=2) == "default"
    assert state.compile_mode(config(), gpu) is None
    assert state.compile_mode(long, cpu) is None
    assert state.compile_mode(config(compile="reduce-overhead"), cpu) == "reduce-overhead"
    monkeypatch.setattr(state, "has_compiler", lambda device: False)
    assert state.compile_mode(long, gpu) is None
    with pytest.raises(ComputeError, match=r"train\.compile is 'default', which needs a C\+\+ compiler"):
        state.compile_mode(config(compile="default"), cpu)
    assert state.compile_mode(config(compile="off"), cpu) is None


def test_bf16_trains_too(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(precision="bf16", gradient_checkpointing=True), tmp_path / "run")
    assert all(0 < row["loss"] < 10 for row in read_log(tmp_path / "run"))


def test_an_output_folder_that_cannot_be_is_named(two_colours: Dataset, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"cannot write to .*file/run"):
        train(two_colours, MODEL, config(), tmp_path / "file" / "run")


def test_a_full_disk_stops_with_the_last_checkpoint_named(two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = run_folder.write_safetensors

    def no_space(path: Path, tensors: dict, header: dict) -> Path:
        if header["step"] == 8:
            raise OSError(28, "No space left on device")
        return real(path, tensors, header)

    monkeypatch.setattr(run_folder, "write_safetensors", no_space)
    with pytest.raises(TrainingError, match=r"step 8 could not be written.*No space left.*resumes from step-00000004"):
        train(two_colours, MODEL, config(), tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system takes root")
def test_a_file_system_that_runs_full_costs_no_more_than_an_interval(two_colours: Dataset, tmp_path: Path):
    whole = train(two_colours, MODEL, config(), tmp_path / "whole")
    size = (tmp_path / "whole" / "checkpoints" / "step-00000004.safetensors").stat().st_size
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        (small / "ballast").write_bytes(bytes((4 << 20) - int(1.8 * size)))
        with pytest.raises(TrainingError, match=r"checkpoint of step 8 could not be written.*resumes from step-00000004"):
            train(two_colours, MODEL, config(sample_every=12), small / "run")
        assert os.listdir(small / "run" / "checkpoints") == ["step-00000004.safetensors"]
        (small / "ballast").unlink()
        assert train(two_colours, MODEL, config(sample_every=12), small / "run").ema.sha256 == whole.ema.sha256
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_a_write_that_the_system_cuts_off_leaves_no_half_checkpoint(two_colours: Dataset, tmp_path: Path):
    """The limit on a file's size ends the write in the middle, as a full disk does, and takes no rights to set."""
    train(two_colours, MODEL, config(), tmp_path / "whole")
    size = (tmp_path / "whole" / "checkpoints" / "step-00000004.safetensors").stat().st_size
    stop_at(two_colours, tmp_path / "run", 6)
    code = """
import resource, signal, sys
from pathlib import Path
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.errors import TrainingError
from tinycats_core.records import Dataset
from tinycats_core.training.start import train, training_code
from tinycats_core.training.state import Run
dataset, model, settings, folder, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    train(
        Dataset.model_validate_json(dataset), ModelConfig.model_validate_json(model),
        TrainConfig.model_validate_json(settings), Path(folder),
    )
except TrainingError as error:
    print(error)
"""
    parts = [part.model_dump_json() for part in (two_colours, MODEL, config())]
    command = [sys.executable, "-c", code, *parts, str(tmp_path / "run"), str(size // 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "checkpoint of step 8 could not be written" in done.stdout
    assert "resumes from step-00000004.safetensors" in done.stdout
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004.safetensors"]
    assert "could not be written" in RunFolder(tmp_path / "run").diary()[-1]["cause"]


def test_the_run_file_says_what_the_folder_is_for(two_colours: Dataset, tmp_path: Path):
    train(two_colours, MODEL, config(), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["model"] == MODEL.model_dump(mode="json")
    assert found["dataset"] == two_colours.content
