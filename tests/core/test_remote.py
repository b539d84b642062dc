"""The client side of training on Modal, against a stand-in at the seam and a loopback server that speaks gRPC."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpclib
import grpclib.server
import modal
import pytest
import torch
from modal import exception as modal_errors
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

from tinycats_core import remote
from tinycats_core.config import ComputeConfig, DataConfig, ModelConfig, TrainConfig
from tinycats_core.data import prepare
from tinycats_core.errors import ComputeError
from tinycats_core.files import read_json, sha256_of
from tinycats_core.records import Checkpoint, Dataset
from tinycats_core.remote import CallEnded, ModalClient, ModalUnreachable, check_credentials, train_on_modal
from tinycats_core.training import read_log, train

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TRAIN = TrainConfig(steps=6, batch_size=4, warmup_steps=1, checkpoint_every=2, sample_every=6, log_every=1, ema_decays=(0.9, 0.5))
COMPUTE = ComputeConfig(where="modal", device="cpu", poll_seconds=0.2)

# Run in a process of its own for each call: the real body, with volumes that are stale until reload and private until
# commit, as a container sees them.
CONTAINER = """
import json, os, shutil, sys
from pathlib import Path
import deployments.modal_app as modal_app

state, call = Path(sys.argv[1]), Path(sys.argv[2])

def mirror(source, target):
    for path in [p for p in target.rglob("*") if p.is_file() and not (source / p.relative_to(target)).exists()]:
        path.unlink()
    for path in [p for p in source.rglob("*") if p.is_file()]:
        copy = target / path.relative_to(source)
        if not copy.is_file() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy.with_name(f".{copy.name}.part"))
            os.replace(copy.with_name(f".{copy.name}.part"), copy)

class Mounted:
    def __init__(self, name):
        self.committed, self.path = state / name, call / name
        self.path.mkdir()
    def reload(self):
        mirror(self.committed, self.path)
    def commit(self):
        mirror(self.path, self.committed)

modal_app.data_volume, modal_app.outputs_volume = Mounted("data"), Mounted("outputs")
modal_app.DATA, modal_app.OUTPUTS = call / "data", call / "outputs"
modal_app.COMMIT_SECONDS = 0.0
try:
    outcome = {"result": modal_app.train_generator.local(json.loads((call / "request.json").read_text()))}
except Exception as error:
    outcome = {"raised": str(error)}
(call / "outcome.part").write_text(json.dumps(outcome))
os.replace(call / "outcome.part", call / "outcome.json")
"""


class LocalModal(ModalClient):
    """Modal in a folder: volumes, and a process for each call. Two objects on one folder see the same calls."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root
        for name in ("data", "outputs", "calls"):
            (root / name).mkdir(parents=True, exist_ok=True)

    @property
    def calls(self) -> list[str]:
        return sorted(path.name for path in (self.root / "calls").iterdir())

    def check_credentials(self) -> str:
        return "nowhere"

    def check_deployed(self) -> None:
        pass

    def list_data(self, folder: str) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (self.root / "data" / folder).glob("*")}

    def upload(self, files: Mapping[str, Path]) -> None:
        for name, local in files.items():
            target = self.root / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(local, target)

    def spawn(self, request: dict[str, Any], compute: ComputeConfig) -> str:
        call_id = f"fc-{len(self.calls):04d}"
        call = self.root / "calls" / call_id
        call.mkdir()
        (call / "request.json").write_text(json.dumps(request))
        with open(call / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", CONTAINER, str(self.root), str(call)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # so that it does not stay a zombie
        (call / "pid").write_text(str(process.pid))
        return call_id

    def poll(self, call_id: str, seconds: float) -> dict[str, Any]:
        outcome = self.root / "calls" / call_id / "outcome.json"
        deadline = time.monotonic() + seconds
        while not outcome.is_file():
            if not self.runs(call_id) and not outcome.is_file():
                text = (outcome.parent / "output.txt").read_text()
                raise modal_errors.RemoteError(f"the container ended without a result: {text[-500:]}")
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.02)
        found = read_json(outcome)
        if "raised" in found:
            raise RuntimeError(found["raised"])
        return found["result"]

    def cancel(self, call_id: str) -> None:
        os.killpg(int((self.root / "calls" / call_id / "pid").read_text()), signal.SIGKILL)

    def read(self, path: str) -> Iterator[bytes]:
        yield (self.root / "outputs" / path).read_bytes()

    def runs(self, call_id: str) -> bool:
        try:
            os.kill(int((self.root / "calls" / call_id / "pid").read_text()), 0)
        except ProcessLookupError:
            return False
        return True


