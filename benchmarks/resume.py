"""Kill a training at random points, again and again, and compare what comes out with a run that was never killed.

python -m benchmarks.resume --kills 50
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, positive, report

CHECKPOINT_EVERY = 20  # steps; a kill falls on every interval, on average
CHILD = """
import sys
from pathlib import Path
from tinycats_core.config import ModelConfig, TrainConfig
from tinycats_core.records import Dataset
from tinycats_core.training.start import train
dataset, model, settings, folder = sys.argv[1:]
def tell(row):
    print(row["step"], flush=True)
train(
    Dataset.model_validate_json(dataset), ModelConfig.model_validate_json(model),
    TrainConfig.model_validate_json(settings), Path(folder), "cpu", tell,
)
"""


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--kills", type=positive, default=50, help="how often to kill the run (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed")
    parser.add_argument("--quick", action="store_true", help="three kills, under a minute")
    given = parser.parse_args(arguments)

    from tinycats_core.data.preparation import prepare
    from tinycats_core.presets import resolve
    from tinycats_core.training.run_folder import RunFolder

    kills = 3 if given.quick else given.kills
    steps = CHECKPOINT_EVERY * (kills + 2)
    config = resolve("smoke", {"data": {"toy_train_per_class": 20, "toy_test_per_class": 4}, "train": {"steps": steps}})
    changes = {"log_every": 1, "checkpoint_every": CHECKPOINT_EVERY, "sample_every": steps}
    settings = type(config.train).model_validate(config.train.model_dump() | changes)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        dataset = prepare(config.data, Path(scratch) / "data")
        command = [sys.executable, "-c", CHILD, *(part.model_dump_json() for part in (dataset, config.model, settings))]
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        started = time.perf_counter()
        subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        unkilled = time.perf_counter() - started
        rng = random.Random(given.seed)
        ends = range(CHECKPOINT_EVERY, steps, CHECKPOINT_EVERY)  # where a checkpoint is written after the step is told of
        others = [step for step in range(1, steps) if step not in ends]
        points = sorted(rng.sample(ends, kills // 3) + rng.sample(others, kills - kills // 3))
        attempts = [kill_at(command, killed, point, rng.uniform(0, 0.1)) for point in points]
        subprocess.run([*command, str(killed)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        figures = {
            "kills": sum(attempt["killed"] for attempt in attempts),
            **compare(killed, whole, attempts),
            "checkpoint_every": CHECKPOINT_EVERY,
            "steps": steps,
            "seconds_unkilled": round(unkilled, 1),
            "kills_inside_a_checkpoint_write": sum(attempt["writing"] for attempt in attempts),
            "files_left_over": len(RunFolder(killed).leftovers()),
        }
    report("resume", figures, given)
    good = figures["resumed"] == kills and figures["bit_identical"] and figures["max_steps_lost"] <= CHECKPOINT_EVERY
    return 0 if good else 1


def kill_at(command: list[str], folder: Path, step: int, delay: float) -> dict[str, Any]:
    """Start or resume the run, and end it by SIGKILL some time after it has told of this step.

    Returns whether it was killed, the first and the last step that it told of, and whether it was writing a checkpoint.
    """
    from tinycats_core.training.run_folder import RunFolder

    process = subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(int(line))
        if told[-1] >= step:
            break
    time.sleep(delay)
    process.kill()
    told += [int(line) for line in process.stdout.read().split()]
    killed = process.wait() < 0
    return {"killed": killed, "first": told[0], "last": told[-1], "writing": bool(RunFolder(folder).leftovers())}


def compare(killed: Path, whole: Path, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often the run went on, the most steps that had to be taken again, and whether all is the same to the bit."""
    from tinycats_core.files import sha256_of
    from tinycats_core.training.run_folder import RunFolder, read_log

    starts = [row["step"] for row in RunFolder(killed).diary() if row["event"] in ("start", "resume")]
    lost = [attempt["last"] - start for attempt, start in zip(attempts, starts[1:], strict=True)]
    curves = [[(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_log(folder)] for folder in (killed, whole)]
    last = max(path.name for path in (whole / "checkpoints").glob("*.safetensors"))
    files = ("ema.safetensors", f"checkpoints/{last}")  # what ships; and raw weights, moments and averages
    return {
        "resumed": len(starts) - 1,
        "bit_identical": curves[0] == curves[1] and all(sha256_of(killed / name) == sha256_of(whole / name) for name in files),
        "max_steps_lost": max(lost),
        "mean_steps_lost": round(sum(lost) / len(lost), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
