"""The work as it is done on Modal, done here: claimed, metered, stopped, gone on with."""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copy2
from typing import Any

import pytest
import torch

from deployments.fake_modal import Claims
from tinycats_core import source_code
from tinycats_core.compute import jobs
from tinycats_core.compute.budget import Budget, Meter, process_start
from tinycats_core.compute.remote import generator_job
from tinycats_core.config import ClassifierConfig, ComputeConfig, DataConfig, ModelConfig, TrainConfig
from tinycats_core.data.preparation import prepare
from tinycats_core.errors import ComputeError, TrainingError
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.files import read_json, sha256_of
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.signals import Stop
from tinycats_core.training.run_folder import RunFolder, read_log
from tinycats_core.training.start import train

MODEL = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TRAIN = TrainConfig(
    steps=4, batch_size=4, warmup_steps=1, snapshots=1, checkpoint_every=1, sample_every=4, log_every=1, ema_decays=(0.9, 0.5)
)


class Volumes:
    """Two folders that stand for volumes, and what is asked of them. `on_keep` is called with the number of the commit."""

    def __init__(self, root: Path):
        self.data, self.outputs, self.claims = root / "data", root / "outputs", Claims(root / "claims")
        for folder in (self.data, self.outputs, self.claims.folder):
            folder.mkdir()
        self.reloads = 0
        self.kept: list[bool] = []
        self.on_keep: Callable[[int], None] = lambda number: None

    def site(self, call_id: str = "fc-0") -> jobs.Site:
        return jobs.Site(self.data, self.outputs, self._reload, self._keep, call_id, self.claims, lambda call_id: call_id == "gone")

    def _reload(self) -> None:
        self.reloads += 1

    def _keep(self, must: bool) -> None:
        self.kept.append(must)
        self.on_keep(len(self.kept))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DataConfig(source="toycats", image_size=16, toy_train_per_class=1, toy_val_per_class=1, toy_test_per_class=1)
    return prepare(config, tmp_path_factory.mktemp("data"))


