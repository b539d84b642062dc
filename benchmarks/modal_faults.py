"""Release a generator that trains on a Modal in a folder, and do to it what Modal and people do: preempt, kill, cancel, cap.

python -m benchmarks.modal_faults

Modal itself takes no part, and no GPU: `deployments/fake_modal.py` says what is real and what is imitated.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import TINY, command_line, positive, report

ORCHESTRATOR = """
import sys
from pathlib import Path
from deployments.fake_modal import install
install(Path(sys.argv[1]))
from flows.release_model import main
sys.exit(main(sys.argv[2:]))
"""
SMALL: dict[str, dict[str, Any]] = TINY | {
    "train": TINY["train"] | {"checkpoint_every": 25, "log_every": 5},
    "export": {"int8": False, "forms": []},
    "compute": {"where": "modal", "device": "cpu", "gpu": "T4", "poll_seconds": 0.2, "patience_minutes": 1},
}
STEPS_TO_PREEMPT = range(1, SMALL["train"]["steps"] - 20)
CAP_SECONDS = 10.0  # of a GPU, which the cost cap allows
CANCEL_BAR = 10.0  # seconds until nothing of a cancelled call is left
LONGEST = 600.0  # seconds that anything here may take


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where nothing was lost, doubled or overspent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modal_faults", description=__doc__)
    parser.add_argument("--preemptions", type=positive, default=10, help="how often the training is preempted (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which it is")
    parser.add_argument("--quick", action="store_true", help="two preemptions, and no second run after the cost cap")
    given = parser.parse_args(arguments)
    if given.preemptions > (most := len(STEPS_TO_PREEMPT)):
        parser.error(f"--preemptions is {given.preemptions}; at most {most} are possible")

    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    preemptions = 2 if given.quick else given.preemptions
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch, prefect_test_harness(server_startup_timeout=120):
        server = str(PREFECT_API_URL.value())
        calm, rough = (Site(Path(scratch) / name, server) for name in ("calm", "rough"))
        try:
            calm.release().finish(0)
            figures = {
                **disturb(rough, calm, preemptions, random.Random(given.seed)),
                **cancel(calm),
                **overspend(calm, go_on=not given.quick),
            }
        finally:
            calm.clear()
            rough.clear()
    figures["seconds"] = round(time.perf_counter() - started, 1)
    report("modal_faults", figures, given)
    good = figures["preemptions"] == preemptions and figures["calls_made"] == 1 and figures["cancel_seconds"] <= CANCEL_BAR
    names = ("published", "bit_identical", "reattached", "cost_stop") + (() if given.quick else ("went_on_after_cost_stop",))
    return 0 if good and all(figures[name] for name in names) else 1


class Site:
    """A Modal, the home of its orchestrators, and where they publish."""

    def __init__(self, folder: Path, server: str):
        from deployments.fake_modal import FakeModal

        self.folder, self.server, self.modal = folder, server, FakeModal(folder / "modal")
        self.orchestrators: list[Orchestrator] = []

    def release(self, **parts: dict[str, Any]) -> "Orchestrator":
        """Start a release of SMALL with some parts changed."""
        overrides = {**SMALL, "publish": {"name": "small", "page": "none", "folder": str(self.folder / "releases")}}
        overrides |= {name: {**SMALL[name], **part} for name, part in parts.items()}
        output = self.folder / f"orchestrator-{len(self.orchestrators)}.txt"
        command = [sys.executable, "-c", ORCHESTRATOR, str(self.modal.root), "--overrides", json.dumps(overrides)]
        environment = os.environ | {"PREFECT_API_URL": self.server, "TINYCATS_HOME": str(self.folder / "home")}
        with open(output, "wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.orchestrators.append(Orchestrator(process, output))
        return self.orchestrators[-1]

    def clear(self) -> None:
        """Leave no process behind."""
        for orchestrator in self.orchestrators:
            orchestrator.process.kill()
            orchestrator.process.wait()
        for call in self.modal.calls():
            if self.modal.processes(call):
                self.modal.cancel(call)

    def training(self, number: int = 0) -> str:
        """Wait until a training of the generator has told of its first steps, and return its call."""
        until(lambda: len(self.modal.calls("train_generator")) > number)
        call = self.modal.calls("train_generator")[number]
        until(lambda: self.modal.log(call))
        return call

    def made(self) -> dict[str, str]:
        """Return the sha256 of the averages, and of the last checkpoint: raw weights and moments; by name."""
        from tinycats_core.files import sha256_of

        (training,) = (self.folder / "home" / "training").glob("*/ema.safetensors")
        (run,) = (self.modal.root / "outputs" / "runs").glob("*/ema.safetensors")
        last = max((run.parent / "checkpoints").glob("*.safetensors"))
        return {path.name: sha256_of(path) for path in (*training.parent.glob("ema*.safetensors"), last)}

    def published(self) -> list[str]:
        """Return the versions that are published."""
        folders = [path.parent for path in (self.folder / "releases").glob("small/*/release.json")]
        return sorted(folder.name for folder in folders if not folder.is_symlink())  # which `latest` is


@dataclass
class Orchestrator:
    """A process that runs the flow, and what it says."""

    process: subprocess.Popen[bytes]
    output: Path

    def says(self, text: str) -> bool:
        return text in self.output.read_text(errors="replace")

    def finish(self, expected: int) -> None:
        """Wait for its end. Raises SystemExit where it does not end as expected."""
        code = self.process.wait(LONGEST)
        if code != expected:
            raise SystemExit(f"the release ended with {code} instead of {expected}:\n{self.output.read_text()[-3000:]}")


def disturb(site: Site, calm: Site, preemptions: int, rng: random.Random) -> dict[str, Any]:
    """Release while the training is preempted and the orchestrator is killed with -9; compare with what nobody disturbed."""
    from tinycats_core.files import read_json

    points = sorted(rng.sample(STEPS_TO_PREEMPT, preemptions))
    kinds = [(signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[number % 3] for number in range(preemptions)]
    first = site.release()
    call = site.training()
    first.process.kill()
    first.process.wait()
    second = site.release()
    done = 0
    for number, (step, kind) in enumerate(zip(points, kinds, strict=True)):
        if number == preemptions // 2:
            wait_for_attachment(site, call, second)
        done += preempt_at(site, call, step, kind)
    second.finish(0)
    (cost,) = (read_json(path) for path in (site.folder / "home" / "training").glob("*/cost.json"))
    return {
        "preemptions": done,
        "bit_identical": site.made() == calm.made(),
        "calls_made": len(site.modal.calls("train_generator")),
        "reattached": second.says(f"attached to call {call}"),
        "published": len(site.published()) == 1,
        "attempts": cost["attempts"],
        "steps": cost["steps"],
        "steps_run": cost["steps_run"],
    }


def preempt_at(site: Site, call: str, step: int, kind: int) -> bool:
    """Preempt a call when it has told of a step, and wait until another container is at work. Returns whether it was."""

    def has_come() -> bool:
        return ended() or any(row["step"] >= step for row in site.modal.log(call))

    def ended() -> bool:
        return (site.modal.root / "calls" / call / "outcome.json").exists()

    until(has_come)
    before = until(lambda: ended() or site.modal.container(call))
    if ended():
        return False
    site.modal.preempt(call, kind)
    until(lambda: ended() or site.modal.container(call) not in (None, before))
    return True


def wait_for_attachment(site: Site, call: str, orchestrator: Orchestrator) -> None:
    """Hold the container until the orchestrator is back: this training would be over by then."""
    pid, _ = until(lambda: site.modal.container(call))
    os.kill(pid, signal.SIGSTOP)
    until(lambda: orchestrator.says(f"attached to call {call}") or orchestrator.process.poll() is not None)
    os.kill(pid, signal.SIGCONT)


def cancel(site: Site) -> dict[str, Any]:
    """Start a release that would take for ever, cancel it as Prefect does, and measure how long anything of the call is left."""
    number = len(site.modal.calls("train_generator"))
    before = site.published()
    orchestrator = site.release(train={"steps": 1_000_000, "sample_every": 1_000_000})
    call = site.training(number)
    since = time.perf_counter()
    orchestrator.process.send_signal(signal.SIGTERM)
    until(lambda: not site.modal.processes(call))
    seconds = time.perf_counter() - since
    orchestrator.finish(128 + signal.SIGTERM)
    if site.published() != before:
        raise SystemExit("a cancelled release was published")
    return {"cancel_seconds": round(seconds, 2)}


def overspend(site: Site, go_on: bool) -> dict[str, Any]:
    """Release with a cost cap that the training exceeds, then with a higher one."""
    from tinycats_core.compute.gpus import usd_per_second
    from tinycats_core.config import ComputeConfig
    from tinycats_core.files import read_json
    from tinycats_core.training.run_folder import RunFolder

    rate = usd_per_second(ComputeConfig(gpu="T4")) or 0.0
    cap, number, before = CAP_SECONDS * rate, len(site.modal.calls("train_generator")), site.published()
    longer = {"train": {"steps": 1000, "sample_every": 1000, "seed": 1, "checkpoint_every": 500}}
    stopped = site.release(**longer, compute={"max_cost_usd": cap})
    call = site.training(number)
    stopped.finish(1)
    asked = read_json(site.modal.root / "calls" / call / "request.json")["request"]
    run = RunFolder(site.modal.root / "outputs" / "runs" / asked["run"])
    (_, stop), last = run.diary(), run.checkpoints()[0]
    spent = rate * sum(read_json(run.path / "meter.json")["attempts"])
    figures: dict[str, Any] = {
        "cost_stop": all(
            (
                stopped.says("is spent and compute.max_cost_usd is"),
                site.published() == before,
                last.name == f"step-{stop['step']:08d}.safetensors",
                0 < stop["step"] < longer["train"]["steps"],
            )
        ),
        "cost_cap_usd": round(cap, 6),
        "cost_spent_usd": round(spent, 6),
    }
    if go_on:
        again = site.release(**longer, compute={"max_cost_usd": 100 * cap})
        again.process.wait(LONGEST)  # published or refused: that is the gate's business
        _, _, resumed, *_, end = run.diary()
        figures["went_on_after_cost_stop"] = (resumed["step"], end["step"]) == (stop["step"], longer["train"]["steps"])
    return figures


def until(true: Callable[[], Any]) -> Any:
    """Wait until a function returns something that is true, and return it."""
    deadline = time.monotonic() + LONGEST
    while not (found := true()):
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {LONGEST:.0f} s")
        time.sleep(0.02)
    return found


if __name__ == "__main__":
    sys.exit(main())