class Replay(LocalModal):
    """A LocalModal whose next call is one that has finished already: no process is started."""

    outcome: Exception | None = None

    def spawn(self, request: dict[str, Any], compute: ComputeConfig) -> str:
        return self.calls[0]

    def poll(self, call_id: str, seconds: float) -> dict[str, Any]:
        if self.outcome:
            raise self.outcome
        return super().poll(call_id, seconds)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DataConfig(source="toycats", image_size=16, toy_train_per_class=1, toy_val_per_class=1, toy_test_per_class=1)
    return prepare(config, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint, list[dict]]:
    """A Modal on which one whole training was run through the client: its folder, what came back, the rows reported."""
    modal_root, rows = tmp_path_factory.mktemp("modal"), []
    folder = tmp_path_factory.mktemp("run")
    client = LocalModal(modal_root)
    checkpoint = train_on_modal(dataset, MODEL, TRAIN, COMPUTE, folder, rows.append, client)
    return modal_root, checkpoint, rows


@pytest.fixture
def replay(finished: tuple[Path, Checkpoint, list[dict]]) -> Replay:
    return Replay(finished[0])


# ---- the whole way


def test_result_is_that_of_training_here(finished: tuple[Path, Checkpoint, list[dict]], dataset: Dataset, tmp_path: Path) -> None:
    _, checkpoint, rows = finished
    here = train(dataset, MODEL, TRAIN, tmp_path, "cpu")
    there = checkpoint.verify().path.parent
    assert checkpoint.content == here.content
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_log(tmp_path)]
    assert sorted(path.name for path in there.iterdir()) == [
        *("diary.jsonl", "ema-0.5.safetensors", "ema.safetensors", "log.jsonl", "modal_call.json", "raw.safetensors", "samples")
    ]
    assert [other.path for other in checkpoint.others] == [there / "ema-0.5.safetensors", there / "raw.safetensors"]
    grid = "samples/step-00000006.png"
    assert (there / grid).read_bytes() == (tmp_path / grid).read_bytes()


def test_finished_run_asks_modal_nothing(finished: tuple[Path, Checkpoint, list[dict]], dataset: Dataset) -> None:
    checkpoint = finished[1]
    client = ModalClient(function="nothing that could be called")
    assert train_on_modal(dataset, MODEL, TRAIN, COMPUTE, checkpoint.path.parent, client=client) == checkpoint


def test_data_is_uploaded_once(replay: Replay, dataset: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(replay, "upload", lambda files: pytest.fail("uploaded again"))
    assert train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay).step == 6
    truncated = replay.root / "data" / remote.data_folder(dataset.sha256) / "manifest.json"
    whole = truncated.read_bytes()
    truncated.write_bytes(whole[:10])
    monkeypatch.undo()
    train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path / "other", client=replay)
    assert truncated.read_bytes() == whole


def test_lost_contact_leaves_the_call_and_the_next_run_attaches(
    finished: tuple[Path, Checkpoint, list[dict]], dataset: Dataset, tmp_path: Path
) -> None:
    client = Replay(finished[0])
    client.outcome = modal_errors.ConnectionError("no route")
    with pytest.raises(ModalUnreachable, match=r"no route.*fc-0000 goes on there"):
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=client)
    assert read_json(tmp_path / "modal_call.json")["call_id"] == "fc-0000"
    again = LocalModal(finished[0])
    checkpoint = train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=again)
    assert checkpoint.sha256 == finished[1].sha256
    assert again.calls == ["fc-0000"]


@pytest.mark.parametrize("where", ["poll", "read"])
def test_token_that_is_withdrawn_leaves_the_call(
    replay: Replay, dataset: Dataset, tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    def withdrawn(*arguments: Any) -> Any:
        raise modal_errors.AuthError("token was revoked")

    monkeypatch.setattr(replay, where, withdrawn)
    monkeypatch.setattr(replay, "cancel", lambda call_id: pytest.fail("cancelled"))
    with pytest.raises(ComputeError, match=r"rejected the token|token was revoked.*goes on there") as caught:
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay)
    assert not isinstance(caught.value, CallEnded)
    assert (tmp_path / "modal_call.json").exists()