@pytest.fixture
def volumes(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    """Volumes of which one holds the data, committed at each row of the log."""
    monkeypatch.setattr(jobs, "KEEP_SECONDS", 0.0)
    made = Volumes(tmp_path)
    folder = made.data / jobs.data_folder(dataset.sha256)
    folder.mkdir(parents=True)
    copy2(dataset.path, folder)
    return made


@pytest.fixture
def request_(dataset: Dataset) -> jobs.Request:
    return generator_job(dataset, MODEL, TRAIN).request(ComputeConfig(device="cpu"))


def error_of(result: jobs.Result) -> str:
    assert isinstance(result, jobs.Failed)
    return result.error


def done(request: jobs.Request, volumes: Volumes, work: jobs.Work = jobs.train_generator) -> jobs.Finished:
    result = jobs.perform(request, volumes.site(), work)
    assert isinstance(result, jobs.Finished)
    return result


# ---- the way through


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preempted_work_is_kept_then_goes_on_and_ends_as_if_it_had_not_been(
    number: int, volumes: Volumes, request_: jobs.Request, dataset: Dataset, tmp_path: Path
) -> None:
    def preempt(commit: int) -> None:
        if commit == 3:  # the start, then two rows
            signal.raise_signal(number)

    class Ended(BaseException):
        pass

    def end(number: int, frame: object) -> None:
        assert len(volumes.kept) == 4, "the volume is committed before the signal has its effect"
        raise Ended

    volumes.on_keep = preempt
    before = signal.signal(number, end)
    try:
        with pytest.raises(Ended):
            jobs.perform(request_, volumes.site(), jobs.train_generator)
    finally:
        signal.signal(number, before)
    run = volumes.outputs / "runs" / request_["run"]
    assert [row["step"] for row in read_log(run)] == [1, 2]
    assert not (run / "result.json").exists()

    result = done(request_, volumes)
    here = train(dataset, MODEL, TRAIN, tmp_path / "here", "cpu")
    assert Trained.model_validate(result.made).in_folder(tmp_path / "here") == here
    weights = {"ema.safetensors", "ema-0.5.safetensors", "raw.safetensors"}
    assert set(result.files) == weights | {"log.jsonl", "diary.jsonl", "meter.json", "samples/step-00000004.png"}
    assert all(sha256_of(run / name) == sha256 for name, sha256 in result.files.items())
    assert read_json(run / "result.json") == result.model_dump(mode="json")
    assert [row["step"] for row in read_log(run)] == [1, 2, 3, 4]
    assert [row.get("cause") for row in RunFolder(run).diary()] == [None, signal.Signals(number).name, None, None]
    assert len(read_json(run / "meter.json")["attempts"]) == 2
    assert volumes.reloads == 2
    assert volumes.kept[-1]


def test_finished_work_is_not_done_again(volumes: Volumes, request_: jobs.Request) -> None:
    result = jobs.perform(request_, volumes.site(), jobs.train_generator)
    assert jobs.perform(request_, volumes.site(), lambda *given: pytest.fail("done again")) == result
    (volumes.outputs / "runs" / request_["run"] / "ema.safetensors").write_bytes(b"")
    assert "ema.safetensors" in error_of(jobs.perform(request_, volumes.site(), jobs.train_generator))


def test_classifier_is_the_one_that_is_trained_here(
    volumes: Volumes, request_: jobs.Request, dataset: Dataset, tmp_path: Path
) -> None:
    config = ClassifierConfig(backbone="mobilenet_v3_small", epochs=2, batch_size=8)
    request = request_ | {"classifier": config.model_dump(mode="json")}
    result = done(request, volumes, jobs.train_classifier)
    here = train_classifier(dataset, config, tmp_path / "here", "cpu")
    assert Weights.model_validate(result.made).sha256 == here.sha256
    assert set(result.files) == {"classifier.safetensors", "report.json", "log.jsonl", "meter.json"}
    run = RunFolder(volumes.outputs / "runs" / request_["run"])
    assert [row["epoch"] for row in run.log()] == [1, 2]


def test_a_classifier_is_stopped_in_its_next_batch(volumes: Volumes, request_: jobs.Request) -> None:
    rows = []

    def work(request: jobs.Request, dataset: Dataset, folder: Path, on_log: jobs.OnLog, stop: Stop) -> Weights:
        def row(row: dict[str, Any]) -> None:
            rows.append(row["epoch"])
            if row["epoch"] == 2:
                signal.raise_signal(signal.SIGINT)
            on_log(row)

        return jobs.train_classifier(request, dataset, folder, row, stop)

    config = ClassifierConfig(backbone="mobilenet_v3_small", epochs=9, batch_size=8)
    request = request_ | {"classifier": config.model_dump(mode="json")}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.perform(request, volumes.site(), work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert rows == [1, 2]


# ---- one call of a run


def test_only_one_call_works_on_a_run(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    running: set[str] = {"a", "b"}

    def claim(call_id: str) -> str:
        return jobs.claim(claims, "run", call_id, lambda other: other not in running)

    assert jobs.last_claim(claims, "run") is None
    assert [claim("a"), claim("b"), claim("a"), claim("b")] == ["a"] * 4
    running.remove("a")
    assert [claim("b"), claim("c"), claim("b")] == ["b"] * 3
    assert jobs.last_claim(claims, "run") == "b"
    assert jobs.last_claim(claims, "another") is None


@pytest.mark.parametrize("before", [None, "gone"])
def test_of_many_calls_at_once_one_gets_the_run(before: str | None, tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    if before:
        jobs.claim(claims, "run", before, lambda other: False)
    owners: list[str] = []
    together = threading.Barrier(8)

    def start(call_id: str) -> None:
        together.wait()
        owners.append(jobs.claim(claims, "run", call_id, lambda other: other == "gone"))

    threads = [threading.Thread(target=start, args=[f"fc-{number}"]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 8
    assert len(set(owners)) == 1


def test_second_call_names_the_first_and_does_nothing(volumes: Volumes, request_: jobs.Request) -> None:
    jobs.claim(volumes.claims, request_["run"], "fc-0", lambda other: False)
    assert jobs.perform(request_, volumes.site("fc-1"), lambda *given: pytest.fail("worked")) == jobs.DoneElsewhere(call_id="fc-0")
    assert not list(volumes.outputs.iterdir())


# ---- the budget


def test_work_stops_with_a_checkpoint_when_the_budget_is_used_up_and_goes_on_with_a_higher_one(
    volumes: Volumes, request_: jobs.Request, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[threading.Timer] = []

    def work(request: jobs.Request, dataset: Dataset, folder: Path, on_log: jobs.OnLog, stop: Stop) -> Trained:
        def row(row: dict[str, Any]) -> None:
            on_log(row)
            if row["step"] == 2:  # however long the way here has taken
                timers[0].interval = 0.0
                threading.Thread.start(timers[0])
                timers[0].join()

        return jobs.train_generator(request, dataset, folder, row, stop)

    monkeypatch.setattr(threading.Timer, "start", lambda timer: timers.append(timer))
    request = request_ | {"budget": {"usd": 900.0, "usd_per_second": 1.0}}
    run = RunFolder(volumes.outputs / "runs" / request_["run"])
    stopped = error_of(jobs.perform(request, volumes.site(), work))
    last = run.checkpoints()[0]
    assert (run.diary()[-1]["step"], run.diary()[-1]["cause"]) == (2, "budget")
    assert stopped.startswith("$")
    assert stopped.endswith(
        f"is spent and compute.max_cost_usd is 900; give a higher one and run the same command to resume from {last.name}"
    )
    assert sum(read_json(run.path / "meter.json")["attempts"]) >= 0.001

    request["budget"]["usd"] = 0.0001
    again = jobs.perform(request, volumes.site(), lambda *given: pytest.fail("worked"))
    assert "compute.max_cost_usd is 0.0001" in error_of(again)

    result = done(request_ | {"budget": {"usd": 500.0, "usd_per_second": 0.01}}, volumes)
    assert result.made["averages"][0]["sha256"] == train(dataset, MODEL, TRAIN, tmp_path / "here", "cpu").ema.sha256
    assert [row["event"] for row in run.diary()] == ["start", "stop", "resume", "finish"]


def test_the_seconds_before_the_meter_count_against_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, seconds = Budget(usd=10.0, usd_per_second=0.1), []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: seconds.append(timer.interval))
    meter = Meter(tmp_path / "meter.json", "fc-0", "T4", budget, since=time.monotonic() - 40.0)
    with meter.running(Stop()):
        pass
    assert seconds == pytest.approx([60.0], abs=5.0)


def test_a_process_began_a_while_ago() -> None:
    assert 0 < time.monotonic() - process_start() < 24 * 3600


def test_each_attempt_costs_what_its_gpu_costs(tmp_path: Path) -> None:
    def attempt(usd: float | None, rate: float | None) -> Meter:
        budget = Budget(usd=usd, usd_per_second=rate)
        meter = Meter(tmp_path / "meter.json", "fc-0", "T4", budget)
        meter.since -= 100.0
        return meter

    attempt(5.0, 0.02).write()
    assert read_json(tmp_path / "meter.json")["usd"] == pytest.approx(2.0, abs=0.1)
    attempt(5.0, 0.01).write()
    kept = read_json(tmp_path / "meter.json")
    assert kept["usd"] == pytest.approx(3.0, abs=0.1)
    assert kept["attempts"] == pytest.approx([100.0, 100.0], abs=5.0)
    stop = Stop()
    with pytest.raises(ComputeError), attempt(2.9, 0.001).running(stop):
        pass
    assert stop.reason == "budget"
    attempt(None, None).write()
    with (
        pytest.raises(ComputeError, match="an earlier attempt was on a GPU without a known price"),
        attempt(9, 0.1).running(Stop()),
    ):
        pass


# ---- what no retry can mend, and what one may


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "0123"}, r"deployed code is [0-9a-f]{12}, not 0123 as here; run `modal deploy deployments/modal_app\.py`"),
        ({"device": "cuda"}, "cuda"),
        ({"model": {"width": 16, "colour": "black"}}, "does not know these settings; run `modal deploy"),
        ({"model": MODEL.model_copy(update={"num_classes": 4}).model_dump(mode="json")}, "13 classes"),
    ],
    ids=["stale", "no GPU", "older code", "other classes"],
)
def test_what_no_retry_can_mend_is_returned(
    volumes: Volumes, request_: jobs.Request, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = jobs.perform(request_ | change, volumes.site(), jobs.train_generator)
    with pytest.raises(TrainingError, match=message):
        raise TrainingError(error_of(result))


def test_stale_code_claims_nothing(volumes: Volumes, request_: jobs.Request) -> None:
    jobs.perform(request_ | {"revision": "0123"}, volumes.site(), jobs.train_generator)
    assert jobs.last_claim(volumes.claims, request_["run"]) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"?"), "has the sha256 8a8de823d5ed… instead of "),
        (Path.unlink, "is not there; run the same"),
    ],
    ids=["changed", "gone"],
)
def test_data_that_is_not_what_was_asked_for(
    damage: Callable[[Path], object], message: str, volumes: Volumes, request_: jobs.Request
) -> None:
    damage(next(volumes.data.rglob("images.safetensors")))
    assert message in error_of(jobs.perform(request_, volumes.site(), jobs.train_generator))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"^the outputs volume is full: .*prune --keep 3` removes old runs"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"^the outputs volume is full: "),
        (torch.OutOfMemoryError("CUDA out of memory"), r"^out of memory: CUDA out of memory; ask for a larger compute\.gpu"),
        (TrainingError("the loss is not finite at step 7"), r"^the loss is not finite at step 7$"),
    ],
)
def test_errors_that_come_back_with_a_remedy(volumes: Volumes, request_: jobs.Request, error: Exception, message: str) -> None:
    def work(*given: Any) -> Weights:
        raise error

    answer = error_of(jobs.perform(request_, volumes.site(), work))
    with pytest.raises(TrainingError, match=message):
        raise TrainingError(answer)
    assert len(volumes.kept) == 2


