"""Training on Modal, seen from here: credentials, upload, one call that outlives this process, verified download.

What runs there is `deployments/modal_app.py`. Every call to Modal goes through `ModalClient`.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from tinycats_core.config import ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.errors import ComputeError
from tinycats_core.files import atomic_path, check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Checkpoint, Dataset

APP = "tinycats"
FUNCTION = "train_generator"
DATA_VOLUME = "tinycats-data"
OUTPUTS_VOLUME = "tinycats-outputs"
# https://modal.com/docs/guide/gpu
GPUS = (
    *("T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000"),
    *("H100", "H100!", "H200", "B200", "B200+"),
)
ANSWER_SECONDS = 20.0  # Modal's own client would try for a minute before it gives up
SET_BOTH = "run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"

logger = logging.getLogger("tinycats.remote")


class ModalUnreachable(ComputeError):
    """Modal does not answer, or not now. What was started there goes on; asking again may help."""


class CallEnded(ComputeError):
    """The remote call is over and there is no result."""


class ModalClient:
    """Every call that the project makes to Modal, each as thin as can be: the seam at which tests stand in for Modal.

    The methods raise what Modal's library raises. Paths are relative to the root of a volume.

    Args:
        function: the remote function, when it is not the deployed one (as in `modal run`).
    """

    def __init__(self, function: Any = None):
        self.function = function

    def check_credentials(self) -> str:
        return check_credentials()

    def check_deployed(self) -> None:
        self._function().hydrate()

    def list_data(self, folder: str) -> dict[str, int]:
        """Return name and bytes of each file in a folder of the data volume; none when there is no such folder."""
        from modal.exception import NotFoundError

        try:
            return {PurePosixPath(entry.path).name: entry.size for entry in self._volume(DATA_VOLUME).listdir(folder)}
        except (NotFoundError, FileNotFoundError):
            return {}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Put files on the data volume, all of them or none."""
        with self._volume(DATA_VOLUME).batch_upload(force=True) as batch:
            for remote, local in files.items():
                batch.put_file(local, remote)

    def spawn(self, request: dict[str, Any], compute: ComputeConfig) -> str:
        """Start the remote function and return the id of the call."""
        import modal

        function = self._function().with_options(
            gpu=compute.gpu,
            timeout=round(compute.timeout_hours * 3600),
            retries=modal.Retries(initial_delay=0.0, max_retries=compute.retries),
        )
        return function.spawn(request).object_id

    def poll(self, call_id: str, seconds: float) -> dict[str, Any]:
        """Return the result of a call, or raise what it raised. Raises an empty TimeoutError while it runs."""
        import modal

        return modal.FunctionCall.from_id(call_id).get(timeout=seconds)

    def cancel(self, call_id: str) -> None:
        import modal

        modal.FunctionCall.from_id(call_id).cancel(terminate_containers=True)

    def read(self, path: str) -> Iterator[bytes]:
        """Yield a file of the outputs volume, as last committed. Raises FileNotFoundError."""
        yield from self._volume(OUTPUTS_VOLUME).read_file(path)

    def _function(self) -> Any:
        import modal

        return self.function or modal.Function.from_name(APP, FUNCTION)

    def _volume(self, name: str) -> Any:
        import modal

        return modal.Volume.from_name(name, create_if_missing=True)


def check_credentials() -> str:
    """Ask Modal's server once whether it accepts the credentials, and return where they come from.

    Raises:
        ModalUnreachable: the server did not answer.
        ComputeError: the credentials are missing, malformed or rejected. No message holds a secret.
    """
    try:
        from modal.config import config, user_config_path
    except ImportError:
        raise ComputeError("compute.where is 'modal' but modal is not installed; run `pip install modal`") from None
    except Exception:  # modal reads its file when imported; its message may quote the secret, so it is not repeated
        path = os.environ.get("MODAL_CONFIG_PATH", "~/.modal.toml")
        raise ComputeError(f"{path} is not a Modal configuration file; delete it and {SET_BOTH}") from None
    if any(config.get(f"oauth_{name}") for name in ("refresh_token", "client_id", "client_secret", "jwt_key")):
        source = "MODAL_OAUTH_* variables"
    else:
        source = _check_token(config.get("token_id"), config.get("token_secret"), str(user_config_path))
    with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop already
        pool.submit(asyncio.run, _hello(source)).result()
    return source


def check_compute(compute: ComputeConfig, client: ModalClient | None = None) -> str:
    """Check before any work that Modal will train: the GPU's name, the credentials, the deployed app.

    Returns where the credentials come from. Raises ComputeError.
    """
    client = client or ModalClient()
    _check_gpu(compute)
    source = client.check_credentials()
    with _explained():
        client.check_deployed()
    return source


