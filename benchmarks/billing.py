"""Whether what a run on Modal records is what it is billed, and whether the cost cap holds.

    python -m benchmarks.billing [--quick]

Seeded runs with random GPUs, regions, cores, memory, caps, steps, checkpoints and preemptions go through `jobs.perform` and
its meter, on a clock that is advanced instead of waited for. The work is made up: steps that take time and checkpoints that
are written. A bill of the same price list counts each container from its start to its end, with what no meter sees: the last
commit. A container that starts with next to nothing of the budget left exceeds the cap by the time until its code runs, which
counts as an excess here. Two more runs, none with --quick, train a tiny network in real processes of the stand-in, on the real
clock.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.common import command_line, positive, report

QUICK_RUNS = 10
CENT = 0.01


class Clock:
    """Time that passes when it is told to, and the timers that wait for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.now]:
            timer.cancel()
            timer.call()

    def timer(self, seconds: float, function: Any, arguments: list[Any]) -> "Timer":
        return Timer(self, self.now + seconds, lambda: function(*arguments))


class Timer:
    """A `threading.Timer` on a clock."""

    def __init__(self, clock: Clock, due: float, call: Any):
        self.clock, self.due, self.call, self.daemon = clock, due, call, True

    def start(self) -> None:
        self.clock.timers.append(self)

    def cancel(self) -> None:
        if self in self.clock.timers:
            self.clock.timers.remove(self)


class Run:
    """One run: its settings, drawn from a seed, and what it has come to. `billed` is in seconds, a container each."""

    def __init__(self, root: Path, dataset: Any, seed: int):
        from deployments.fake_modal import Claims
        from tinycats_core.compute.gpus import GPUS, usd_per_second
        from tinycats_core.compute.remote import classifier_job
        from tinycats_core.config import ClassifierConfig, ComputeConfig

        self.draw, self.clock, self.root = random.Random(seed), Clock(), root
        draw = self.draw
        model = draw.choice(list(GPUS))
        count = draw.choice((1, 1, 2, 4))
        self.compute = ComputeConfig(
            where="modal",
            device="cpu",
            gpu=f"{model}:{count}",
            processes=count,
            cpu=draw.choice((1.0, 2.0, 8.0)),
            memory_gb=draw.choice((4.0, 16.0, 64.0)),
            region=draw.choice((None, "us", "eu", "us-east", "ap-south")),
        )
        self.steps, self.step_seconds = draw.randrange(200, 2000), draw.uniform(0.05, 2.0)
        self.checkpoint_every = draw.randrange(20, 200)
        self.rate = usd_per_second(self.compute) or 0.0
        whole = self.steps * self.step_seconds * self.rate
        self.limit = whole * draw.uniform(0.3, 1.5)
        self.compute = self.compute.model_copy(update={"max_cost_usd": self.limit})
        self.preempt_at = set(draw.sample(range(1, self.steps), draw.randrange(4)))
        self.request = classifier_job(dataset, ClassifierConfig()).request(self.compute)
        self.claims, self.done, self.billed = Claims(root / "claims"), 0, []
        self.claims.folder.mkdir(parents=True)

    def work(self, request: Any, dataset: Any, folder: Path, on_log: Any, stop: Any) -> Any:
        """Take steps until the end or until asked to stop; write a checkpoint then, and every so many steps."""
        from tinycats_core.errors import TrainingError
        from tinycats_core.files import sha256_of
        from tinycats_core.records import Weights

        (folder / "checkpoints").mkdir(exist_ok=True)
        while self.done < self.steps and not stop.requested:
            self.clock.pass_by(self.step_seconds)
            self.done += 1
            if self.done in self.preempt_at:
                self.preempt_at.remove(self.done)
                signal.raise_signal(signal.SIGINT)
            if self.done % self.checkpoint_every == 0 or stop.requested:
                self.clock.pass_by(self.draw.uniform(0.1, 1.0))
            if self.done % 20 == 0:
                on_log({"step": self.done})
        if self.done < self.steps:
            raise TrainingError(f"stopped at step {self.done}")
        (folder / "classifier.safetensors").write_bytes(b"weights")
        path = folder / "classifier.safetensors"
        return Weights(path=path, sha256=sha256_of(path), kind="classifier", step=self.done)

    def attempt(self) -> Any:
        """Run one container, and return its result; None after a preemption."""
        from tinycats_core.compute import jobs

        since = self.clock.now
        self.clock.pass_by(self.draw.uniform(2.0, 20.0))  # until the code is imported

        def keep(must: bool) -> None:
            self.clock.pass_by(self.draw.uniform(0.02, 0.2))

        site = jobs.Site(
            self.root / "data", self.root / "outputs", lambda: None, keep, "fc-0", self.claims, lambda call: False, since
        )
        try:
            return jobs.perform(self.request, site, self.work)
        except KeyboardInterrupt:
            return None
        finally:
            self.billed.append(self.clock.now - since)
            self.clock.pass_by(self.draw.uniform(0.0, 600.0))  # until the next container; nobody pays for it

    def finish(self) -> tuple[float, float]:
        """Run to the end. Returns the dollars that are recorded and those that are billed."""
        from tinycats_core.compute import budget, jobs
        from tinycats_core.files import read_json

        now = SimpleNamespace(monotonic=lambda: self.clock.now)
        with ExitStack() as stack:
            stack.enter_context(patch.object(budget, "time", now))
            stack.enter_context(patch.object(jobs, "time", now))
            stack.enter_context(patch.object(budget, "threading", SimpleNamespace(Timer=self.clock.timer)))
            while self.attempt() is None:
                pass
        (meter,) = (self.root / "outputs" / "runs").glob("*/meter.json")
        return read_json(meter)["usd"], sum(self.billed) * self.rate

    def excess_seconds(self) -> float:
        """Return for how many seconds the run was billed after its cap was reached."""
        return max(0.0, sum(self.billed) - self.limit / self.rate)

    @property
    def interval(self) -> float:
        """The seconds between two checkpoints, with the longest writing of one."""
        return self.checkpoint_every * self.step_seconds + 1.0


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if every cap held and every bill was recorded."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.billing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=positive, default=100, help="simulated runs (default: 100)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} simulated runs, and no real process")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = simulate(Path(scratch), QUICK_RUNS if given.quick else given.runs)
        if not given.quick:
            figures |= real(Path(scratch) / "real")
    figures["seconds"] = round(time.perf_counter() - started, 1)
    report("billing", figures, given)
    return 0 if figures["over_cap"] == 0 and figures["largest_bill_difference_usd"] < CENT else 1


