"""Start a training: in this process, or in one process for each device of this machine.

python -m tinycats_core.training.start REQUEST.json          # what `start` runs: the agent that starts the ranks
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.device import fast_arithmetic, pick_device
from tinycats_core.errors import ComputeError, TinycatsError, TrainingError
from tinycats_core.files import check_writable, read_json, write_json
from tinycats_core.records import Dataset, Trained
from tinycats_core.signals import Stop, stop_on_signals
from tinycats_core.source_code import code_of
from tinycats_core.tensors import read_header, read_safetensors
from tinycats_core.training import loop, ranks
from tinycats_core.training.loop import OnLog, train_here
from tinycats_core.training.ranks import AGREE, RankLost
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.state import record_of, weight_paths

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

logger = logging.getLogger("tinycats.training")

POLL_SECONDS = 0.2
SHOWN = (loop.draw_sheet,)  # what training only shows: an edit of it changes no weights
FAILURE, OUTPUT = "ranks-failure.json", "ranks.log"  # in a training's folder: why the ranks ended, and what they printed


def train(
    dataset: Dataset,
    model: ModelConfig,
    config: TrainConfig,
    folder: Path,
    device: str = "auto",
    on_log: OnLog | None = None,
    processes: int = 1,
    stop: Stop | None = None,
    code: str | None = None,
) -> Trained:
    """Train a generator, or resume from the folder's last checkpoint, and return its weights.

    The folder gets `ema.safetensors` (of the first decay), `ema-<decay>.safetensors` (of the others), the same as they were
    at each earlier snapshot (`step-<step>-ema.safetensors`), `raw.safetensors` (the last weights, without averaging),
    `log.jsonl` (a line per log interval), `diary.jsonl` (each start, stop and incident), `checkpoints/` (the last five) and
    `samples/` (a grid from the EMA weights every `sample_every` steps). With `stop_at`, the weights of its step stand for those
    of the end. A finished folder is returned as it is; one of fewer steps is continued.

    Args:
        on_log: called with each row of the log: step, steps, loss, lr, images_per_s, grad_norm, skipped, device_memory_mb.
        processes: how many devices of this machine share the batch (`start`).
        stop: a requested stop ends the training after the current step, with a checkpoint and a TrainingError.
        code: the digest of the code to which the weights belong; None: of the present code (`training_code`).

    Raises:
        CheckpointError: the folder or `resume_from` belongs to another architecture, configuration, code or data set, or
            `resume_from` does not exist.
        TrainingError: the loss is not finite, memory or disk do not suffice, another process trains in the folder, or `stop`
            was requested.
    """
    folder = Path(folder)
    check_writable(folder)
    run_folder, identity = RunFolder(folder), _identity(dataset, model, config, code or training_code())
    if _is_finished(folder, config):
        run_folder.claim(identity)
        return record_of(folder, config)
    if processes > 1:
        start(dataset, model, config, folder, device, processes, on_log, stop, code)
        return record_of(folder, config)
    with run_folder.hold() if ranks.rank() == 0 else nullcontext(), fast_arithmetic(pick_device(device)):
        return train_here(dataset, model, config, run_folder, identity, pick_device(device), on_log, stop or Stop())


def training_code() -> str:
    """Return the digest of the code that decides which weights a training makes."""
    return code_of(train, apart_from=SHOWN).digest


def _identity(dataset: Dataset, model: ModelConfig, config: TrainConfig, code: str) -> dict[str, Any]:
    """Return everything that decides which weights a training makes."""
    return {
        "code": code,
        "model": model.model_dump(mode="json"),
        "train": config.model_dump(mode="json"),
        "dataset": dataset.content,
    }


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    """Return whether all weights of a training are there. Raises CheckpointError for damaged ones: they are no result."""
    paths = weight_paths(folder, config)
    if not all(path.is_file() and read_header(path, "generator")["step"] == step for path, step in paths.items()):
        return False
    for path in paths:
        read_safetensors(path, "generator")
    return True


def check_processes(device: str, processes: int) -> None:
    """Raise ComputeError if there are fewer GPUs than processes, which would have to share one."""
    kind = pick_device(device).type
    if kind == "mps" and processes > 1:
        raise ComputeError(f"compute.processes is {processes}, and an Apple computer has one MPS device; set it to 1")
    if kind == "cuda" and processes > torch.cuda.device_count():
        devices = torch.cuda.device_count()
        raise ComputeError(f"compute.processes is {processes} but this machine has {devices} CUDA devices; give at most that many")


def start(
    dataset: Dataset,
    model: ModelConfig,
    config: TrainConfig,
    folder: Path,
    device: str,
    processes: int,
    on_log: OnLog | None = None,
    stop: Stop | None = None,
    code: str | None = None,
) -> None:
    """Train in several processes, and return when they have finished.

    A requested stop is passed on to them, and they stop with a checkpoint. If this process is killed they stop as well.

    Raises:
        ComputeError: there are not that many devices.
        TrainingError: a rank failed or was killed, or a stop was requested; names the checkpoint that the run resumes from.
    """
    check_processes(device, processes)
    if config.batch_size % processes:
        raise TrainingError(f"train.batch_size is {config.batch_size}, not divisible by compute.processes {processes}")
    request = {
        "dataset": dataset.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "train": config.model_dump(mode="json"),
        "folder": str(folder),
        "device": pick_device(device).type,
        "processes": processes,
        "code": code or training_code(),  # of this process: in the ranks this module is `__main__`
    }
    (folder / FAILURE).unlink(missing_ok=True)
    run = RunFolder(folder)
    seen = max((row["step"] for row in run.log()), default=0)
    agent = _launch(request)
    try:
        while agent.poll() is None and not (stop and stop.requested):
            time.sleep(POLL_SECONDS)
            seen = _pass_on(run, seen, on_log)
    finally:
        agent.send_signal(signal.SIGTERM)  # the ranks stop with a checkpoint; an agent that has ended gets no signal
        agent.wait()
    if stop and stop.requested:
        raise TrainingError(f"stopped; run the same command to resume from {run.last_good()}")
    _pass_on(run, seen, on_log)
    if agent.returncode:
        _raise_failure(run, agent.returncode)


def _launch(request: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the agent, which starts the ranks. What they print is appended to `ranks.log`."""
    folder = Path(request["folder"])
    path = write_json(folder / "ranks.json", request)
    threads = str(max(1, (os.cpu_count() or 1) // request["processes"]))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(folder / OUTPUT, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tinycats_core.training.start", str(path)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which passes it on
        )


def _raise_failure(run: RunFolder, status: int) -> NoReturn:
    path = run.path / FAILURE
    message = read_json(path)["message"] if path.is_file() else f"the agent ended with {status}"
    raise TrainingError(
        f"{message}. Run the same command: it resumes from {run.last_good()} ({run.path / OUTPUT} holds what the ranks printed)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run as the agent, or with RANK in the environment as one of its ranks. Returns the exit status."""
    [path] = sys.argv[1:] if arguments is None else arguments
    request = read_json(Path(path))
    _follow_parent()
    return _be_rank(request) if "TORCHELASTIC_RUN_ID" in os.environ else _be_agent(request, path)


def _be_agent(request: dict[str, Any], path: str) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for number in range(request["processes"]):
        _said(request, number).unlink(missing_ok=True)
    launch = LaunchConfig(  # what `torchrun --standalone --nproc-per-node N` amounts to
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request["processes"],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"tinycats-{os.getpid()}",
        max_restarts=0,  # when a rank fails the others have 30 s for a last checkpoint, then they are killed
    )
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "tinycats_core.training.start", path)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        write_json(Path(request["folder"]) / FAILURE, {"message": _why(error.failures, request)})
        return 1
    return 0


def _why(failures: Mapping[int, "ProcessFailure"], request: dict[str, Any]) -> str:
    """Return why the ranks ended: of the first one, not of those that ended because another was gone.

    When one is gone the others fail within the same second, so the time does not tell which was first. A rank that was killed
    comes before one that has said its error, and that before one that has not: it may have lost the connection at the start.
    """
    told = {number: path for number in failures if (path := _said(request, number)).is_file()}
    said = {number: read_json(path) for number, path in told.items()}

    def order(number: int) -> tuple[bool, bool, bool]:
        code = failures[number].exitcode
        follows = code == -signal.SIGTERM or (number in said and said[number]["follows"])
        return follows, code > 0, number not in said

    number = min(failures, key=order)
    if (code := failures[number].exitcode) < 0:
        return f"rank {number} of {request['processes']} was ended by {signal.Signals(-code).name}"
    return said[number]["message"].rstrip(".") if number in said else f"rank {number} of {request['processes']} ended with {code}"


def _said(request: dict[str, Any], number: int) -> Path:
    """Return the file in which a rank says its error, and whether it follows from that of another rank."""
    return Path(request["folder"]) / f"rank-{number}.json"


def _be_rank(request: dict[str, Any]) -> int:
    folder, number = Path(request["folder"]), int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format=f"rank {number}: %(message)s")
    stop: Stop | None = None
    if request["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if request["device"] == "cuda" else "gloo", timeout=AGREE)
        with stop_on_signals() as stop:
            train(
                Dataset.model_validate(request["dataset"]),
                ModelConfig.model_validate(request["model"]),
                TrainConfig.model_validate(request["train"]),
                folder,
                request["device"],
                stop=stop,
                code=request["code"],
            )
    except TinycatsError as error:
        follows = isinstance(error, RankLost) or bool(stop and stop.requested)  # the agent stops those that are left
        write_json(_said(request, number), {"message": str(error), "follows": follows})
        logger.error("%s", error)
        return 1
    dist.destroy_process_group()
    return 0


def _pass_on(run: RunFolder, seen: int, on_log: OnLog | None) -> int:
    for row in run.log():
        if row["step"] > seen:
            seen = row["step"]
            if on_log:
                on_log(row)
    return seen


def _follow_parent() -> None:
    """Send this process a SIGTERM when its parent is gone: torch's agent reacts to signals alone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
