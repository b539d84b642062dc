"""The commands that run flows and look at this machine: settings, exit codes, `--help`, runs, where and doctor."""

import importlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer
from filelock import FileLock

from benchmarks.common import TINY
from flows import cli, doctor
from flows.cli.common import app
from tinycats_core.errors import ConfigError
from tinycats_core.files import HOME, home, size_of, write_json
from tinycats_core.presets import parse_settings
from tinycats_core.records import Release

COMMANDS = sorted(str(name) for name in typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the flows are called with, which do not run."""
    calls: list[tuple[Any, ...]] = []
    for name in ("release_model", "evaluate_model", "train_classifier"):
        module = importlib.import_module(f"flows.{name}")
        monkeypatch.setattr(module, name, lambda *given, name=name, **options: calls.append((name, *given, options)))
    return calls


def test_release_runs_the_flow(tiny_release: Release, capfd: pytest.CaptureFixture[str]):
    given = TINY | {"publish": {"name": "tiny", "page": "none", "folder": str(tiny_release.folder.parents[1])}}
    assert cli.main(["release", "--overrides", json.dumps(given), "--set", "train.steps=400"]) == 0
    assert f"tiny {tiny_release.version}, already published" in capfd.readouterr().out


def test_each_command_calls_its_flow_with_the_settings(
    asked: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = {"keep_results": False, "force": None, "dry_run": False}
    several = ["--overrides", '{"train": {"steps": 9000, "seed": 1}}', "--set", "train.steps=8000", "--set", "publish.name=7"]
    for arguments, call in {
        ("release",): ("release_model", "smoke", {}, options),
        ("release", "--data", str(tmp_path)): (
            "release_model",
            "photos",
            {"data": {"source": "folder", "folder": str(tmp_path)}},
            options,
        ),
        ("release", *several, "--force", "they wait", "--dry-run", "--keep-results"): (
            "release_model",
            "smoke",
            {"train": {"steps": 8000, "seed": 1}, "publish": {"name": "7"}},
            {"keep_results": True, "force": "they wait", "dry_run": True},
        ),
        ("release", "--minutes", "60"): ("release_model", "smoke", {"budget": {"minutes": 60.0}}, options),
        ("evaluate", "hub:a/b", "--set", "sample.guidance=2"): ("evaluate_model", "hub:a/b", {"sample": {"guidance": 2}}, {}),
        ("classifier", "--preset", "photos"): ("train_classifier", "photos", {}, {}),
    }.items():
        assert run(capsys, *arguments)[0] == 0
        assert asked.pop() == call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.stpes=3", "train.stpes is not a setting; allowed: steps, .*; did you mean train.steps\\?"),
        ("steps=3", "steps is not a setting; allowed: data, model, .*; did you mean train.steps or sample.steps\\?"),
        ("trian.steps=3", "trian.steps is not a setting; .*; did you mean train.steps\\?"),
        ("train.steps", "--set train.steps: it has no '='; write it as part.field=value"),
        ("train=3", "--set train=3: train is a part; name one of its settings: steps, "),
        ("train.betas.0=1", "train.betas.0 is not a setting"),
        ("=", " is not a setting; allowed: data"),
    ],
)
def test_a_setting_that_is_none_is_one_line(
    text: str, message: str, asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ConfigError, match=message):
        parse_settings([text])
    for command in (["release"], ["evaluate", "somewhere"], ["classifier"], ["costs"]):
        status, out, err = run(capsys, *command, "--set", text)
        assert (status, out, len(err.splitlines()), asked) == (1, "", 1, [])


@pytest.mark.parametrize("text", ["--minutes 0", "--minutes 10000", "--minutes nan", "--dollars 5", "--minutes 5 --dollars 5"])
def test_a_wrong_budget_is_one_line(text: str, asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "release", *text.split())
    assert (status, out, len(err.splitlines()), asked) == (1, "", 1, [])
    assert "budget." in err


def test_a_value_is_typed_by_the_setting(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]):
    texts = ["publish.name=2026", "data.folder=2026", "publish.repo_id=null", "sample.guidance=[1, 2]", "data.folder=C:\\cats"]
    found = parse_settings([*texts, "compute.device=cpu", 'publish.folder="a b"', "train.augmentation=none"])
    assert found == {
        "publish": {"name": "2026", "repo_id": None, "folder": "a b"},
        "data": {"folder": "C:\\cats"},
        "sample": {"guidance": [1, 2]},
        "compute": {"device": "cpu"},
        "train": {"augmentation": "none"},
    }
    status, _, err = run(capsys, "release", "--set", "train.steps=many")
    assert (status, len(err.splitlines()), asked) == (1, 1, [])
    assert err.startswith("error: train.steps is 'many': input should be a valid integer")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_each_command_and_option(command: str, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, *[command] * bool(command), "--help")
    assert (status, err) == (0, "")
    assert f"Usage: tinycats {command}".rstrip() in out
    for parameter in typer.main.get_command(app).commands[command].params if command else []:  # pyright: ignore
        assert getattr(parameter, "help", None), (command, parameter.name)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'prefect', 'pydantic'} & sys.modules.keys()"
    code = f"import sys; from flows import cli; cli.main(['--help']); sys.exit(bool({heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["draw"], ["release", "--stesp"], ["sample"], ["compare", "a"], ["sample", "a", "-n", "x"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(capsys, *arguments)[0] == 2


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert cli.main(["doctor"]) == 130


def make_run(name: str, *events: dict[str, Any], checkpoint: int | None = None) -> Path:
    folder = home("training") / name
    write_json(folder / "run.json", {"train": {"steps": 100}})
    (folder / "diary.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if checkpoint:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / f"step-{checkpoint:08d}.safetensors").write_bytes(b"")
    return folder


def test_runs_says_in_which_state_each_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "none"))
    assert run(capsys, "runs")[1] == f"no runs in {tmp_path / 'none' / 'training'}\n"
    assert json.loads(run(capsys, "runs", "--json")[1]) == []
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path))
    start, finish = {"event": "start", "step": 0}, {"event": "finish", "step": 100}
    make_run("done", start, finish, checkpoint=80)
    make_run("stopped", start, {"event": "stop", "step": 50}, checkpoint=40)
    make_run("killed", start)
    write_json(make_run("spoilt") / "run.json", [])
    held = make_run("held", start, checkpoint=20)
    with FileLock(held / ".lock"):
        found = {Path(item["folder"]).name: item for item in json.loads(run(capsys, "runs", "--json")[1])}
        table = run(capsys, "runs")[1].splitlines()
    assert {name: (item["state"], item["step"], item["resumes_from"]) for name, item in found.items()} == {
        "done": ("finished", 100, None),
        "stopped": ("stopped", 50, 40),
        "killed": ("stopped", 0, 0),
        "spoilt": ("unreadable", 0, None),
        "held": ("running", 20, None),
    }
    assert any(line.startswith("stopped; resumes from step 40  50 of 100") for line in table)
    assert {path.name for path in (tmp_path / "training" / "killed").iterdir()} == {"run.json", "diary.jsonl"}


def test_where_adds_up_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path))
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / "images").write_bytes(b"12345")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data" / "set" / "images")
    assert size_of(tmp_path) == (5, 1)
    found = json.loads(run(capsys, "where", "--json")[1])
    assert found[0] == {"folder": str(tmp_path / "data"), "bytes": 5, "files": 1, "content": HOME["data"]}
    assert Path(found[-1]["folder"]).name == "releases"
    assert len(run(capsys, "where")[1].splitlines()) == len(HOME) + 2


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status, out, _ = run(capsys, "doctor", "--json")
    return status, {item["name"]: item for item in json.loads(out)}


def test_doctor_finds_what_a_release_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("Python", "packages", "disk", "device", "Modal")})
    status, found = findings(capsys)
    assert (status, found["Python"]["state"], found["packages"]["state"], found["Modal"]["state"]) == (0, "ok", "ok", "optional")
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e18)
    status, found = findings(capsys)
    assert (status, found["packages"]["found"], found["results"]["state"]) == (1, "missing: no_such_package", "missing")
    table = run(capsys, "doctor")[1]
    assert "missing: no_such_package" in table


def test_doctor_survives_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise ImportError("no\nlibrary")

    monkeypatch.setattr(doctor, "CHECKS", {"device": broken, "Modal": broken})
    status, found = findings(capsys)
    assert (status, found["device"]["found"], found["Modal"]["state"]) == (1, "ImportError: no library", "optional")


def test_doctor_asks_the_prefect_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'"2.0.0"')

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(doctor, "CHECKS", {"Prefect server": doctor.CHECKS["Prefect server"]})
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            status, found = findings(capsys)
        assert (status, found["Prefect server"]["state"], found["Prefect server"]["found"]) == (0, "optional", f"2.0.0 at {url}")
        server.shutdown()
    with temporary_settings({PREFECT_API_URL: url}):
        status, found = findings(capsys)
    assert (status, found["Prefect server"]["state"]) == (1, "missing")


def test_up_serves_as_make_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PREFECT_API_URL", "nowhere")
    status, _, err = run(capsys, "up")
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: PREFECT_API_URL is 'nowhere'; it must be a URL")
