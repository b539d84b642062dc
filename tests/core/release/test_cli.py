"""The command line `tinycats`: what a person types, what it prints, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from tinycats_core.presets import PRESETS
from tinycats_core.records import Release
from tinycats_core.release import manifest, registry

ROOT = Path(__file__).resolve().parents[3]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_verify_says_what_is_wrong_line_by_line(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    version = json.loads((release / "release.json").read_text())["version"]
    status, out, err = run(capsys, "verify", release)
    *links, last = out.splitlines()
    assert (status, last, err) == (0, f"tinycats {version}: 38 files, all as they were made; the lineage is unbroken", "")
    assert [line.split()[0] for line in links[1:4]] == ["data", "configuration", "code"]
    status, out, err = run(capsys, "verify", release, "--json")
    result = json.loads(out)
    assert (status, result["wrong"], {link["holds"] for link in result["lineage"]}, err) == (0, [], {True}, "")
    (release / "metrics.csv").write_text("")
    (release / "data.json").unlink()
    status, out, err = run(capsys, "verify", release)
    assert (status, out, [line.split()[0] for line in err.splitlines()]) == (1, "", ["data.json", "metrics.csv"])
    status, out, _ = run(capsys, "verify", release, "--json")
    assert (status, len(json.loads(out)["wrong"])) == (1, 2)
    for place, why in {
        tmp_path / "absent": "does not exist",
        tmp_path: "is not a release",
        release / "README.md": "not a folder",
    }.items():
        status, out, err = run(capsys, "verify", place)
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert why in err


def test_the_console_script_exits_as_the_check_says(release: Path):
    (release / "model.safetensors").write_bytes(b"")
    script = Path(sys.executable).with_name("tinycats")
    done = subprocess.run([script, "verify", str(release)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("model.safetensors has changed")


def test_bench_prints_its_figures_as_json(built: Release, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr("tinycats_core.release.inference.measure_release", lambda *given: asked.append(given) or {"rows": []})
    status, out, err = run(capsys, "bench", built.folder, "--device", "cpu")
    assert (status, json.loads(out), err) == (0, {"rows": []}, "")
    assert asked == [(built.folder, "cpu")]


def test_bench_says_in_one_line_what_is_no_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for place in (tmp_path, tmp_path / "absent"):
        status, out, err = run(capsys, "bench", place)
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"error: {place} is not an intact release")


def test_costs_prints_a_row_for_each_preset(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "costs")
    head, *rows = out.splitlines()
    assert (status, head.split()[0], [row.split()[0] for row in rows]) == (0, "preset", list(PRESETS))


def test_promote_rollback_and_history_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for version, before in (("111", None), ("222", "111")):
        place = registry.open_registry(tmp_path) / "cats" / version
        place.mkdir(parents=True)
        (place / "decision.json").write_text(json.dumps({"promoted": True, "terms": [], "baseline": before}))
        manifest.seal(place, "cats", version, "key", {})
        status, out, _ = run(capsys, "promote", place, "--dry-run")
        assert (status, out.splitlines()[-1].split(";")[0].split(", ")[2:]) == (0, ["delete 0", "keep 2"])
        status, out, _ = run(capsys, "promote", place)
        assert (status, out) == (0, f"cats {version} is published: {place}\n")
    status, out, _ = run(capsys, "rollback", "cats", "--folder", tmp_path, "--to", "111", "--why", "it was better")
    assert (status, out) == (0, f"cats 111 is published: {tmp_path / 'cats/111'}\n")
    status, out, _ = run(capsys, "history", "cats", "--folder", tmp_path)
    head, *rows = out.splitlines()
    assert (status, head) == (0, f"{'at':25}  how       version  instead of  why")
    assert [row[27:] for row in rows] == [
        "release   111      -",
        "release   222      111",
        "rollback  111      222         it was better",
    ]


def test_a_forced_promotion_runs_the_release_flow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("flows.release_model.release_model", lambda *given, **options: asked.append((*given, options)))
    status, _, _ = run(capsys, "promote", "--preset", "smoke", "--force", "--why", "-- they wait", "--dry-run")
    options = {"keep_results": False, "force": "-- they wait", "dry_run": True}
    assert (status, asked) == (0, [("smoke", {}, options)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["promote"],
        ["promote", "--force", "--why", "they wait"],
        ["promote", "--force", "--preset", "smoke"],
        ["promote", "release", "--force", "--preset", "smoke", "--why", "they wait"],
        ["promote", "release", "--why", "they wait"],
        ["promote", "release", "--preset", "smoke"],
        ["rollback", "cats", "--to", "111"],
        ["rollback", "cats", "--why", "it was better"],
        ["history"],
    ],
)
def test_arguments_that_do_not_go_together_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(capsys, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["history", "cats", "--folder", "/nowhere"], "/nowhere holds no releases of 'cats'"),
        (["rollback", "cats", "--to", "1", "--why", " "], "the reason is ' '. Say why in a few words"),
        (["costs", "--preset", "tiny"], "preset is 'tiny'; allowed: smoke, "),
        (["costs", "--gpu", "abacus"], "compute.gpu is 'abacus'; allowed: T4, "),
        (["costs", "--overrides", "{"], "overrides is not JSON"),
        (["prune", "--keep", "-1"], "--keep is -1; give 0 or more"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, *arguments)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("arguments", [[], ["verify"], ["prune"], ["draw"], ["costs", "--price"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(capsys, *arguments)[0] == 2
