"""Modal in a folder, at the seam of `ModalClient`, for tests and for `benchmarks.modal_faults`.

Real: the functions of `deployments/modal_app.py`, a process for each attempt, the signals and kills that end it, and that a
call outlives the process that started it. Imitated: volumes, on which an attempt sees what was committed when it began or last
reloaded, and others see what it has committed; retries, restarts after a preemption, claims, results, outages, and a deployment
of other code.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from modal import exception as modal_errors

from deployments import modal_app as app
from tinycats_core.compute import jobs, modal_client, remote
from tinycats_core.compute.gpus import usd_per_second
from tinycats_core.config import ComputeConfig
from tinycats_core.errors import TinycatsError
from tinycats_core.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 30.0  # from the signal of a preemption to the kill


class Nursery:
    """A process that has imported everything, and forks a process for each call: PyTorch is imported once, not for each call.

    It ends with the process that started it. The calls do not.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def start(self, root: Path, call: Path) -> int:
        """Start a call. Returns the id of its process, which leads a group of its own."""
        with self.lock:
            if not self.process:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", "from deployments.fake_modal import nurse; nurse()"],
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                atexit.register(self.process.communicate)  # closes its stdin and waits for it
            assert self.process.stdin
            assert self.process.stdout
            self.process.stdin.write(json.dumps([str(root), str(call), dict(os.environ)]) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())


_nursery = Nursery()


