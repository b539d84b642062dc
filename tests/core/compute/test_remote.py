"""The client side of training on Modal, against a Modal in a folder."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modal import exception as modal_errors
from safetensors.torch import load_file

from deployments.fake_modal import FakeModal
from tinycats_core.compute import jobs, remote, volumes
from tinycats_core.compute.gpus import GPUS, Gpu, usd_per_second
from tinycats_core.compute.remote import Job, classifier_job, generator_job, train_on_modal
from tinycats_core.compute.watch import CallEnded
from tinycats_core.config import ClassifierConfig, ComputeConfig, DataConfig, ModelConfig, TrainConfig
from tinycats_core.data.preparation import prepare
from tinycats_core.errors import ComputeError, ModalUnreachable
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.files import read_json, write_json
from tinycats_core.records import Dataset, Trained
from tinycats_core.training.run_folder import RunFolder, read_log
from tinycats_core.training.start import train, training_code

ROOT = Path(__file__).resolve().parents[3]
MODEL = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TRAIN = TrainConfig(
    steps=6, batch_size=4, warmup_steps=1, snapshots=1, checkpoint_every=2, sample_every=6, log_every=1, ema_decays=(0.9, 0.5)
)
LONG = TRAIN.model_copy(update={"steps": 1_000_000, "checkpoint_every": 50, "sample_every": 1_000_000})
COMPUTE = ComputeConfig(where="modal", device="cpu", gpu="T4", poll_seconds=0.1, patience_minutes=0)
RUN = Path("outputs") / "runs"

Finished = tuple[Path, Trained, list[dict]]


class Replay(FakeModal):
    """A FakeModal whose next call is one that has been made already: no process is started. `outcome` is what it raises."""

    outcome: Exception | None = None

    def __init__(self, root: Path):
        super().__init__(root)
        self.spawned = 0

    def spawn(self, function: str, request: jobs.Request, compute: ComputeConfig) -> str:
        self.spawned += 1
        return self.calls()[0]

    def poll(self, call_id: str, seconds: float) -> jobs.Result:
        if self.outcome and self.spawned:
            raise self.outcome
        return super().poll(call_id, seconds)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DataConfig(source="toycats", image_size=16, toy_train_per_class=1, toy_val_per_class=1, toy_test_per_class=1)
    return prepare(config, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def job(dataset: Dataset) -> Job:
    return generator_job(dataset, MODEL, TRAIN)


@pytest.fixture(scope="module")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A Modal on which one whole training was run through the client: its folder, what came back, the rows reported."""
    modal_root, rows = tmp_path_factory.mktemp("modal"), []
    trained = train_on_modal(job, COMPUTE, tmp_path_factory.mktemp("run"), rows.append, FakeModal(modal_root))
    return modal_root, trained, rows


@pytest.fixture
def replay(finished: Finished, job: Job) -> Iterator[Replay]:
    """The finished Modal before its result is known: the call is asked for it."""
    result = finished[0] / RUN / job.run / "result.json"
    aside = result.rename(result.with_name("aside.json"))
    yield Replay(finished[0])
    aside.rename(result)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FakeModal]:
    """A Modal without any call, whose calls end with the test."""
    made = FakeModal(tmp_path / "modal")
    yield made
    for call_id in made.calls():
        if made.processes(call_id):
            made.cancel(call_id)


