"""Several processes that train together: the same curve as one, and nothing lost when one of them goes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MODEL, config
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from benchmarks.ranks import pid_of
from tinycats_core.errors import TrainingError
from tinycats_core.files import write_json
from tinycats_core.records import Dataset
from tinycats_core.training import ranks, start
from tinycats_core.training.run_folder import RunFolder, read_log
from tinycats_core.training.start import train

LONG = 1_000_000  # steps that no test waits for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="the ranks are looked for in /proc"),
]


def stop() -> None:
    raise InterruptedError


def once(step: int, action: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """Return an on_log that acts at the first row from this step on."""
    done = []

    def on_log(row: dict[str, Any]) -> None:
        if row["step"] >= step and not done:
            done.append(row)
            action()

    return on_log


def test_two_ranks_train_as_one_does(two_colours: Dataset, tmp_path: Path):
    settings = config(steps=100, log_every=1, accumulation=2, checkpoint_every=50, sample_every=100)
    rows = []
    train(two_colours, MODEL, settings, tmp_path / "one", "cpu")
    made = train(two_colours, MODEL, settings, tmp_path / "two", "cpu", rows.append, processes=2)
    assert made.ema.step == 100
    assert rows == read_log(tmp_path / "two")
    alone, together = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in together] == list(range(1, 101))
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert sorted(os.listdir(tmp_path / "two" / "samples")) == ["step-00000100.png"]
    finish = RunFolder(tmp_path / "two").diary()[-1]
    assert (finish["event"], finish["processes"], finish["images"]) == ("finish", 2, 800)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_job_with_a_checkpoint_and_its_name(two_colours: Dataset, tmp_path: Path, number: int):
    folder = tmp_path / "run"
    settings = config(steps=LONG, checkpoint_every=LONG, sample_every=LONG, log_every=10)

    def kill() -> None:
        os.kill(pid_of(folder, number), signal.SIGKILL)

    with pytest.raises(TrainingError, match=rf"rank {number} of 2 was ended by SIGKILL.*resumes from step-\d+\.safetensors"):
        train(two_colours, MODEL, settings, folder, "cpu", once(20, kill), processes=2)
    [kept] = RunFolder(folder).checkpoints()
    steps = int(kept.stem.removeprefix("step-"))
    assert steps >= read_log(folder)[-1]["step"] >= 20  # what the ranks had done, not what a checkpoint interval had
    with pytest.raises(InterruptedError):  # one process goes on where two were
        train(two_colours, MODEL, settings, folder, "cpu", once(steps + 10, stop))
    assert [row["event"] for row in RunFolder(folder).diary()][-2:] == ["resume", "stop"]
    assert RunFolder(folder).diary()[-2]["step"] == steps


def test_the_error_of_a_rank_is_the_error_of_the_job(two_colours: Dataset, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"2 classes but model\.num_classes is 3.*resumes from the start"):
        train(two_colours, MODEL.model_copy(update={"num_classes": 3}), config(), tmp_path / "run", "cpu", processes=2)


@pytest.mark.parametrize(
    ("codes", "said", "message"),
    [
        ((1, 1), {0: ("no space", False)}, "no space"),  # 1 lost the connection before it could say anything
        ((1, 1), {0: ("another rank is gone", True)}, "rank 1 of 2 ended with 1"),
        ((1, 1), {0: ("stopped", True), 1: ("no space", False)}, "no space"),
        ((-signal.SIGTERM, 1), {}, "rank 1 of 2 ended with 1"),
        ((1, -signal.SIGKILL), {0: ("another rank is gone", True)}, "rank 1 of 2 was ended by SIGKILL"),
    ],
)
def test_the_first_rank_to_fail_is_named(codes: tuple[int, int], said: dict[int, tuple[str, bool]], message: str, tmp_path: Path):
    for number, (text, follows) in said.items():
        write_json(tmp_path / f"rank-{number}.json", {"message": text, "follows": follows})
    failures = {number: ProcessFailure(number, 1, code, "nowhere") for number, code in enumerate(codes)}
    assert start._why(failures, {"folder": str(tmp_path), "processes": 2}) == message


def test_a_batch_that_cannot_be_shared_is_refused(two_colours: Dataset, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"train\.batch_size is 8, not divisible by compute\.processes 3"):
        train(two_colours, MODEL, config(), tmp_path / "run", "cpu", processes=3)


SCRIPT = """
import sys
from pathlib import Path
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.records import Dataset
from tinycats_core.signals import stop_on_signals
from tinycats_core.training.start import train
dataset, model, settings, folder = sys.argv[1:]
with stop_on_signals() as stop:
    train(
        Dataset.model_validate_json(dataset), ModelConfig.model_validate_json(model), TrainConfig.model_validate_json(settings),
        Path(folder), "cpu", processes=2, stop=stop,
    )
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_stop_with_a_checkpoint_when_what_started_them_is_stopped(
    two_colours: Dataset, tmp_path: Path, number: signal.Signals
):
    folder = tmp_path / "run"
    settings = config(steps=LONG, checkpoint_every=LONG, sample_every=LONG, log_every=10)
    given = [two_colours.model_dump_json(), MODEL.model_dump_json(), settings.model_dump_json(), str(folder)]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *given])
    wait_for(lambda: len(read_log(folder)) > 2)
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    wait_for(lambda: RunFolder(folder).diary()[-1]["event"] == "stop")
    [kept] = RunFolder(folder).checkpoints()
    assert int(kept.stem.removeprefix("step-")) >= 20
    assert RunFolder(folder).diary()[-1]["cause"] == "SIGTERM"
    wait_for(lambda: is_free(folder))  # nothing trains in it any more


def is_free(folder: Path) -> bool:
    try:
        with RunFolder(folder).hold():
            return True
    except TrainingError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_process_decides_for_itself():
    assert (ranks.rank(), ranks.world_size(), ranks.largest(7)) == (0, 1, 7)
    assert ranks.average(torch.tensor(3.0)) == 3
