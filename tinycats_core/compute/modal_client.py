"""Every request that the project makes to Modal, and the meaning of its errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tinycats_core.compute import modal_auth
from tinycats_core.compute.gpus import parse_gpu
from tinycats_core.compute.jobs import DEPLOY, Claims, Request, Result, parse_result
from tinycats_core.compute.modal_auth import SET_BOTH, one_line
from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError, ModalUnreachable, TinycatsError

APP = "tinycats"
DATA_VOLUME = "tinycats-data"
OUTPUTS_VOLUME = "tinycats-outputs"
CLAIMS = "tinycats-claims"
CHECK_SECONDS = 600.0  # for a container without a GPU to start and answer


class ModalClient:
    """The seam at which tests replace Modal: each method is thin and raises what Modal's library raises.

    Paths are relative to the root of a volume.

    Args:
        functions: the remote functions by name, if they are not the deployed ones (as in `modal run`).
    """

    def __init__(self, functions: Mapping[str, Any] | None = None):
        self.functions = functions or {}

    def check_credentials(self) -> str:
        return modal_auth.check_credentials()

    def check(self, dataset_sha256: str | None = None) -> dict[str, str | None]:
        """Return `revision` and `app`, of the deployed code, and `data`, the sha256 of a data set as it lies on the volume."""
        return self._function("check").spawn(dataset_sha256).get(timeout=CHECK_SECONDS)

    def list_data(self, folder: str) -> dict[str, int]:
        """Return name and bytes of each file in a folder of the data volume; none if there is no such folder."""
        return {name: size for name, size, _ in self._list(DATA_VOLUME, folder)}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Put files on the data volume, all of them or none."""
        with self._volume(DATA_VOLUME).batch_upload(force=True) as batch:
            for remote, local in files.items():
                batch.put_file(local, remote)

    def spawn(self, function: str, request: Request, compute: ComputeConfig) -> str:
        """Start a remote function and return the id of the call."""
        import modal

        configured = self._function(function).with_options(
            **resources(compute),
            timeout=round(compute.timeout_hours * 3600),
            retries=modal.Retries(initial_delay=0.0, max_retries=compute.retries),
            secrets=secrets(compute),
        )
        return configured.spawn(request).object_id

    def poll(self, call_id: str, seconds: float) -> Result:
        """Return the result of a call, or raise what it raised. Raises an empty TimeoutError while it runs."""
        import modal

        return parse_result(modal.FunctionCall.from_id(call_id).get(timeout=seconds))

    def cancel(self, call_id: str) -> None:
        import modal

        modal.FunctionCall.from_id(call_id).cancel(terminate_containers=True)

    def read(self, path: str) -> Iterator[bytes]:
        """Yield a file of the outputs volume, as last committed. Raises FileNotFoundError."""
        yield from self._volume(OUTPUTS_VOLUME).read_file(path)

    def list_outputs(self, folder: str) -> list[tuple[str, int, float]]:
        """Return path, bytes and modification time of each file below a folder of the outputs volume."""
        return self._list(OUTPUTS_VOLUME, folder, recursive=True)

    def remove_outputs(self, folder: str) -> None:
        """Remove a folder of the outputs volume."""
        self._volume(OUTPUTS_VOLUME).remove_file(folder, recursive=True)

    def claims(self) -> Claims:
        """Return the mapping in which calls claim runs."""
        import modal

        return modal.Dict.from_name(CLAIMS, create_if_missing=True)

    def _function(self, name: str) -> Any:
        import modal

        return self.functions.get(name) or modal.Function.from_name(APP, name)

    def _list(self, volume: str, folder: str, recursive: bool = False) -> list[tuple[str, int, float]]:
        from modal.exception import NotFoundError

        try:
            entries = self._volume(volume).listdir(folder, recursive=recursive)
        except (NotFoundError, FileNotFoundError):
            return []
        root = PurePosixPath("/") / folder
        return [(str((PurePosixPath("/") / entry.path).relative_to(root)), entry.size, float(entry.mtime)) for entry in entries]

    def _volume(self, name: str) -> Any:
        import modal

        return modal.Volume.from_name(name, create_if_missing=True)


def resources(compute: ComputeConfig) -> dict[str, Any]:
    """Return what a container gets, as Modal's functions take it: of cores and memory as much as is requested, and no more."""
    _, count = parse_gpu(compute.gpu)
    cores, memory = compute.cpu * count, round(compute.memory_gb * count * 1024)  # in MiB
    return {"gpu": compute.gpu, "cpu": (cores, cores), "memory": (memory, memory), "region": compute.region}


def secrets(compute: ComputeConfig) -> list[Any] | None:
    """Return the secrets that compute.secrets names, as Modal's functions take them."""
    import modal

    return [modal.Secret.from_name(name) for name in compute.secrets] or None


def is_over(client: ModalClient, call_id: str) -> bool:
    """Return whether a call has ended in any way. Raises what Modal's library raises if Modal does not answer."""
    try:
        client.poll(call_id, 0.0)
    except Exception as error:
        meaning = meaning_of(error)
        if meaning in ("silent", "refused"):
            raise
        return meaning != "running"
    return True


def meaning_of(error: Exception) -> Literal["running", "forgotten", "too long", "failed", "refused", "silent"]:
    """Return what an error of `poll` means for the call.

    The call is `running`; it is over and its result `forgotten`, or it took `too long`, or it `failed`; Modal `refused` to
    answer, which is permanent; or Modal is `silent`, which may pass. A remote function raises only RuntimeError
    (`jobs.perform`).
    """
    from modal import exception as modal_errors

    if type(error) is TimeoutError and not error.args:
        return "running"
    if isinstance(error, modal_errors.OutputExpiredError | modal_errors.NotFoundError):
        return "forgotten"
    if isinstance(error, modal_errors.FunctionTimeoutError):
        return "too long"
    if isinstance(error, modal_errors.AuthError | modal_errors.PermissionDeniedError | modal_errors.InvalidError):
        return "refused"
    ended = modal_errors.RemoteError, modal_errors.InternalFailure, modal_errors.ExecutionError
    return "silent" if isinstance(error, outages()) and not isinstance(error, ended) else "failed"


@contextmanager
def explained(runs_code: bool = False) -> Iterator[None]:
    """Turn errors of the Modal library into one line. `runs_code`: the app's code runs meanwhile, so an error may be its own."""
    from modal import exception as modal_errors

    try:
        yield
    except TinycatsError:
        raise
    except modal_errors.NotFoundError:
        raise ComputeError(f"Modal has no app {APP!r} that this version can call; {DEPLOY}") from None
    except modal_errors.AuthError:
        raise ComputeError(f"Modal rejected the token; {SET_BOTH}") from None
    except (modal_errors.InvalidError, modal_errors.PermissionDeniedError) as error:
        raise ComputeError(f"Modal refused: {one_line(error)}") from None
    except Exception as error:
        if runs_code and meaning_of(error) in ("failed", "too long"):
            raise ComputeError(f"the app on Modal failed: {one_line(error)}; see `modal app logs {APP}`") from None
        if isinstance(error, outages()):
            raise ModalUnreachable(f"Modal does not answer ({one_line(error)}); run the same command again") from None
        raise


def outages() -> tuple[type[Exception], ...]:
    """Return the errors that Modal's library raises if the network or the server fails."""
    import aiohttp
    import grpclib.exceptions
    import modal

    network = ConnectionError, TimeoutError, aiohttp.ClientError
    return modal.Error, grpclib.GRPCError, grpclib.exceptions.StreamTerminatedError, *network