def train_on_modal(
    dataset: Dataset,
    model: ModelConfig,
    train: TrainConfig,
    compute: ComputeConfig,
    folder: Path,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    client: ModalClient | None = None,
) -> Checkpoint:
    """Train a generator on Modal and return its EMA weights, as `training.train` does here.

    The call's id is kept in `<folder>/modal_call.json` from its start on: after this process was killed, the same
    command attaches to the same call. An interrupt or any other error here cancels the call; a later run goes on from
    the last checkpoint on the outputs volume. The folder gets `ema.safetensors`, the other averages and `raw.safetensors`,
    `log.jsonl`, `diary.jsonl` and `samples/`.

    Args:
        on_log: called with each row of the remote log, in order.

    Raises:
        CallEnded: the call failed or expired.
        ModalUnreachable: Modal does not answer; the call goes on.
        ComputeError: the call cannot be started or asked, or what it made does not arrive intact.
    """
    client = client or ModalClient()
    check_writable(folder)
    state = folder / "modal_call.json"
    run = run_id(dataset, model, train)
    call = read_json(state) if state.is_file() else {}
    if call and call["run"] != run:
        raise ComputeError(f"{state} belongs to another training (call {call['call_id']}); use another folder or delete that file")
    if "checkpoint" in call and (checkpoint := Checkpoint.model_validate(call["checkpoint"])).is_intact():
        return checkpoint
    if call:
        client.check_credentials()
        logger.info("attached to call %s, which an earlier run started", call["call_id"])
    else:
        check_compute(compute, client)
        request = {
            "run": run,
            "dataset": dataset.verify().model_dump(mode="json", exclude={"path"}),
            "model": model.model_dump(mode="json"),
            "train": train.model_dump(mode="json"),
            "device": "cuda" if compute.device == "auto" else compute.device,  # never a GPU's price for a CPU's work
            "processes": compute.processes,
        }
        with _explained():
            _upload(client, dataset)
            call = {"run": run, "call_id": client.spawn(request, compute)}
        write_json(state, call)
        logger.info("started call %s on %s", call["call_id"], compute.gpu)
    result = _follow(client, call["call_id"], run, compute, state, on_log)
    for name, sha256 in result["files"].items():
        _download(client, f"{run_folder(run)}/{name}", folder / name, sha256)
    checkpoint = Checkpoint.model_validate(result["checkpoint"]).in_folder(folder)
    write_json(state, call | {"checkpoint": checkpoint.model_dump(mode="json")})
    return checkpoint


def run_id(dataset: Dataset, model: ModelConfig, train: TrainConfig) -> str:
    """Return the name of a training: equal for equal data and settings, so that a new call goes on from its files."""
    return digest_of([dataset.content, model.digest(), train.digest()])[:16]


def data_folder(dataset_sha256: str) -> str:
    """Return where a data set lies on the data volume."""
    return f"datasets/{dataset_sha256}"


def run_folder(run: str) -> str:
    """Return where a training lies on the outputs volume."""
    return f"runs/{run}"


def _check_token(token_id: str | None, secret: str | None, config_path: str) -> str:
    """Return where the token comes from. Raises ComputeError without ever naming its value."""
    if not token_id and not secret:
        raise ComputeError(
            f"no Modal credentials: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set and {config_path} has no active "
            f"profile with a token; {SET_BOTH}"
        )
    names = {"MODAL_TOKEN_ID": (token_id, "ak-"), "MODAL_TOKEN_SECRET": (secret, "as-")}
    sources = []
    for name, (value, prefix) in names.items():
        key = name.removeprefix("MODAL_").lower()
        source = name if name in os.environ else f"{key} in {config_path}"
        sources.append(source)
        if not value:
            raise ComputeError(f"half of the Modal token is missing: no {name} and no {key} in {config_path}; {SET_BOTH}")
        if not re.fullmatch(rf"{prefix}[A-Za-z0-9_-]+", value):
            raise ComputeError(
                f"malformed Modal token: {source} must be '{prefix}' and then letters and digits, without spaces or "
                f"quotes; {SET_BOTH}"
            )
    return " and ".join(sources)


async def _hello(source: str) -> None:
    import modal

    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            client = await modal.Client.from_env.aio()  # pyright: ignore[reportFunctionMemberAccess]
            await client.hello.aio()
    except TimeoutError:
        raise ModalUnreachable(
            f"Modal's server did not answer within {ANSWER_SECONDS:.0f} s; check the network connection and run again"
        ) from None
    except modal.exception.AuthError:
        raise ComputeError(f"Modal rejected the token from {source}; {SET_BOTH}") from None
    except modal.exception.InvalidError as error:
        raise ComputeError(f"Modal's configuration is not usable: {_one_line(error)}") from None
    except (modal.Error, OSError) as error:
        raise ModalUnreachable(
            f"Modal's server cannot be reached ({_one_line(error)}); check the network connection and run again"
        ) from None


def _check_gpu(compute: ComputeConfig) -> None:
    gpu = compute.gpu
    name, colon, count = gpu.partition(":")
    if name.upper() not in GPUS:
        raise ComputeError(f"compute.gpu is {gpu!r}; allowed: {', '.join(GPUS)}")
    if (count if colon else "1") != str(compute.processes):
        raise ComputeError(
            f"compute.gpu is {gpu!r} but compute.processes is {compute.processes}; there must be a process for each GPU, as in "
            f"'{name}:2' and 2"
        )