class FakeModal(modal_client.ModalClient):
    """Modal in the folder `root`. All objects on one folder, in whatever process, see the same calls and volumes.

    A file `offline` in the folder is an outage, and a file `revision` says which code is deployed.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.root = root
        for name in ("data", "outputs", "claims", "calls"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def calls(self, function: str | None = None) -> list[str]:
        """Return the ids of all calls ever made, or of those of one function."""
        made = sorted((self.root / "calls").glob("*/request.json"))
        return [path.parent.name for path in made if function in (None, read_json(path)["function"])]

    def check_credentials(self) -> str:
        self._reach()
        return "nowhere"

    def check(self, dataset_sha256: str | None = None) -> dict[str, str | None]:
        self._reach()
        deployed = self.root / "revision"
        found = app.with_app(jobs.check(self.root / "data", dataset_sha256))
        return found | ({"revision": deployed.read_text()} if deployed.is_file() else {})

    def list_data(self, folder: str) -> dict[str, int]:
        self._reach()
        return {path.name: path.stat().st_size for path in (self.root / "data" / folder).glob("*")}

    def upload(self, files: Mapping[str, Path]) -> None:
        self._reach()
        for name, local in files.items():
            target = self.root / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(local, target)

    def spawn(self, function: str, request: jobs.Request, compute: ComputeConfig) -> str:
        self._reach()
        call = self._new_call()
        limits = {"retries": compute.retries, "timeout": compute.timeout_hours * 3600, "usd_per_second": usd_per_second(compute)}
        write_json(call / "request.json", {"function": function, "request": request, **limits})
        (call / "pid").write_text(str(_nursery.start(self.root, call)))
        return call.name

    def poll(self, call_id: str, seconds: float) -> jobs.Result:
        self._reach()
        outcome = self.root / "calls" / call_id / "outcome.json"
        deadline = time.monotonic() + seconds
        while not outcome.is_file():
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(0.02)
            self._reach()
        match read_json(outcome):
            case {"result": result}:
                return jobs.parse_result(result)
            case {"raised": text}:
                raise RuntimeError(text)
            case {"killed": text}:
                raise modal_errors.RemoteError(text)
            case other:
                raise modal_errors.FunctionTimeoutError(other["timeout"])

    def cancel(self, call_id: str) -> None:
        self._reach()
        call = self.root / "calls" / call_id
        write_json(call / "outcome.json", {"killed": "cancelled"})
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(int((call / "pid").read_text()), signal.SIGKILL)

    def read(self, path: str) -> Iterator[bytes]:
        self._reach()
        yield (self.root / "outputs" / path).read_bytes()

    def list_outputs(self, folder: str) -> list[tuple[str, int, float]]:
        self._reach()
        top = self.root / "outputs" / folder
        return [(str(path.relative_to(top)), path.stat().st_size, path.stat().st_mtime) for path in _files(top)]

    def remove_outputs(self, folder: str) -> None:
        self._reach()
        shutil.rmtree(self.root / "outputs" / folder)

    def claims(self) -> "Claims":
        self._reach()
        return Claims(self.root / "claims")

    def bill(self, call_id: str) -> float:
        """Return the dollars that the containers of a call have cost, as far as they have ended."""
        call = self.root / "calls" / call_id
        seconds = read_json(call / "billed.json") if (call / "billed.json").is_file() else []
        return sum(seconds) * read_json(call / "request.json")["usd_per_second"]

    # ---- what Modal does on its own

    def preempt(self, call_id: str, number: int = signal.SIGINT) -> None:
        """Send a signal to the container of a call; another container resumes when this one has ended."""
        container = self.container(call_id)
        assert container, f"{call_id} has no container"
        pid, attempt = container
        (self.root / "calls" / call_id / f"attempt-{attempt}" / "preempted").touch()
        os.kill(pid, number)

    def container(self, call_id: str) -> tuple[int, int] | None:
        """Return process id and number of the attempt that runs now, None between two attempts and after the last one."""
        path = self.root / "calls" / call_id / "container.json"
        try:
            pid, attempt = read_json(path)
            os.kill(pid, 0)
        except (TinycatsError, ProcessLookupError):
            return None
        return pid, attempt

    def log(self, call_id: str) -> list[dict[str, Any]]:
        """Return the log of the training as the container sees it: more than what is committed."""
        attempts = sorted((self.root / "calls" / call_id).glob("attempt-*"), key=lambda path: int(path.name.partition("-")[2]))
        run = read_json(self.root / "calls" / call_id / "request.json")["request"]["run"]
        path = attempts[-1] / "outputs" / jobs.run_folder(run) / "log.jsonl" if attempts else None
        lines = path.read_text().splitlines(keepends=True) if path and path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def processes(self, call_id: str) -> list[int]:
        """Return the ids of all processes of a call that are alive."""
        group = (self.root / "calls" / call_id / "pid").read_text()
        listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        return [int(pid) for pid, of_group, state in rows if of_group == group and not state.startswith("Z")]

    def _new_call(self) -> Path:
        number = len(self.calls())
        while True:
            call = self.root / "calls" / f"fc-{number:04d}"
            try:
                call.mkdir()
                return call
            except FileExistsError:  # another process was quicker
                number += 1

    def _reach(self) -> None:
        if (self.root / "offline").exists():
            raise modal_errors.ConnectionError("no route to the server")


class Claims:
    """A `modal.Dict` as files: a key is taken by whoever is first to link its file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> Any:
        path = self.folder / quote(key, safe="")
        return read_json(path) if path.is_file() else None

    def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        written = write_json(self.folder / f".{os.getpid()}-{threading.get_ident()}", value)
        try:
            os.link(written, self.folder / quote(key, safe=""))
        except FileExistsError:
            if skip_if_exists:
                return False
            written.replace(self.folder / quote(key, safe=""))
        written.unlink(missing_ok=True)
        return True


class Mounted:
    """A volume as one container sees it."""

    def __init__(self, committed: Path, path: Path):
        self.committed, self.path = committed, path
        path.mkdir(parents=True)
        self.reload()

    def reload(self) -> None:
        _mirror(self.committed, self.path)

    def commit(self) -> None:
        _mirror(self.path, self.committed)


def install(root: Path) -> FakeModal:
    """Replace Modal by a folder in this process."""
    remote.ModalClient = partial(FakeModal, root)  # pyright: ignore[reportAttributeAccessIssue]
    return FakeModal(root)


