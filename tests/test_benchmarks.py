"""The benchmarks: every script explains itself, and figures are kept without anything that names this machine."""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from runpy import run_module
from typing import NoReturn

import pytest
from PIL import Image

from benchmarks import classifier, common
from tinycats_core.errors import TinycatsError

ROOT = Path(__file__).resolve().parents[1]
FILES = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
SCRIPTS = sorted(  # modules that are run by `python -m`
    path.parent.name if path.stem == "__main__" else path.stem for path in FILES if '__name__ == "__main__"' in path.read_text()
)


def main_of(script: str) -> Callable[[list[str]], int]:
    """Return the `main` of a benchmark, which is a module or a folder."""
    folder = (ROOT / "benchmarks" / script).is_dir()
    return import_module(f"benchmarks.{script}.__main__" if folder else f"benchmarks.{script}").main


@pytest.mark.parametrize("quick", [False, True])
def test_the_last_line_is_what_the_file_keeps(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    script = ROOT / "benchmarks" / "speed.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"--data={ROOT}/docs", "/srv/photos", "--rounds", "3"])
    print("on the way")
    common.report("speed-cpu", {"images_per_s": 2.5, "name": "eager"}, argparse.Namespace(quick=quick))
    text = (tmp_path / f"speed-cpu{'-quick' * quick}.json").read_text()
    kept = json.loads(text)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {"images_per_s": 2.5, "name": "eager"}
    assert {name: kept[name] for name in figures} == figures
    assert kept.keys() - figures.keys() == {"machine", "versions", "command", "date"}
    assert kept["command"] == "python -m benchmarks.speed --data=docs photos --rounds 3"
    assert kept["machine"]["cores"] >= 1
    assert kept["versions"].keys() >= {"python", "torch"}
    assert str(ROOT) not in text
    assert "/srv" not in text


def test_figures_that_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        common.report("speed", {"images_per_s": float("nan")}, argparse.Namespace(quick=False))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["disk /dev/sdb1 full", "cannot open '/tmp/x/y.cpp': no", f"{ROOT}/README.md", "1/2 or https://a.b/c"]
)
def test_paths_are_shortened(text: str):
    shown = common.without_paths(text)
    assert not any(part in shown for part in ("/dev", "/tmp", str(ROOT)))
    assert ("1/2 or https://a.b/c" in shown) == ("https" in text)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_explains_itself(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    for name in (f"benchmarks.{script}", f"benchmarks.{script}.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        run_module(f"benchmarks.{script}", run_name="__main__")  # as `python -m` does, without a process of its own
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out


@pytest.fixture
def outspoken() -> Iterator[None]:
    """Benchmarks silence the core's warnings; other tests read them."""
    before = logging.getLogger("tinycats").level
    yield
    logging.getLogger("tinycats").setLevel(before)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_an_error_for_people_is_one_line(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refuse(*given: object) -> NoReturn:
        raise TinycatsError("no")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", refuse)
    assert main_of(script)([]) == 1
    assert capsys.readouterr() == ("", "error: no\n")


def test_a_publication_survives_faults_and_kills():
    command = [sys.executable, "-m", "benchmarks.publish_faults", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["cases"] >= 20
    assert figures["kills"] == 40


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("augmentation", ["--photos", "/nowhere"], "data.folder /nowhere does not exist"),
        ("crops", ["--oxford", "/nowhere"], "/nowhere/annotations.tar.gz is not a readable archive"),
        ("export", ["--release", "/nowhere"], "/nowhere is not an intact release"),
        ("judge", ["--photos", "/nowhere"], "data.folder /nowhere does not exist"),
        ("judge", ["--photos", "/nowhere", "--size", "4"], "data.image_size is 4: "),
        ("recipe", ["--photos", "~nobody.here"], "data.folder is "),
        ("sampling", ["--count", "5"], "evaluate.samples is 5: "),
    ],
)
def test_what_cannot_be_measured_is_one_line(script: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main_of(script)(arguments) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {said}")


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize(("script", "said"), [("judge", "2 training"), ("recipe", "2 validation")])
def test_too_few_photos_are_one_line(script: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(6):
        folder = tmp_path / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (128, 128), (40 * number, 0, 0)).save(folder / f"{number}.png")
    assert main_of(script)(["--photos", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: there are {said} images; at least 16 are needed")


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("augmentation", "--few"),
        ("augmentation", "--snapshots"),
        ("busy", "--rounds"),
        ("corruption", "--cases"),
        ("crops", "--photos"),
        ("decode", "--photos"),
        ("export", "--rounds"),
        ("folders", "--folders"),
        ("fuzz", "--mutations"),
        ("judge", "--resamples"),
        ("modal_faults", "--preemptions"),
        ("publish_faults", "--kills"),
        ("publish_faults", "--pairs"),
        ("resume", "--kills"),
        ("sampling", "--count"),
        ("smoke_quality", "--seeds"),
        ("training", "--batch-size"),
        ("training", "--rounds"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "few"])
def test_nothing_is_done_no_times(script: str, option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main_of(script)([option, value])
    assert f"argument {option}: {value} is not a whole number of 1 or more" in capsys.readouterr().err


def test_wilsons_interval_is_that_of_the_textbook():
    assert classifier.wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert classifier.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)  # Newcombe 1998, table I
    assert classifier.wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)


def test_cats_are_told_from_others_whatever_breed_is_named():
    confusion = [[3, 2, 1], [0, 4, 0], [1, 1, 8]]  # of two breeds and what is no cat
    found = classifier.cats_from_others(confusion, ("Bengal", "Sphynx", "other"), [0] * 5 + [1] * 2 + [2] * 9)
    assert found is not None
    assert (found["accuracy"], found["majority"]) == (17 / 20, 10 / 20)
    assert classifier.cats_from_others(confusion, ("a", "b", "c"), [0, 1, 2]) is None
    assert classifier.accuracy_of(confusion, [5, 2, 4])["majority"] == 6 / 20


def test_without_the_peer_one_line_says_what_to_install():
    code = "import sys; sys.modules['diffusers'] = None; from benchmarks.training.__main__ import main; sys.exit(main(['--quick']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: the peer, diffusers, is not installed: pip install '.[bench]'\n"
    assert not done.stdout
