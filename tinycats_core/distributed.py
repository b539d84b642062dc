"""Training on several devices of one machine: a process a device, started as `torchrun` starts them.

    python -m tinycats_core.distributed REQUEST.json          # what `start` runs: the agent that starts the ranks

Every rank draws the whole batch and takes its own part of it, so that the number of ranks changes a run by rounding only.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.device import pick_device
from tinycats_core.errors import ComputeError, TinycatsError, TrainingError
from tinycats_core.files import read_json, write_json
from tinycats_core.records import Dataset
from tinycats_core.run_folder import RunFolder
from tinycats_core.signals import stop_signals

logger = logging.getLogger("tinycats.training")

POLL_SECONDS = 0.2
AGREE = timedelta(minutes=30)  # how long a rank waits for the others: rank 0 may be drawing or writing


class RankLost(TrainingError):
    """Another rank has gone, or the connection to it."""


def rank() -> int:
    """Return the rank of this process, 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(number: int) -> int:
    """Return the largest of all ranks' numbers, so that they decide alike. Raises RankLost."""
    if ranks() == 1:
        return number
    tensor = torch.tensor(number)
    try:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control())
    except RuntimeError as error:
        if not is_connection_lost(error):
            raise
        raise RankLost(f"another rank is gone ({_first_line(error)})") from None
    return int(tensor)


def is_connection_lost(error: RuntimeError) -> bool:
    """Return whether an error of a step means that another rank does not answer any more."""
    return ranks() > 1 and (isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection")))


def average(tensor: Tensor) -> Tensor:
    """Return the mean over all ranks, without waiting for a GPU."""
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def check_processes(device: str, processes: int) -> None:
    """Raise ComputeError where there are fewer GPUs than processes, which would have to share one."""
    if pick_device(device).type == "cuda" and processes > torch.cuda.device_count():
        devices = torch.cuda.device_count()
        raise ComputeError(f"compute.processes is {processes} but this machine has {devices} CUDA devices; give at most that many")


def start(
    dataset: Dataset,
    model: ModelConfig,
    train: TrainConfig,
    folder: Path,
    device: str,
    processes: int,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train in this many processes, and return when they have finished.

    A signal is passed on to them, and they stop with a checkpoint. When this process is killed they stop as well.

    Raises:
        ComputeError: there are not that many devices.
        TrainingError: a rank failed or was killed; names it, and the checkpoint that the run goes on from.
    """
    check_processes(device, processes)
    if train.batch_size % processes:
        raise TrainingError(f"train.batch_size is {train.batch_size}, not divisible by compute.processes {processes}")
    run = RunFolder(folder)
    request, outcome = folder / "ranks.json", folder / "ranks-failure.json"
    outcome.unlink(missing_ok=True)
    write_json(
        request,
        {
            "dataset": dataset.model_dump(mode="json"),
            "model": model.model_dump(mode="json"),
            "train": train.model_dump(mode="json"),
            "folder": str(folder),
            "device": pick_device(device).type,
            "processes": processes,
        },
    )
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    seen = max((row["step"] for row in run.log()), default=0)
    with open(folder / "ranks.log", "ab") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "tinycats_core.distributed", str(request)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which passes it on
        )
    with stop_signals() as stop:
        try:
            while agent.poll() is None:
                time.sleep(POLL_SECONDS)
                seen = _pass_on(run, seen, on_log)
                if stop:
                    agent.send_signal(signal.SIGTERM)
                    agent.wait()
        except BaseException:
            agent.send_signal(signal.SIGTERM)
            agent.wait()
            raise
    if stop:  # whoever handles the signal here let the program go on
        raise TrainingError(f"stopped; run the same command to go on from {run.last_good()}")
    _pass_on(run, seen, on_log)
    if agent.returncode:
        failure = read_json(outcome) if outcome.is_file() else {"message": f"the agent ended with {agent.returncode}"}
        raise TrainingError(
            f"{failure['message']}. Run the same command: it goes on from {run.last_good()} ({folder / 'ranks.log'} holds "
            "what the ranks wrote)"
        )


def main(arguments: list[str] | None = None) -> int:
    """Be the agent, or with RANK in the environment one of its ranks. Returns the exit status."""
    [path] = sys.argv[1:] if arguments is None else arguments
    request = read_json(Path(path))
    _follow_parent()
    return _be_rank(request) if "TORCHELASTIC_RUN_ID" in os.environ else _be_agent(request, path)


def _be_agent(request: dict[str, Any], path: str) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(  # what `torchrun --standalone --nproc-per-node N` amounts to
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request["processes"],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"tinycats-{os.getpid()}",
        max_restarts=0,  # when a rank fails the others have 30 s for a last checkpoint, then they are killed
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "tinycats_core.distributed", path)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        first = min(error.failures.items(), key=lambda item: (item[1].exitcode in (1, -signal.SIGTERM), item[1].timestamp))
        number, failure = first  # one that was killed rather than one that failed because the other was gone
        said = Path(request["folder"]) / f"rank-{number}.json"
        if failure.exitcode < 0:
            message = f"rank {number} of {request['processes']} was ended by {signal.Signals(-failure.exitcode).name}"
        elif said.is_file():
            message = read_json(said)["message"].rstrip(".")
        else:
            message = f"rank {number} of {request['processes']} ended with {failure.exitcode}"
        write_json(Path(request["folder"]) / "ranks-failure.json", {"message": message})
        return 1
    return 0


def _be_rank(request: dict[str, Any]) -> int:
    from tinycats_core import training

    folder, number = Path(request["folder"]), int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format=f"rank {number}: %(message)s")
    said = folder / f"rank-{number}.json"
    said.unlink(missing_ok=True)
    if request["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if request["device"] == "cuda" else "gloo", timeout=AGREE)
        training.train(
            Dataset.model_validate(request["dataset"]),
            ModelConfig.model_validate(request["model"]),
            TrainConfig.model_validate(request["train"]),
            folder,
            request["device"],
        )
    except TinycatsError as error:
        write_json(said, {"time": datetime.now(UTC).isoformat(), "message": str(error)})
        logger.error("%s", error)
        return 1
    dist.destroy_process_group()
    return 0


def _pass_on(run: RunFolder, seen: int, on_log: Callable[[dict[str, Any]], None] | None) -> int:
    for row in run.log():
        if row["step"] > seen:
            seen = row["step"]
            if on_log:
                on_log(row)
    return seen


def _follow_parent() -> None:
    """Ask this process to stop when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


_control_group: list[Any] = []


def _control() -> Any:
    """Return the group for decisions: over the CPU, so that they wait for no GPU."""
    if dist.get_backend() == "gloo":
        return None
    if not _control_group:
        _control_group.append(dist.new_group(backend="gloo", timeout=AGREE))
    return _control_group[0]


def _first_line(error: BaseException) -> str:
    return json.dumps(str(error).splitlines()[0])[1:-1] if str(error) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