def tiny_dataset(root: Path) -> Any:
    """Prepare a data set on the data volume of `root`."""
    from tinycats_core.compute import jobs

    config = {"source": "toycats", "image_size": 16, "toy_train_per_class": 2, "toy_val_per_class": 1, "toy_test_per_class": 1}
    return jobs.prepare_data(root / "data", config)


def simulate(scratch: Path, runs: int) -> dict[str, Any]:
    """Return the figures of runs on clocks that are advanced."""
    dataset = tiny_dataset(scratch)
    over, excess, difference, containers, capped, priciest = 0, 0.0, 0.0, 0, 0, 0.0
    for seed in range(runs):
        root = scratch / f"run-{seed}"
        root.mkdir()
        (root / "data").symlink_to(scratch / "data")
        run = Run(root, dataset, seed)
        recorded, billed = run.finish()
        difference = max(difference, abs(recorded - billed))
        excess = max(excess, run.excess_seconds())
        over += run.excess_seconds() > run.interval
        capped += run.done < run.steps
        containers += len(run.billed)
        priciest = max(priciest, run.rate)
    return {
        "runs": runs,
        "over_cap": over,
        "largest_excess_seconds": round(excess, 3),
        "largest_bill_difference_usd": round(difference, 6),
        "stopped_at_cap": capped,
        "containers": containers,
        "largest_usd_per_second": round(priciest, 6),
    }


def real(root: Path) -> dict[str, Any]:
    """Return the largest difference of two real runs of the stand-in, one of them preempted."""
    from deployments.fake_modal import FakeModal
    from tinycats_core.compute.remote import generator_job
    from tinycats_core.config import ComputeConfig, ModelConfig, TrainConfig
    from tinycats_core.files import read_json

    modal, dataset, differences = FakeModal(root), tiny_dataset(root), []
    compute = ComputeConfig(where="modal", device="cpu", gpu="A100", region="us-east", cpu=4.0)
    for seed in (0, 1):
        model = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
        train = TrainConfig(steps=200, batch_size=4, warmup_steps=1, checkpoint_every=50, sample_every=200, log_every=10, seed=seed)
        job = generator_job(dataset, model, train)
        call = modal.spawn("train_generator", job.request(compute), compute)
        if seed:
            while not modal.log(call):
                time.sleep(0.05)
            modal.preempt(call)
        modal.poll(call, 300)
        recorded = read_json(root / "outputs" / "runs" / job.run / "meter.json")["usd"]
        differences.append(abs(recorded - modal.bill(call)))
    return {"real_runs": len(differences), "largest_real_bill_difference_usd": round(max(differences), 6)}


if __name__ == "__main__":
    sys.exit(main())