def until(true: Any, seconds: float = 240.0) -> Any:
    """Wait for a function's result to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


# ---- the whole way


def test_result_is_that_of_training_here(finished: Finished, dataset: Dataset, tmp_path: Path) -> None:
    root, trained, rows = finished
    here = train(dataset, MODEL, TRAIN, tmp_path, "cpu")
    there = trained.verify().ema.path.parent
    assert trained.content == here.content
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_log(tmp_path)]
    seconds = sum(read_json(there / "meter.json")["attempts"])
    assert 0 <= rows[0]["dollars"] <= rows[-1]["dollars"] <= round(seconds * (usd_per_second(COMPUTE) or 0), 4)
    assert sorted(path.name for path in there.iterdir()) == [
        *("diary.jsonl", "ema-0.5.safetensors", "ema.safetensors", "log.jsonl", "meter.json", "modal_call.json", "raw.safetensors"),
        "samples",
    ]
    assert [other.path for other in trained.files] == [
        there / "ema.safetensors",
        there / "ema-0.5.safetensors",
        there / "raw.safetensors",
    ]
    grid = "samples/step-00000006.png"
    assert (there / grid).read_bytes() == (tmp_path / grid).read_bytes()
    assert FakeModal(root).calls("train_generator") == ["fc-0000"]


def test_classifier_is_trained_there_too(dataset: Dataset, client: FakeModal, tmp_path: Path) -> None:
    config = ClassifierConfig(backbone="mobilenet_v3_small", epochs=2, batch_size=8)
    rows: list[dict] = []
    there = train_on_modal(classifier_job(dataset, config), COMPUTE, tmp_path / "there", rows.append, client)
    here = train_classifier(dataset, config, tmp_path / "here", "cpu")
    assert there.verify().content == here.content
    assert [row["epoch"] for row in rows] == [1, 2]
    assert (tmp_path / "there" / "report.json").is_file()
    assert client.calls() == client.calls("train_classifier")


def test_finished_run_asks_modal_nothing(finished: Finished, job: Job) -> None:
    trained = finished[1]
    client = remote.ModalClient({"check": "nothing that could be called"})
    assert train_on_modal(job, COMPUTE, trained.ema.path.parent, client=client) == trained


def test_finished_run_is_brought_here_without_a_call(finished: Finished, job: Job, tmp_path: Path) -> None:
    client = Replay(finished[0])
    assert train_on_modal(job, COMPUTE, tmp_path, client=client).content == finished[1].content
    assert client.spawned == 0


def test_weights_that_were_damaged_here_are_brought_here_anew(finished: Finished, job: Job, tmp_path: Path) -> None:
    client = Replay(finished[0])
    trained = train_on_modal(job, COMPUTE, tmp_path, client=client)
    trained.ema.path.write_bytes(b"?")
    assert train_on_modal(job, COMPUTE, tmp_path, client=client).is_intact()
    assert client.spawned == 0


def test_names_of_trainings(dataset: Dataset, job: Job) -> None:
    assert generator_job(dataset, MODEL, TRAIN).run == job.run
    others = [
        generator_job(dataset, MODEL, LONG),
        generator_job(dataset.model_copy(update={"sha256": "0" * 64}), MODEL, TRAIN),
        generator_job(dataset, MODEL.model_copy(update={"depth": 2}), TRAIN),
        classifier_job(dataset, ClassifierConfig()),
    ]
    assert len({job.run, *(other.run for other in others)}) == 5


def test_weights_of_other_code_are_another_training(dataset: Dataset, job: Job) -> None:
    assert generator_job(dataset, MODEL, TRAIN, training_code()).run == job.run
    assert generator_job(dataset, MODEL, TRAIN, "0" * 64).run != job.run


# ---- the data


def test_data_is_uploaded_once_and_again_when_it_is_damaged_there(
    replay: Replay, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "upload", lambda files: pytest.fail("uploaded again"))
    assert train_on_modal(job, COMPUTE, tmp_path / "a", client=replay).ema.step == 6
    monkeypatch.undo()
    folder = replay.root / "data" / jobs.data_folder(job.dataset.sha256)
    for name, damage in (("manifest.json", b"{"), ("images.safetensors", None)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"?" if damage is None else damage)  # of the same size, where None
        train_on_modal(job, COMPUTE, tmp_path / name, client=replay)
        assert (folder / name).read_bytes() == whole


def test_data_that_does_not_arrive_intact_is_refused_before_a_gpu_is_asked_for(
    replay: Replay, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "check", lambda sha256=None: {"revision": jobs.revision(), "data": "f" * 64})
    with pytest.raises(ComputeError, match=r"did not arrive intact on tinycats-data: its sha256 is ffffffffffff… there and"):
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert replay.spawned == 0


# ---- one call, whatever happens here


def test_orchestrator_that_is_killed_is_replaced_and_attaches(job: Job, client: FakeModal, tmp_path: Path) -> None:
    long = generator_job(job.dataset, MODEL, LONG)
    code = (
        "import sys; from pathlib import Path; from deployments.fake_modal import FakeModal\n"
        "from tinycats_core.compute import remote\n"
        "from tinycats_core.config import *; from tinycats_core.records import Dataset\n"
        "dataset, model, train, compute, root, folder = sys.argv[1:]\n"
        "job = remote.generator_job(Dataset.model_validate_json(dataset), ModelConfig.model_validate_json(model), "
        "TrainConfig.model_validate_json(train))\n"
        "remote.train_on_modal(job, ComputeConfig.model_validate_json(compute), Path(folder), None, FakeModal(Path(root)))\n"
    )
    parts = [part.model_dump_json() for part in (job.dataset, MODEL, LONG, COMPUTE)]
    command = [sys.executable, "-c", code, *parts, str(client.root), str(tmp_path / "run")]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            until(lambda: client.calls() and client.log("fc-0000"))
        finally:
            process.kill()
    assert read_json(tmp_path / "run" / "modal_call.json") == {"run": long.run, "call_id": "fc-0000"}

    seen: list[int] = []

    def interrupt(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        raise KeyboardInterrupt

    assert client.processes("fc-0000"), "the call goes on without it"
    with pytest.raises(KeyboardInterrupt):
        train_on_modal(long, COMPUTE, tmp_path / "run", interrupt, client)
    assert seen
    assert client.calls() == ["fc-0000"]
    until(lambda: not client.processes("fc-0000"), 10)  # the interrupt has ended the call
    assert not (tmp_path / "run" / "modal_call.json").exists()


def test_second_orchestrator_finds_the_call_of_the_first(job: Job, client: FakeModal, tmp_path: Path) -> None:
    first = threading.Thread(target=train_on_modal, args=[job, COMPUTE, tmp_path / "a", None, client])
    first.start()
    until(lambda: jobs.last_claim(client.claims(), job.run))
    second = train_on_modal(job, COMPUTE, tmp_path / "b", None, client)
    first.join()
    assert client.calls() == ["fc-0000"]
    assert second.ema.path.read_bytes() == (tmp_path / "a" / "ema.safetensors").read_bytes()


def test_killed_between_the_start_of_a_call_and_its_note_only_one_call_trains(job: Job, client: FakeModal, tmp_path: Path) -> None:
    compute, reached = COMPUTE, threading.Barrier(2)

    class Slow(FakeModal):
        def spawn(self, function: str, request: jobs.Request, compute: ComputeConfig) -> str:
            reached.wait()  # both have looked for another's call by now, and found none
            return super().spawn(function, request, compute)

    folders = [tmp_path / "a", tmp_path / "b"]
    made: list[Trained] = []
    threads = [
        threading.Thread(target=lambda folder=folder: made.append(train_on_modal(job, compute, folder, None, Slow(client.root))))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(client.calls()) == 2
    assert made[0].content == made[1].content
    answers = [read_json(client.root / "calls" / call_id / "outcome.json")["result"] for call_id in client.calls()]
    (owner,) = [answer["call_id"] for answer in answers if answer["kind"] == "elsewhere"]
    starts = [row for row in (folders[0] / "diary.jsonl").read_text().splitlines() if '"start"' in row or '"resume"' in row]
    assert len(starts) == 1
    assert [read_json(folder / "modal_call.json")["call_id"] for folder in folders].count(owner) >= 1


def test_interrupt_of_what_another_started_ends_it_as_well(job: Job, client: FakeModal, tmp_path: Path) -> None:
    long = generator_job(job.dataset, MODEL, LONG)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            train_on_modal(long, COMPUTE, tmp_path / "a", None, client)
        except BaseException as error:
            caught.append(error)

    first = threading.Thread(target=wait)
    first.start()
    until(lambda: jobs.last_claim(client.claims(), long.run))

    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on_modal(long, COMPUTE, tmp_path / "b", interrupt, client)
    first.join()
    assert isinstance(caught[0], CallEnded)
    assert "cancelled" in str(caught[0])


def test_preemptions_change_nothing_in_the_result(job: Job, client: FakeModal, tmp_path: Path) -> None:
    endless = generator_job(job.dataset, MODEL, LONG)  # it cannot end before it has been preempted, however busy the machine is
    left, resumed = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], []

    def preempt(row: dict[str, Any]) -> None:
        if not left:
            resumed.append(row["step"])
            if row["step"] > resumed[0] + LONG.checkpoint_every:
                raise KeyboardInterrupt
        elif before := client.container("fc-0000"):
            client.preempt("fc-0000", left.pop())
            until(lambda: client.container("fc-0000") not in (None, before))

    with pytest.raises(KeyboardInterrupt):
        train_on_modal(endless, COMPUTE, tmp_path / "there", preempt, client)
    assert client.calls() == ["fc-0000"]
    assert len(list((client.root / "calls" / "fc-0000").glob("attempt-*"))) == 4
    there = RunFolder(client.root / RUN / endless.run)
    kept = there.checkpoints()[0]
    step = int(kept.stem.removeprefix("step-"))
    assert step > resumed[0]
    train(job.dataset, MODEL, LONG.model_copy(update={"stop_at": step}), tmp_path / "here", "cpu")
    losses = {row["step"]: row["loss"] for row in there.log()}
    assert {row["step"]: row["loss"] for row in read_log(tmp_path / "here")}.items() <= losses.items()
    weights, others = (load_file(path) for path in (kept, tmp_path / "here" / "checkpoints" / kept.name))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_cancel_that_fails_keeps_the_call_and_the_interrupt(
    replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay.outcome = TimeoutError()

    def offline(call_id: str) -> None:
        raise modal_errors.ConnectionError("no route")

    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "cancel", offline)
    with pytest.raises(KeyboardInterrupt):
        train_on_modal(job, COMPUTE, tmp_path, interrupt, replay)
    assert "modal app stop tinycats" in caplog.text
    assert (tmp_path / "modal_call.json").exists()


def test_progress_that_cannot_be_shown_stops_no_training(
    replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def show(row: dict[str, Any]) -> None:
        raise OSError("no server")

    assert train_on_modal(job, COMPUTE, tmp_path, show, replay).ema.step == 6
    assert "the progress could not be shown: no server" in caplog.text


def test_an_error_here_leaves_the_call(
    replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str) -> Iterator[bytes]:
        yield b"{\n" if replay.spawned else b""  # a log that is damaged

    replay.outcome = TimeoutError()
    monkeypatch.setattr(replay, "read", read)
    monkeypatch.setattr(replay, "cancel", lambda call_id: pytest.fail("cancelled"))
    with pytest.raises(ValueError, match="property name"):
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert "nobody watches call fc-0000 now: it continues there, run the same command to attach" in caplog.text
    assert (tmp_path / "modal_call.json").exists()


@pytest.mark.parametrize("end", [RuntimeError("CUDA error"), KeyboardInterrupt()], ids=["ended", "interrupted"])
def test_note_of_a_call_that_another_flow_has_removed(
    replay: Replay,
    job: Job,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
) -> None:
    def poll(call_id: str, seconds: float) -> jobs.Result:
        (tmp_path / "modal_call.json").unlink()
        raise end

    monkeypatch.setattr(replay, "poll", poll)
    monkeypatch.setattr(replay, "cancel", lambda call_id: None)
    monkeypatch.setattr(remote, "_find_call", lambda client, job: None)
    with pytest.raises((CallEnded, KeyboardInterrupt)):
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert "could not be cancelled" not in caplog.text


def test_call_goes_on_with_what_it_was_started_with(
    finished: Finished, replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict] = []
    other = COMPUTE.model_copy(update={"gpu": "H100", "max_cost_usd": 5.0})
    train_on_modal(job, other, tmp_path / "a", rows.append, replay)
    said = "call fc-0000 was started with compute.gpu T4, not H100 and compute.max_cost_usd None, not 5.0; it continues with this"
    assert caplog.text.count(said) == 1
    assert rows[-1]["dollars"] == round(read_json(tmp_path / "a" / "meter.json")["usd"], 4)
    caplog.clear()
    train_on_modal(job, COMPUTE, tmp_path / "b", None, replay)
    assert "was started with" not in caplog.text


def test_error_of_a_call_that_was_waited_for_ends_the_command(
    replay: Replay, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [TimeoutError(), jobs.Failed(error="the loss is not finite")]

    def poll(call_id: str, seconds: float) -> jobs.Result:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(replay, "poll", poll)
    write_json(tmp_path / "modal_call.json", {"run": job.run, "call_id": "fc-0000"})
    with pytest.raises(CallEnded, match="the loss is not finite"):
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert replay.spawned == 0


# ---- outages


def test_an_outage_is_waited_for(replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    patient = COMPUTE.model_copy(update={"patience_minutes": 1.0, "poll_seconds": 0.05})
    replay.outcome = modal_errors.ConnectionError("no route")
    timer = threading.Timer(0.5, lambda: setattr(replay, "outcome", None))
    timer.start()
    assert train_on_modal(job, patient, tmp_path, client=replay).ema.step == 6
    assert "no route" in caplog.text
    assert "trying again for up to 1 minutes" in caplog.text
    assert replay.spawned == 1


def test_a_volume_that_cannot_be_read_is_waited_for(
    replay: Replay, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [modal_errors.ExecutionError("Request failed with status 500"), modal_errors.RemoteError("storage")]
    usual = replay.read

    def read(path: str) -> Iterator[bytes]:
        if replay.spawned and left:
            raise left.pop()
        return usual(path)

    monkeypatch.setattr(replay, "read", read)
    patient = COMPUTE.model_copy(update={"patience_minutes": 1.0, "poll_seconds": 0.05})
    assert train_on_modal(job, patient, tmp_path, client=replay).ema.step == 6
    assert "status 500" in caplog.text
    assert not left


def test_an_outage_that_lasts_leaves_the_call_and_the_next_run_attaches(replay: Replay, job: Job, tmp_path: Path) -> None:
    replay.outcome = modal_errors.ConnectionError("no route")
    with pytest.raises(ModalUnreachable, match=r"no route.*fc-0000 continues there, run the same command to attach"):
        train_on_modal(job, COMPUTE.model_copy(update={"patience_minutes": 0.002, "poll_seconds": 0.05}), tmp_path, client=replay)
    assert read_json(tmp_path / "modal_call.json")["call_id"] == "fc-0000"
    replay.outcome = None
    assert train_on_modal(job, COMPUTE, tmp_path, client=replay).ema.step == 6
    assert replay.spawned == 1


@pytest.mark.parametrize("where", ["poll", "read"])
def test_token_that_is_withdrawn_leaves_the_call_and_is_not_waited_for(
    replay: Replay, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    usual = getattr(replay, where)

    def withdrawn(*arguments: Any) -> Any:
        if not replay.spawned:
            return usual(*arguments)
        raise modal_errors.AuthError("token was revoked")

    monkeypatch.setattr(replay, where, withdrawn)
    monkeypatch.setattr(replay, "cancel", lambda call_id: pytest.fail("cancelled"))
    patient = COMPUTE.model_copy(update={"patience_minutes": 60.0})
    with pytest.raises(ComputeError, match=r"rejected the token|token was revoked.*continues there") as caught:
        train_on_modal(job, patient, tmp_path, client=replay)
    assert not isinstance(caught.value, CallEnded | ModalUnreachable)
    assert (tmp_path / "modal_call.json").exists()


def test_without_a_way_to_modal_nothing_is_started(job: Job, client: FakeModal, tmp_path: Path) -> None:
    (client.root / "offline").touch()
    with pytest.raises(modal_errors.ConnectionError):  # `check_credentials` of the real client says it in its own words
        train_on_modal(job, COMPUTE, tmp_path / "run", client=client)
    assert client.calls() == []
    assert list((tmp_path / "run").iterdir()) == []


# ---- what can go wrong with a call


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (modal_errors.OutputExpiredError(), r"no longer knows the result of call fc-0000; run the same command"),
        (modal_errors.NotFoundError("no such call"), r"no longer knows the result of call fc-0000"),
        (modal_errors.FunctionTimeoutError("x"), r"stopped after 11 attempts of 24 h each \(compute\.timeout_hours\); run"),
        (RuntimeError("CUDA error:\n  bus"), r"failed: CUDA error: bus; see `modal app logs tinycats`"),
        (modal_errors.RemoteError("killed, out of memory"), r"had too little memory; ask for a larger compute\.gpu"),
        (modal_errors.InternalFailure("worker lost"), r"failed: worker lost; see `modal app logs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_call_that_is_over_says_why_and_is_forgotten(
    replay: Replay, job: Job, tmp_path: Path, outcome: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay.outcome = outcome
    with pytest.raises(CallEnded, match=message) as caught:
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # the next run starts a new call
    assert replay.spawned == 1  # and this one has not tried again


def test_result_that_expired_is_found_on_the_volume(
    finished: Finished, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Replay(finished[0])
    client.outcome = modal_errors.OutputExpiredError()
    result = client.root / RUN / job.run / "result.json"
    text = result.read_text()
    result.unlink()
    usual = client.poll

    def ends_while_it_is_asked(call_id: str, seconds: float) -> jobs.Result:
        result.write_text(text)
        return usual(call_id, seconds)

    monkeypatch.setattr(client, "poll", ends_while_it_is_asked)
    assert train_on_modal(job, COMPUTE, tmp_path, client=client).content == finished[1].content


def test_body_that_fails_is_tried_as_often_as_it_may_and_then_told_of(job: Job, client: FakeModal, tmp_path: Path) -> None:
    broken = Job(job.function, job.made, job.dataset, {**job.settings, "train": "not even a mapping"})
    compute = COMPUTE.model_copy(update={"retries": 2})
    with pytest.raises(CallEnded, match=r"training on Modal failed: TypeError: .*see `modal app logs tinycats`"):
        train_on_modal(broken, compute, tmp_path / "run", client=client)
    assert len(list((client.root / "calls" / "fc-0000").glob("attempt-*"))) == 3


def test_container_that_is_killed_is_tried_again_and_goes_on(job: Job, client: FakeModal, tmp_path: Path) -> None:
    def kill(row: dict[str, Any]) -> None:
        if row["step"] >= 15 and (container := client.container("fc-0000")) and container[1] == 1:
            os.kill(container[0], signal.SIGKILL)  # as for too much memory: no preemption

    slow = TRAIN.model_copy(update={"steps": 300, "checkpoint_every": 10, "sample_every": 300, "log_every": 5})
    rows: list[int] = []
    longer = generator_job(job.dataset, MODEL, slow)
    with pytest.raises(CallEnded, match="killed by signal 9"):
        train_on_modal(longer, COMPUTE.model_copy(update={"retries": 0}), tmp_path / "run", kill, client)
    trained = train_on_modal(longer, COMPUTE, tmp_path / "run", lambda row: rows.append(row["step"]), client)
    assert client.calls() == ["fc-0000", "fc-0001"]
    assert trained.content == train(job.dataset, MODEL, slow, tmp_path / "here", "cpu").content


def test_error_that_the_body_returns_is_not_tried_again(job: Job, client: FakeModal, tmp_path: Path) -> None:
    cuda = COMPUTE.model_copy(update={"device": "cuda"})
    with pytest.raises(CallEnded, match=r"training on Modal ended: .*cuda"):
        train_on_modal(job, cuda, tmp_path / "run", client=client)
    assert len(list((client.root / "calls" / "fc-0000").glob("attempt-*"))) == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_call_ends_when_its_budget_is_used_up_and_a_higher_one_goes_on(
    job: Job, client: FakeModal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = generator_job(job.dataset, MODEL, LONG)

    def steps_of(seconds: float) -> int:
        poor = COMPUTE.model_copy(update={"max_cost_usd": seconds * (usd_per_second(COMPUTE) or 0)})
        with pytest.raises(CallEnded, match=r"is spent and compute\.max_cost_usd is 0\.0.*to resume from "):
            train_on_modal(long, poor, tmp_path / "run", client=client)
        assert list((tmp_path / "run").iterdir()) == []
        write_json(tmp_path / "run" / "modal_call.json", {"run": long.run, "call_id": client.calls()[-1]})  # if nobody had watched
        return max((row["step"] for row in read_log(client.root / RUN / long.run)), default=0)

    seconds = 3.0
    first = steps = steps_of(seconds)
    while steps == first:  # on a busy machine the whole budget may go into imports
        seconds *= 2
        steps = steps_of(seconds)
    assert steps > first
    assert steps_of(seconds) == steps, "with the same limit nothing more is trained"
    over = f"call {client.calls()[-2]} was over already, so a new one follows: training on Modal ended: "
    assert over in caplog.text
    assert sum(read_json(client.root / RUN / long.run / "meter.json")["attempts"]) >= seconds


def test_a_cap_on_a_gpu_without_a_known_price_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "B200", Gpu("B200", tflops=2250.0))
    compute = ComputeConfig(where="modal", gpu="B200", max_cost_usd=5.0)
    with pytest.raises(ComputeError, match=r"compute\.max_cost_usd is 5 but no price of B200 is known"):
        remote.check_compute(compute, FakeModal(tmp_path))


def test_folder_of_another_training_is_refused(replay: Replay, job: Job, tmp_path: Path) -> None:
    train_on_modal(job, COMPUTE, tmp_path, client=replay)
    other = generator_job(job.dataset, MODEL, TRAIN.model_copy(update={"seed": 5}))
    with pytest.raises(ComputeError, match=r"modal_call\.json belongs to another training \(call fc-0000\)"):
        train_on_modal(other, COMPUTE, tmp_path, client=replay)


def test_damaged_download_is_refused_and_mended(replay: Replay, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: str) -> Iterator[bytes]:
        for part in FakeModal.read(replay, path):
            yield b"\0" + part[1:] if path.endswith("ema.safetensors") else part

    monkeypatch.setattr(replay, "read", damaged)
    with pytest.raises(ComputeError, match=r"ema\.safetensors arrived damaged.*download it again"):
        train_on_modal(job, COMPUTE, tmp_path, client=replay)
    assert [path.name for path in tmp_path.iterdir()] == ["modal_call.json"]
    monkeypatch.undo()
    assert train_on_modal(job, COMPUTE, tmp_path, client=replay).is_intact()


# ---- before anything is started


def test_app_that_cannot_answer_is_one_line(job: Job, client: FakeModal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(dataset_sha256: str | None = None) -> dict[str, str | None]:
        raise OSError("no such\n device")

    monkeypatch.setattr(client, "check", check)
    message = "the app on Modal failed: no such device; see `modal app logs tinycats`"
    with pytest.raises(ComputeError, match=message):
        remote.check_compute(COMPUTE, client)
    monkeypatch.setattr(client, "check", lambda sha256=None: check() if sha256 else {"revision": jobs.revision()})
    monkeypatch.setattr(client, "list_data", lambda folder: pytest.fail("asked") if not folder else {})
    with pytest.raises(ComputeError, match=message):  # asked for the data
        train_on_modal(job, COMPUTE, tmp_path, client=client)


def test_code_that_is_deployed_but_stale(job: Job, client: FakeModal, tmp_path: Path) -> None:
    files = [tmp_path / "app.py", tmp_path / "pins.txt"]
    remote.check_compute(COMPUTE, client, files)  # which are not there: nothing to compare
    for path in files:
        path.write_text("changed")
    with pytest.raises(ComputeError, match=r"^app\.py or pins\.txt differs from the one deployed on Modal; run `modal deploy"):
        remote.check_compute(COMPUTE, client, files)
    (client.root / "revision").write_text("0123456789ab")
    message = rf"deployed on Modal is 0123456789ab, not {jobs.revision()} as here; run `modal deploy deployments/modal_app\.py`"
    with pytest.raises(ComputeError, match=message):
        remote.check_compute(COMPUTE, client)
    with pytest.raises(ComputeError, match=message):
        train_on_modal(job, COMPUTE, tmp_path / "run", client=client)
    assert client.calls() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "GTX-1080"}, r"compute\.gpu is 'GTX-1080'; allowed: T4, L4, .*H100"),
        ({"gpu": "H100:4"}, r"compute\.gpu is 'H100:4' but compute\.processes is 1; give a process for each GPU"),
        ({"gpu": "H100:"}, r"compute\.gpu is 'H100:'; allowed"),
        ({"gpu": "h100:1"}, None),
        ({"gpu": "H100:4", "processes": 4, "max_cost_usd": 5.0}, None),
    ],
)
def test_gpu_and_budget_are_checked_before_anything(client: FakeModal, changes: dict[str, Any], message: str | None) -> None:
    compute = COMPUTE.model_copy(update=changes)
    if message is None:
        assert remote.check_compute(compute, client) == "nowhere"
        return
    with pytest.raises(ComputeError, match=message):
        remote.check_compute(compute, client)


# ---- old runs


def test_old_runs_are_removed_and_those_in_work_stay(
    finished: Finished, job: Job, client: FakeModal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = client.root / RUN
    for age, name in enumerate(("new", "middle", "working", "old")):
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "checkpoints" / "step-1.safetensors").write_bytes(bytes(2_000_000))
        for path in (runs / name).rglob("*"):
            os.utime(path, (1.7e9 - age * 86_400, 1.7e9 - age * 86_400))
    (client.root / "calls" / "fc-0000").mkdir()
    jobs.claim(client.claims(), "working", "fc-0000", lambda other: False)

    lines = volumes.prune(1, dry_run=True, client=client)
    assert [line.split()[0] for line in lines] == ["new", "middle", "working", "old"]
    assert [line.split("  ")[-1] for line in lines] == [
        *("kept", "would be removed", "kept: call fc-0000 works on it", "would be removed")
    ]
    assert "2023-11-14 22:13" in lines[0]
    assert "2.0 MB" in lines[0]
    assert len(list(runs.iterdir())) == 4
    volumes.prune(1, client=client)
    assert sorted(path.name for path in runs.iterdir()) == ["new", "working"]
    with pytest.raises(ComputeError, match="^--keep is -1; give 0 or more$"):
        volumes.prune(-1, client=client)
