"""Train in two processes and in one and compare the loss; then kill one of two and see what is left.

python -m benchmarks.ranks
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, report

STEPS = 100


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where the ranks agree and nothing is lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network, under a minute")
    given = parser.parse_args(arguments)

    from tinycats_core.data.preparation import prepare
    from tinycats_core.presets import resolve
    from tinycats_core.training.run_folder import read_log
    from tinycats_core.training.start import train

    quick = {"width": 32, "depth": 2, "heads": 2} if given.quick else {}
    data = {"toy_train_per_class": 8, "toy_test_per_class": 2}
    changes = {"steps": STEPS, "log_every": 1, "sample_every": STEPS, "checkpoint_every": STEPS, "accumulation": 2}
    config = resolve("smoke", {"data": data, "model": quick, "train": changes})
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        dataset = prepare(config.data, Path(scratch) / "data")
        for processes in (1, 2):
            train(dataset, config.model, config.train, Path(scratch) / str(processes), "cpu", processes=processes)
        one, two = (read_log(Path(scratch) / str(processes)) for processes in (1, 2))
        figures = {
            "steps": len(two),
            "max_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)),
            "loss_first": one[0]["loss"],
            "loss_last": one[-1]["loss"],
        }
        for number in (0, 1):
            figures[f"killed_rank_{number}"] = kill(Path(scratch) / f"killed-{number}", number, dataset, config)
    report("ranks", figures, given)
    killed = [figures["killed_rank_0"], figures["killed_rank_1"]]
    return 0 if figures["max_loss_difference"] <= 1e-5 and all(found["steps_lost"] == 0 for found in killed) else 1


def kill(folder: Path, number: int, dataset: Any, config: Any) -> dict[str, Any]:
    """Kill a rank of two in the middle of a training without checkpoints, and return how it ended."""
    from tinycats_core.errors import TrainingError
    from tinycats_core.training.run_folder import RunFolder, read_log
    from tinycats_core.training.start import train

    changes = {"steps": 10**6, "checkpoint_every": 10**6, "sample_every": 10**6, "accumulation": 1}
    settings = type(config.train).model_validate(config.train.model_dump() | changes)
    killed: list[float] = []

    def on_log(row: dict[str, Any]) -> None:
        if row["step"] >= 20 and not killed:
            killed.append(time.perf_counter())
            os.kill(pid_of(folder, number), signal.SIGKILL)

    try:
        train(dataset, config.model, settings, folder, "cpu", on_log, processes=2)
    except TrainingError as error:
        seconds = time.perf_counter() - killed[0]
        step = int(RunFolder(folder).last_good().removeprefix("step-").removesuffix(".safetensors"))
        lost = read_log(folder)[-1]["step"] - step
        message = str(error).replace(str(folder), "…")
        return {"seconds_until_it_ended": round(seconds, 1), "checkpoint": step, "steps_lost": max(0, lost), "message": message}
    raise AssertionError("the training went on without a rank")


def pid_of(folder: Path, number: int) -> int:
    """Return the process of a rank that trains in this folder (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue  # it has ended
        if str(folder / "ranks.json").encode() in command and f"\0RANK={number}\0".encode() in environment:
            return int(process.name)
    raise RuntimeError(f"rank {number} does not run")


if __name__ == "__main__":
    sys.exit(main())
