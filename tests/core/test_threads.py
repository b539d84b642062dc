"""PyTorch's threads: the bounded spin is in force where it is said to be, a person's setting wins, and no bit changes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import MODEL, config

from tinycats_core import threads
from tinycats_core.records import Dataset
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.start import train

ROOT = Path(__file__).resolve().parents[2]
OURS = f"{threads.SPIN_COUNT}={threads.SPIN}"
SETTINGS = (threads.SPIN_COUNT, threads.WAIT_POLICY, threads.MARK)
DEFAULT = (None, "PyTorch default")
FACTS = """
import json, os, sys
import torch
from tinycats_core import threads

bits = None
gnu = sys.platform == "linux" and "libgomp" in open("/proc/self/maps").read()
print(json.dumps({"facts": threads.facts(), "gnu": gnu, "spin": os.environ.get(threads.SPIN_COUNT), "bits": bits}))
"""
TRAIN = """
import hashlib
import torch
from tinycats_core.config import CLASSES
from tinycats_core.presets import resolve
from tinycats_core.device import fast_arithmetic
from tinycats_core.training.state import Run
from tinycats_core.training.step import training_step

config = resolve("smoke")
images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
labels = torch.arange(64) % len(CLASSES)
run = Run.from_images(images, labels, CLASSES, config.model, config.train, torch.device("cpu"))
with fast_arithmetic(run.device):
    losses = [float(training_step(run)[0]).hex() for _ in range(6)]
digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in run.weights.values())).hexdigest()
"""
TRAINED = TRAIN + FACTS.replace("bits = None", "bits = [*losses, digest]")


def child(code: str, **environment: str) -> dict[str, Any]:
    """Return what a process without settings of its own, but these, prints; and the spin that OpenMP itself tells of."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", threads.MARK))}
    unset = f"import os\nfor name in {[name for name in SETTINGS if name not in environment]}: os.environ.pop(name, None)\n"
    command = [sys.executable, "-c", unset + code]  # `unset`: the interpreter's site may have settings, too
    environment = clean | {"OMP_DISPLAY_ENV": "verbose"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.split("'")[1] for line in done.stderr.splitlines() if threads.SPIN_COUNT in line]
    return json.loads(done.stdout.splitlines()[-1]) | {"told": said[-1] if said else None}


def setting(found: dict[str, Any]) -> tuple[str | None, str]:
    return found["facts"]["spin"], found["facts"]["spin_set_by"]


@pytest.fixture(scope="module")
def chosen() -> dict[str, Any]:
    """A process that imports the package before PyTorch, and trains."""
    found = child(f"import tinycats_core\n{TRAINED}")
    if not found["gnu"]:
        pytest.skip("PyTorch does not use GNU OpenMP here")
    return found


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    """A process that imports PyTorch first, and trains."""
    return child(f"import torch\n{TRAINED}")


def test_the_spin_is_bounded_before_openmp_is_loaded(chosen: dict[str, Any]):
    assert setting(chosen) == (OURS, "tinycats")
    assert chosen["facts"]["spin_adapts"]
    assert chosen["told"] == str(threads.SPIN)


def test_a_child_process_has_it_and_knows_where_it_comes_from(chosen: dict[str, Any]):
    assert chosen["spin"] == str(threads.SPIN)
    code = f"import subprocess, sys, tinycats_core\nsubprocess.run([sys.executable, '-c', {FACTS!r}], check=True)"
    found = child(code)  # the inner process imports PyTorch first, and has the setting all the same
    assert setting(found) == (OURS, "tinycats")
    assert found["told"] == str(threads.SPIN)


def test_where_pytorch_was_first_the_default_is_in_force_and_said(chosen: dict[str, Any], default: dict[str, Any]):
    assert setting(default) == DEFAULT
    assert default["told"] != str(threads.SPIN)
    assert default["spin"] == str(threads.SPIN)  # for its children


def test_no_bit_of_a_result_depends_on_the_spin(chosen: dict[str, Any], default: dict[str, Any]):
    restless = """
import itertools, tinycats_core
from tinycats_core import threads
threads.WINDOW = threads.LOOK_EVERY = 0.01
loads = itertools.cycle([0.0] * 3 + [64.0] * 3)
threads.between = lambda before, after: next(loads)
"""
    changing = child(restless + TRAINED)
    assert [found["facts"]["spin"] for found in (chosen, default, changing)] == [OURS, None, OURS]
    assert chosen["bits"]
    assert chosen["bits"] == default["bits"] == changing["bits"]