def nurse() -> None:
    """Fork a process for each call that a line of stdin names: root, folder of the call, environment."""
    import tinycats_core.evaluation.classifier
    import tinycats_core.training.start  # noqa: F401

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        if os.fork() == 0:
            root, call, environment = json.loads(line)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            print(os.getpid(), flush=True)
            output = os.open(Path(call) / "output.txt", os.O_WRONLY | os.O_CREAT)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, number)
            os.environ.clear()
            os.environ.update(environment)
            supervise(root, call)
            os._exit(0)


def supervise(root: str, call: str) -> None:
    """Run one call as Modal does: start containers until one returns a result, or the retries are used up."""
    folder = Path(call)
    asked = read_json(folder / "request.json")
    attempt = failures = 0
    billed: list[float] = []  # seconds of each container
    while failures <= asked["retries"]:
        attempt += 1
        mounted = folder / f"attempt-{attempt}"
        mounted.mkdir()
        pid = os.fork()  # everything is imported, nothing has been computed
        if pid == 0:
            _contain(Path(root), folder, mounted)
        write_json(folder / "container.json", [pid, attempt])
        started = time.monotonic()
        outcome = _await(pid, mounted, asked["timeout"])
        billed.append(round(time.monotonic() - started, 3))
        write_json(folder / "billed.json", billed)
        if (mounted / "preempted").exists() and "result" not in outcome:
            continue
        failures += 1
        if "result" in outcome:
            break
    write_json(folder / "outcome.json", outcome)


def _contain(root: Path, call: Path, mounted: Path) -> NoReturn:
    """Run the function of a call once, as in a container, and end the process."""
    app.data_volume = Mounted(root / "data", mounted / "data")  # pyright: ignore[reportAttributeAccessIssue]
    app.outputs_volume = Mounted(root / "outputs", mounted / "outputs")  # pyright: ignore[reportAttributeAccessIssue]
    app.DATA, app.OUTPUTS = mounted / "data", mounted / "outputs"
    app.claims = Claims(root / "claims")  # pyright: ignore[reportAttributeAccessIssue]
    app.modal.current_function_call_id = lambda: call.name
    modal_client.ModalClient = partial(FakeModal, root)  # pyright: ignore[reportAttributeAccessIssue]
    jobs.KEEP_SECONDS = 0.2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started all this in the background
    asked = read_json(call / "request.json")
    code = 130
    try:
        outcome = {"result": getattr(app, asked["function"]).local(asked["request"])}
        write_json(mounted / "outcome.json", outcome)
        code = 0
    except Exception as error:
        traceback.print_exc()
        write_json(mounted / "outcome.json", {"raised": str(error)})
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _await(pid: int, mounted: Path, timeout: float) -> dict[str, Any]:
    """Return how an attempt ended. A preempted one is killed when its grace is over."""
    started, told = time.monotonic(), None
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.02)
        now = time.monotonic()
        told = told or (now if (mounted / "preempted").exists() else None)
        if now - started > timeout:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"timeout": f"the attempt took more than {timeout:g} s"}
        if told and now - told > GRACE_SECONDS:
            os.kill(pid, signal.SIGKILL)
    if (mounted / "outcome.json").is_file():
        return read_json(mounted / "outcome.json")
    code = os.waitstatus_to_exitcode(ended[1])
    return {"killed": f"the container was killed by signal {-code}" if code < 0 else f"the container exited with {code}"}


def _mirror(source: Path, target: Path) -> None:
    """Mirror a folder, nearly at once: new files first, so that a kill in between loses none.

    Hidden files are left out: they are incomplete.
    """
    ready: list[tuple[Path, Path]] = []
    for path in sorted(_files(source), key=lambda path: path.name == "result.json"):
        copy = target / path.relative_to(source)
        if not copy.is_file() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
            shutil.copy2(path, part)
            ready.append((part, copy))
    for part, copy in ready:
        part.replace(copy)
    for path in _files(target):
        if not (source / path.relative_to(target)).exists():
            path.unlink()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