def test_interrupt_ends_the_remote_call(dataset: Dataset, tmp_path: Path) -> None:
    client = LocalModal(tmp_path / "modal")
    endless = TRAIN.model_copy(update={"steps": 1_000_000})

    def interrupt(row: dict[str, Any]) -> None:
        assert client.runs("fc-0000")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on_modal(dataset, MODEL, endless, COMPUTE, tmp_path / "run", interrupt, client)
    deadline = time.monotonic() + 5
    while client.runs("fc-0000") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not client.runs("fc-0000")
    assert not (tmp_path / "run" / "modal_call.json").exists()


def test_cancel_that_fails_keeps_the_call_and_the_interrupt(
    replay: Replay, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    replay.outcome = TimeoutError()

    def offline(call_id: str) -> None:
        raise modal_errors.ConnectionError("no route")

    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "cancel", offline)
    with pytest.raises(KeyboardInterrupt):
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, interrupt, replay)
    assert "modal app stop tinycats" in caplog.text
    assert (tmp_path / "modal_call.json").exists()


def test_damaged_download_is_refused_and_mended(replay: Replay, dataset: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    def damaged(path: str) -> Iterator[bytes]:
        yield b"\0" + b"".join(LocalModal.read(replay, path))[1:] if path.endswith("ema.safetensors") else b""

    monkeypatch.setattr(replay, "read", damaged)
    with pytest.raises(ComputeError, match=r"ema\.safetensors arrived damaged.*download it again"):
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay)
    assert [path.name for path in tmp_path.iterdir()] == ["modal_call.json"]
    monkeypatch.undo()
    assert train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay).is_intact()


# ---- what can go wrong with a call


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (modal_errors.OutputExpiredError(), r"no longer knows the result of call fc-0000; run the same command"),
        (modal_errors.NotFoundError("no such call"), r"no longer knows the result of call fc-0000"),
        (modal_errors.FunctionTimeoutError("x"), r"stopped after compute\.timeout_hours = 24; run the same command"),
        (RuntimeError("CUDA error:\n  bus"), r"failed: RuntimeError: CUDA error: bus; see `modal app logs tinycats`"),
        (TimeoutError("read of /data"), r"failed: TimeoutError: read of /data"),
        (modal_errors.RemoteError("killed, out of memory"), r"failed: killed, out of memory"),
        (modal_errors.InternalFailure("worker lost"), r"failed: worker lost"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_call_that_is_over_says_why_and_is_forgotten(
    replay: Replay, dataset: Dataset, tmp_path: Path, outcome: Exception, message: str
) -> None:
    replay.outcome = outcome
    with pytest.raises(CallEnded, match=message) as caught:
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # the next run starts a new call


def test_error_that_the_body_returns(replay: Replay, dataset: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(replay, "poll", lambda call_id, seconds: {"error": "the loss is not finite at step 7"})
    with pytest.raises(ComputeError, match="training on Modal failed: the loss is not finite at step 7"):
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_training_is_refused(replay: Replay, dataset: Dataset, tmp_path: Path) -> None:
    train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path, client=replay)
    other = TRAIN.model_copy(update={"seed": 5})
    with pytest.raises(ComputeError, match=r"modal_call\.json belongs to another training \(call fc-0000\)"):
        train_on_modal(dataset, MODEL, other, COMPUTE, tmp_path, client=replay)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("GTX-1080", r"compute\.gpu is 'GTX-1080'; allowed: T4, L4, .*H100"),
        ("H100:4", r"compute\.gpu is 'H100:4' but compute\.processes is 1; there must be a process for each GPU"),
        ("H100:", r"compute\.gpu is 'H100:' but"),
        ("h100:1", None),
    ],
)
def test_gpu_is_checked_before_anything(replay: Replay, gpu: str, message: str | None) -> None:
    compute = COMPUTE.model_copy(update={"gpu": gpu})
    if message is None:
        assert remote.check_compute(compute, replay) == "nowhere"
        return
    with pytest.raises(ComputeError, match=message):
        remote.check_compute(compute, replay)