def test_sleeping_threads_are_kept_while_the_machine_is_busy(chosen: dict[str, Any]):
    code = """
import json, os, time
import tinycats_core, torch
from tinycats_core import threads

torch.set_num_threads(2)
threads.WINDOW = threads.LOOK_EVERY = 0.01
load = 0.0
threads.between = lambda before, after: load
count = lambda: len(os.listdir("/proc/self/task"))

def settled(wanted):
    until = time.monotonic() + 30
    while count() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return count() - first

first = count()
more = len(os.sched_getaffinity(0))
with threads.sharing():
    quiet = settled(first + 1)
    load = 64.0
    busy = settled(first + 2 + more)
    load = 0.0
    again = settled(first + 1)
    load = 64.0
    settled(first + 2 + more)
after = settled(first)
print(json.dumps({"threads": [quiet, busy - more, again, after]}))
"""
    assert child(f"import tinycats_core\n{code}")["threads"] == [1, 2, 1, 0]  # the one that looks, the one that keeps them


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "passive")])
def test_a_persons_own_setting_wins(name: str, value: str, chosen: dict[str, Any]):
    found = child(f"import tinycats_core\n{FACTS}", **{name: value, "OMP_NUM_THREADS": "1"})
    assert setting(found) == (f"{name}={value}", "environment")
    assert found["told"] == {"77": "77", "passive": "0"}[value]
    assert found["facts"]["threads"] == 1
    assert not found["facts"]["spin_adapts"]


def test_the_package_imports_nothing_heavy():
    code = "import sys, json, tinycats_core; print(json.dumps({'heavy': [n for n in ('torch', 'numpy') if n in sys.modules]}))"
    assert child(code)["heavy"] == []


def test_the_load_is_what_others_take(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 100.7])
    own = iter([5.0, 5.2])
    now = iter([0.0, 0.5])
    monkeypatch.setattr(threads, "used", lambda: next(clock))
    monkeypatch.setattr(threads.time, "process_time", lambda: next(own))
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    assert threads.others() == 1.0


@pytest.mark.skipif(threads.used() is None, reason="the system does not tell how its cores are used")
def test_a_busy_core_is_seen():
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        load = threads.others(1.0)
    finally:
        loop.kill()
        loop.wait()
    assert load is not None
    assert 0.3 < load <= len(threads._cores())


@pytest.mark.parametrize(
    ("load", "count", "busy"), [(None, 2, None), (0.1, 2, False), (1.0, 2, True), (1.0, 1, False), (2.0, 1, True)]
)
def test_a_machine_is_busy_when_its_threads_lack_cores(
    load: float | None, count: int, busy: bool | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threads, "others", lambda: load)
    monkeypatch.setattr(threads, "_cores", lambda: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: count)
    found = threads.facts()
    assert (found["threads"], found["load"], found["busy"]) == (count, load, busy)
    said = threads.warning(found)
    assert (said is not None) == bool(busy)
    if said:
        assert f"other programs take {load:.1f} of 2 cores" in said


@pytest.mark.parametrize("stat", [None, "", "cpu  1 2 3\n", "cpu0 a b\n"])
def test_a_system_that_says_nothing_is_not_guessed_at(stat: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "stat"
    if stat is not None:
        file.write_text(stat)
    monkeypatch.setattr(threads, "Path", lambda path: file)
    assert threads.used() is None
    assert threads.others(0) is None


@pytest.mark.parametrize("load", [0.0, 64.0])
def test_a_training_says_on_what_it_runs(
    load: float, two_colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(threads, "others", lambda: load)
    train(two_colours, MODEL, config(), tmp_path / "run", "cpu")
    start, *_, finish = RunFolder(tmp_path / "run").diary()
    assert start.keys() >= {"threads", "spin", "spin_set_by", "spin_adapts", "load", "busy"}
    assert (start["load"], start["busy"], start["device"]) == (load, bool(load), "cpu")
    assert "busy" not in finish
    warned = [record.levelno for record in caplog.records if "the machine is busy" in record.message]
    assert warned == [logging.WARNING] * bool(load)