def test_a_checkpoint_that_does_not_fit_is_a_full_volume(
    volumes: Volumes, request_: jobs.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tinycats_core.training.run_folder.write_safetensors", full)
    answer = error_of(jobs.perform(request_, volumes.site(), jobs.train_generator))
    assert answer.startswith("the outputs volume is full: the checkpoint of step 1 could not be written")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: bus"), ConnectionError("no route"), PermissionError("no")])
def test_other_errors_are_raised_so_that_modal_retries(volumes: Volumes, request_: jobs.Request, error: Exception) -> None:
    def work(*given: Any) -> Weights:
        raise error

    with pytest.raises(RuntimeError, match=f"^{type(error).__name__}: "):  # never one that could mean the way to Modal
        jobs.perform(request_, volumes.site(), work)
    assert len(volumes.kept) == 2  # what there is is kept for the next attempt


@pytest.fixture
def edited_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A function that adds a line to a source of the core."""

    def edit(file: str, line: str) -> None:
        path = source_code.ROOT / "tinycats_core" / file
        monkeypatch.setitem(source_code.TEXTS, path, source_code.TEXTS[path] + line)
        forget()

    def forget() -> None:
        for cached in (source_code._read, source_code._code, jobs.revision):
            cached.cache_clear()

    yield edit
    monkeypatch.undo()
    forget()


def test_revision_changes_with_what_a_call_runs(edited_sources: Callable[[str, str], None]) -> None:
    files = ("training/step.py", "compute/jobs.py", "evaluation/distances.py", "generator/model.py")
    before = jobs.revision()
    for file in files:
        edited_sources(file, "\n# a comment\n")
    assert jobs.revision() == before
    seen = {before}
    for file in files:
        edited_sources(file, "\nprint('an edit')\n")
        assert jobs.revision() not in seen, file
        seen.add(jobs.revision())


def test_check_tells_code_and_data(volumes: Volumes, dataset: Dataset) -> None:
    assert jobs.check(volumes.data) == {"revision": jobs.revision(), "data": None}
    assert jobs.check(volumes.data, dataset.sha256)["data"] == dataset.sha256