# ---- credentials


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MODAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("modal.config._user_config", {})  # what ~/.modal.toml held when modal was imported


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize(
    ("token_id", "secret", "message"),
    [
        (None, None, r"^no Modal credentials: .* are not set .*run `modal token new`, or set MODAL_TOKEN_ID and"),
        ("", "", r"^no Modal credentials"),
        ("ak-123", None, r"^half of the Modal token is missing: no MODAL_TOKEN_SECRET"),
        (None, "as-topsecret", r"^half of the Modal token is missing: no MODAL_TOKEN_ID"),
        ("hunter2", "as-topsecret", r"^malformed Modal token: MODAL_TOKEN_ID must be 'ak-'"),
        ("ak-123", "topsecret", r"^malformed Modal token: MODAL_TOKEN_SECRET must be 'as-'"),
        ("ak-123", "as-topsecret\n", r"^malformed Modal token: MODAL_TOKEN_SECRET"),
        ("'ak-123'", "'as-topsecret'", r"^malformed Modal token: MODAL_TOKEN_ID"),
    ],
)
def test_unusable_tokens_are_told_apart_without_asking(
    monkeypatch: pytest.MonkeyPatch, token_id: str | None, secret: str | None, message: str
) -> None:
    if token_id is not None:
        monkeypatch.setenv("MODAL_TOKEN_ID", token_id)
    if secret is not None:
        monkeypatch.setenv("MODAL_TOKEN_SECRET", secret)
    with pytest.raises(ComputeError, match=message) as caught:
        check_credentials()
    assert "\n" not in str(caught.value)
    assert "topsecret" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_unreadable_configuration_file_is_named_but_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "modal.toml"
    path.write_text("[default]\ntoken_id = ak-123\ntoken_secret = as-topsecret\n")
    done = subprocess.run(
        [sys.executable, "-c", "from tinycats_core.remote import check_credentials; check_credentials()"],
        env={"MODAL_CONFIG_PATH": str(path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"ComputeError: {path} is not a Modal configuration file" in done.stderr
    assert "topsecret" not in done.stdout + done.stderr


# ---- the thin methods, against a server


FUNCTION = api_pb2.FunctionHandleMetadata(function_name="train_generator", supported_input_formats=[api_pb2.DATA_FORMAT_PICKLE])


class Server(ModalClientBase):
    """As much of Modal's control plane as a training needs. `answers` overrides answers, `asked` keeps requests."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    async def _answer(self, name: str, stream: Any, usual: Any) -> None:
        self.asked[name] = await stream.recv_message()
        answer = self.answers.get(name, usual)
        if answer == "nothing":
            await asyncio.sleep(60)
        if isinstance(answer, grpclib.Status):
            raise grpclib.GRPCError(answer, "said the server")
        await stream.send_message(answer)

    async def ClientHello(self, stream: Any) -> None:
        await self._answer("ClientHello", stream, api_pb2.ClientHelloResponse())

    async def FunctionGet(self, stream: Any) -> None:
        function = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction()])
        usual = api_pb2.FunctionGetResponse(function_id="fu-1", handle_metadata=FUNCTION, function=function)
        await self._answer("FunctionGet", stream, usual)

    async def FunctionBindParams(self, stream: Any) -> None:
        usual = api_pb2.FunctionBindParamsResponse(bound_function_id="fu-2", handle_metadata=FUNCTION)
        await self._answer("FunctionBindParams", stream, usual)

    async def FunctionMap(self, stream: Any) -> None:
        item = api_pb2.FunctionPutInputsResponseItem(input_id="in-1")
        usual = api_pb2.FunctionMapResponse(function_call_id="fc-1", pipelined_inputs=[item])
        await self._answer("FunctionMap", stream, usual)

    async def FunctionGetOutputs(self, stream: Any) -> None:
        await self._answer("FunctionGetOutputs", stream, api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=1))

    async def FunctionCallCancel(self, stream: Any) -> None:
        from google.protobuf.empty_pb2 import Empty

        await self._answer("FunctionCallCancel", stream, Empty())

    async def VolumeGetOrCreate(self, stream: Any) -> None:
        await self._answer("VolumeGetOrCreate", stream, api_pb2.VolumeGetOrCreateResponse(volume_id="vo-1"))

    async def VolumeListFiles(self, stream: Any) -> None:
        entry = api_pb2.FileEntry(path="datasets/abc/images.safetensors", size=7)
        await self._answer("VolumeListFiles", stream, api_pb2.VolumeListFilesResponse(entries=[entry]))

    async def VolumeGetFile2(self, stream: Any) -> None:
        await self._answer("VolumeGetFile2", stream, grpclib.Status.NOT_FOUND)

    async def MountPutFile(self, stream: Any) -> None:
        await self._answer("MountPutFile", stream, api_pb2.MountPutFileResponse(exists=True))

    async def VolumePutFiles(self, stream: Any) -> None:
        from google.protobuf.empty_pb2 import Empty

        await self._answer("VolumePutFiles", stream, Empty())


Server.__abstractmethods__ = frozenset()  # the calls that nobody makes need no answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, no_credentials: None) -> Iterator[Server]:
    """A loopback server that speaks Modal's protocol, and credentials for it."""
    service = Server()  # pyright: ignore[reportAbstractUsage]
    loop, port = asyncio.new_event_loop(), []
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        grpc = grpclib.server.Server([service])
        await grpc.start("127.0.0.1", 0)
        port.append(grpc._server.sockets[0].getsockname()[1])  # pyright: ignore
        started.set()
        await stop.wait()
        grpc.close()
        await grpc.wait_closed()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()], daemon=True)
    thread.start()
    assert started.wait(10)
    monkeypatch.setenv("MODAL_SERVER_URL", f"http://127.0.0.1:{port[0]}")
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-123")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-topsecret")
    yield service
    modal.Client.from_env().close()
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def test_accepted_token(server: Server) -> None:
    assert check_credentials() == "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
    assert "ClientHello" in server.asked


