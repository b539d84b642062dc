"""The thin methods against a loopback server, and what Modal's errors mean."""

from collections.abc import Iterator
from pathlib import Path

import grpclib
import pytest
from modal import exception as modal_errors
from modal._serialization import serialize
from modal_proto import api_pb2
from modal_server import Server, loopback_modal

from tinycats_core.compute.modal_client import ModalClient, explained, is_over, meaning_of
from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError, EvaluationError, ModalUnreachable, TinycatsError
from tinycats_core.files import sha256_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with loopback_modal(monkeypatch) as running:
        yield running


def test_spawn_carries_the_configuration(server: Server) -> None:
    compute = ComputeConfig(gpu="L40S:2", cpu=3, memory_gb=20, timeout_hours=2.5, retries=3, region="eu", secrets=("proxy",))
    assert ModalClient().spawn("train_generator", {"run": "abc"}, compute) == "fc-1"
    assert server.asked["FunctionGet"].object_tag == "train_generator"
    options = server.asked["FunctionBindParams"].function_options
    assert (options.resources.gpu_config.gpu_type, options.resources.gpu_config.count) == ("L40S", 2)
    assert (options.resources.milli_cpu, options.resources.milli_cpu_max) == (6000, 6000)
    assert (options.resources.memory_mb, options.resources.memory_mb_max) == (40 * 1024, 40 * 1024)
    assert options.timeout_secs == 9000
    assert (options.retry_policy.retries, options.retry_policy.initial_delay_ms) == (3, 0)
    assert list(options.scheduler_placement.regions) == ["eu"]
    assert list(options.secret_ids) == ["st-1"]
    assert server.asked["SecretGetOrCreate"].deployment_name == "proxy"
    assert server.asked["FunctionMap"].function_id == "fu-2"


def test_check_is_answered_by_the_deployed_code(server: Server) -> None:
    answer = {"revision": "abc", "data": None}
    success = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS, data=serialize(answer))
    output = api_pb2.FunctionGetOutputsItem(result=success, data_format=api_pb2.DATA_FORMAT_PICKLE)
    server.answers["FunctionGetOutputs"] = api_pb2.FunctionGetOutputsResponse(outputs=[output])
    assert ModalClient().check() == answer
    assert server.asked["FunctionGet"].object_tag == "check"


def test_app_that_is_not_deployed(server: Server) -> None:
    server.answers["FunctionGet"] = grpclib.Status.NOT_FOUND
    with pytest.raises(ComputeError, match=r"no app 'tinycats' .*run `modal deploy deployments/modal_app\.py`"), explained():
        ModalClient().check()


def test_a_claim_is_taken_only_where_there_is_none(server: Server) -> None:
    claims = ModalClient().claims()
    assert claims.get("abc/0") is None
    assert not claims.put("abc/0", "fc-1", skip_if_exists=True)
    assert server.asked["DictUpdate"].if_not_exists
    assert server.asked["DictGetOrCreate"].deployment_name == "tinycats-claims"


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


def test_old_outputs_are_listed_and_removed(server: Server) -> None:
    client = ModalClient()
    assert client.list_outputs("datasets") == [("abc/images.safetensors", 7, 1_700_000_000.0)]
    assert server.asked["VolumeListFiles"].recursive
    client.remove_outputs("runs/abc")
    asked = server.asked["VolumeRemoveFile"]
    assert (asked.path, asked.recursive) == ("runs/abc", True)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (TimeoutError(), "running"),
        (TimeoutError("read of /data"), "silent"),
        (modal_errors.OutputExpiredError(), "forgotten"),
        (modal_errors.NotFoundError("no such call"), "forgotten"),
        (modal_errors.FunctionTimeoutError("x"), "too long"),
        (RuntimeError("CUDA error"), "failed"),
        (modal_errors.RemoteError("killed"), "failed"),
        (modal_errors.InternalFailure("worker lost"), "failed"),
        (modal_errors.AuthError("revoked"), "refused"),
        (modal_errors.PermissionDeniedError("not yours"), "refused"),
        (modal_errors.ConnectionError("no route"), "silent"),
        (modal_errors.ServiceError("overloaded"), "silent"),
        (modal_errors.ResourceExhaustedError("slow down"), "silent"),
        (grpclib.GRPCError(grpclib.Status.UNAVAILABLE), "silent"),
        (ConnectionResetError(), "silent"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_an_error_says_of_a_call(error: Exception, meaning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    assert meaning_of(error) == meaning
    client = ModalClient()
    monkeypatch.setattr(client, "poll", fail)
    if meaning in ("silent", "refused"):
        with pytest.raises(type(error)):
            is_over(client, "fc-1")
    else:
        assert is_over(client, "fc-1") == (meaning != "running")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (modal_errors.AuthError("x"), ComputeError, "rejected the token; run `modal token new`"),
        (modal_errors.InvalidError("no such region"), ComputeError, "Modal refused: no such region"),
        (modal_errors.ExecutionError("Request failed with status 500"), ModalUnreachable, "does not answer .*status 500"),
        (modal_errors.ConnectionError("no route"), ModalUnreachable, r"does not answer \(no route\); run the same command again"),
        (TimeoutError(), ModalUnreachable, "does not answer"),
    ],
)
def test_errors_are_one_line(error: Exception, kind: type[ComputeError], message: str) -> None:
    with pytest.raises(ComputeError, match=message) as caught, explained():
        raise error
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (modal_errors.RemoteError("image build failed"), ComputeError, "failed: image build failed; see `modal app logs tinycats`"),
        (modal_errors.FunctionTimeoutError("600 s"), ComputeError, "the app on Modal failed: 600 s"),
        (ModuleNotFoundError("No module named\n 'numpy'"), ComputeError, "the app on Modal failed: No module named 'numpy'"),
        (modal_errors.ConnectionError("no route"), ModalUnreachable, "does not answer"),
        (TimeoutError(), ModalUnreachable, "does not answer"),  # no container has started in time
        (modal_errors.NotFoundError("x"), ComputeError, "no app 'tinycats'"),
        (EvaluationError("too few images"), EvaluationError, "^too few images$"),
    ],
)
def test_errors_of_code_that_runs_there_are_one_line(error: Exception, kind: type[TinycatsError], message: str) -> None:
    with pytest.raises(TinycatsError, match=message) as caught, explained(runs_code=True):
        raise error
    assert type(caught.value) is kind