def _upload(client: ModalClient, dataset: Dataset) -> None:
    """Put the data set on the data volume under its digest, unless it is there."""
    folder = data_folder(dataset.sha256)
    files = [dataset.path, dataset.path.with_name("manifest.json")]
    if not files[1].is_file():
        raise ComputeError(f"{files[1]} is gone; delete {dataset.path.parent} and prepare the data again")
    present = client.list_data(folder)
    if any(present.get(file.name) != file.stat().st_size for file in files):
        client.upload({f"{folder}/{file.name}": file for file in files})
        logger.info("uploaded the data set to %s/%s", DATA_VOLUME, folder)


def _follow(
    client: ModalClient,
    call_id: str,
    run: str,
    compute: ComputeConfig,
    state: Path,
    on_log: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Wait for the call, passing on its log. Leaves `state` only while the call can still be attached to."""
    seen = 0
    try:
        while True:
            result = _poll(client, call_id, compute)
            for row in _read_log(client, run):
                if on_log and row["step"] > seen:  # the log is cut back when a preempted attempt resumes
                    seen = row["step"]
                    on_log(row)
            if result is None:
                continue
            if "error" in result:
                raise CallEnded(f"training on Modal failed: {result['error']}")
            return result
    except CallEnded:
        state.unlink()
        raise
    except ComputeError:  # Modal cannot be asked now: the call goes on
        raise
    except BaseException:
        try:
            client.cancel(call_id)
            state.unlink()
        except Exception as error:
            logger.error("call %s could not be cancelled (%s); run `modal app stop %s`", call_id, _one_line(error), APP)
        raise


def _poll(client: ModalClient, call_id: str, compute: ComputeConfig) -> dict[str, Any] | None:
    """Return the result of the call, None while it runs. Raises ModalUnreachable, or CallEnded."""
    from modal import exception as modal_errors

    ended = modal_errors.RemoteError, modal_errors.InternalFailure, modal_errors.ExecutionError
    again = "run the same command to go on from its last checkpoint"
    try:
        return client.poll(call_id, compute.poll_seconds)
    except (modal_errors.OutputExpiredError, modal_errors.NotFoundError):
        raise CallEnded(f"Modal no longer knows the result of call {call_id}; {again}") from None
    except modal_errors.FunctionTimeoutError:
        raise CallEnded(f"training on Modal was stopped after compute.timeout_hours = {compute.timeout_hours:g}; {again}") from None
    except Exception as error:
        if type(error) is TimeoutError and not error.args:
            return None
        if isinstance(error, _outages()) and not isinstance(error, (*ended, TimeoutError)):
            raise ModalUnreachable(
                f"Modal does not answer ({_one_line(error)}); call {call_id} goes on there, run the same command to "
                "attach to it again"
            ) from None
        kind = "" if isinstance(error, ended) else f"{type(error).__name__}: "
        raise CallEnded(f"training on Modal failed: {kind}{_one_line(error)}; see `modal app logs {APP}`, then {again}") from None


def _read_log(client: ModalClient, run: str) -> list[dict[str, Any]]:
    try:
        text = b"".join(_read(client, f"{run_folder(run)}/log.jsonl")).decode()
    except FileNotFoundError:
        return []  # nothing has been committed yet
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _download(client: ModalClient, remote: str, path: Path, sha256: str) -> None:
    """Bring one file here. Raises ComputeError, and leaves nothing, when it is not the file that was made there."""
    if path.is_file() and sha256_of(path) == sha256:
        return
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                file.writelines(_read(client, remote))
        except FileNotFoundError:
            raise ComputeError(
                f"{remote} is gone from the volume {OUTPUTS_VOLUME}; delete {path.parent} and run the same command"
            ) from None
        found = sha256_of(temporary)
        if found != sha256:
            raise ComputeError(
                f"{remote} arrived damaged from Modal: its sha256 is {found[:12]}…, there it was {sha256[:12]}…; "
                "run the same command to download it again"
            )


def _read(client: ModalClient, path: str) -> Iterator[bytes]:
    with _explained():
        yield from client.read(path)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what Modal's library raises into one line."""
    from modal import exception as modal_errors

    try:
        yield
    except modal_errors.NotFoundError:
        raise ComputeError(
            f"Modal has no app {APP!r} with the function {FUNCTION!r}; run `modal deploy deployments/modal_app.py`"
        ) from None
    except modal_errors.AuthError:
        raise ComputeError(f"Modal rejected the token; {SET_BOTH}") from None
    except (modal_errors.InvalidError, modal_errors.PermissionDeniedError) as error:
        raise ComputeError(f"Modal refused: {_one_line(error)}") from None
    except _outages() as error:
        raise ModalUnreachable(f"Modal does not answer ({_one_line(error)}); run the same command again") from None


def _outages() -> tuple[type[Exception], ...]:
    """Return what Modal's library lets through when the network or the server fails."""
    import aiohttp
    import grpclib.exceptions
    import modal

    network = ConnectionError, TimeoutError, aiohttp.ClientError
    return modal.Error, grpclib.GRPCError, grpclib.exceptions.StreamTerminatedError, *network


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