def test_rejected_token(server: Server) -> None:
    server.answers["ClientHello"] = grpclib.Status.UNAUTHENTICATED
    with pytest.raises(ComputeError, match=r"^Modal rejected the token from MODAL_TOKEN_ID and .*modal token new"):
        check_credentials()


def test_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["ClientHello"] = "nothing"
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.3)
    with pytest.raises(ModalUnreachable, match=r"did not answer within 0 s; check the network"):
        check_credentials()


def test_app_that_is_not_deployed(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    server.answers["FunctionGet"] = grpclib.Status.NOT_FOUND
    with pytest.raises(ComputeError, match=r"no app 'tinycats' .*run `modal deploy deployments/modal_app\.py`"):
        train_on_modal(dataset, MODEL, TRAIN, COMPUTE, tmp_path)
    assert "VolumePutFiles" not in server.asked
    assert list(tmp_path.iterdir()) == []


def test_spawn_carries_the_configuration(server: Server) -> None:
    compute = ComputeConfig(gpu="L40S", timeout_hours=2.5, retries=3)
    assert ModalClient().spawn({"run": "abc"}, compute) == "fc-1"
    options = server.asked["FunctionBindParams"].function_options
    assert (options.resources.gpu_config.gpu_type, options.resources.gpu_config.count) == ("L40S", 1)
    assert options.timeout_secs == 9000
    assert (options.retry_policy.retries, options.retry_policy.initial_delay_ms) == (3, 0)
    assert server.asked["FunctionMap"].function_id == "fu-2"


def test_poll_and_cancel(server: Server) -> None:
    client = ModalClient()
    with pytest.raises(TimeoutError) as caught:
        client.poll("fc-1", 0.0)
    assert caught.value.args == ()
    server.answers["FunctionGetOutputs"] = api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=0)
    with pytest.raises(modal_errors.OutputExpiredError):
        client.poll("fc-1", 0.0)
    failure = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, exception="too long")
    outputs = [api_pb2.FunctionGetOutputsItem(result=failure)]
    server.answers["FunctionGetOutputs"] = api_pb2.FunctionGetOutputsResponse(outputs=outputs)
    with pytest.raises(modal_errors.FunctionTimeoutError):
        client.poll("fc-1", 0.0)
    client.cancel("fc-1")
    assert server.asked["FunctionCallCancel"].function_call_id == "fc-1"
    assert server.asked["FunctionCallCancel"].terminate_containers


def test_volumes(server: Server, tmp_path: Path) -> None:
    client = ModalClient()
    assert client.list_data("datasets/abc") == {"images.safetensors": 7}
    assert server.asked["VolumeGetOrCreate"].deployment_name == "tinycats-data"
    server.answers["VolumeListFiles"] = grpclib.Status.NOT_FOUND
    assert client.list_data("datasets/abc") == {}
    with pytest.raises(FileNotFoundError):
        list(client.read("runs/abc/log.jsonl"))
    assert server.asked["VolumeGetOrCreate"].deployment_name == "tinycats-outputs"
    (tmp_path / "manifest.json").write_text("{}")
    client.upload({"datasets/abc/manifest.json": tmp_path / "manifest.json"})
    put = server.asked["VolumePutFiles"]
    assert [file.filename for file in put.files] == ["datasets/abc/manifest.json"]
    assert put.files[0].sha256_hex == sha256_of(tmp_path / "manifest.json")
