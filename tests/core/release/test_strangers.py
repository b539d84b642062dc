"""A release that a stranger made: whatever it holds, one clear line, and nothing is read outside of it."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks import fuzz
from flows import cli
from tinycats_core.errors import ConfigError, ExportError, TinycatsError
from tinycats_core.files import read_json, write_json
from tinycats_core.generator.onnx_file import require_self_contained
from tinycats_core.records import Release
from tinycats_core.release import lineage, manifest, shipped

OPENED: list[str] = []  # what this process has opened while it was WATCHING
WATCHING = [False]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING[0] and event == "open" and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


sys.addaudithook(_note)


def refused(release: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Verify a release on the command line, and return the one line that says what is wrong."""
    OPENED.clear()
    WATCHING[0] = True
    status = cli.main(["verify", str(release)])
    WATCHING[0] = False
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.rstrip("\n").isprintable()
    assert len(err) < 1_000
    assert [name for name in OPENED if name.startswith(("/etc", "/dev/z", str(release.parent / "outside")))] == []
    return err


def sealed_with(release: Path, **fields: Any) -> None:
    manifest.write_sealed(release, read_json(release / "release.json") | fields)


ONE = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"files": None}, "files is None"),
        ({"files": []}, "files is []"),
        ({"files": {}}, "files is {}"),
        ({"files": {"a": "text"}}, "files.a is 'text'"),
        ({"files": {"a": {"sha256": None, "bytes": 1}}}, "files.a.sha256 is None"),
        ({"files": {"../evil": ONE}}, "../evil is no path below the release"),
        ({"files": {"/etc/passwd": ONE}}, "no path below the release"),
        ({"files": {"a\n\x1b[2Jb": ONE}}, r"the name a\n\x1b[2Jb holds"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": 10 * 2**30}}}, "less than or equal to 2147483648"),
        ({"files": {f"{n}": {"sha256": "0" * 64, "bytes": 2**31} for n in range(9)}}, "a release may have"),
        ({"version": "../../evil"}, "version is '../../evil'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"parents": []}, "parents is []"),
        ({"code": "none"}, "code is 'none'"),
        ({"more": 1}, "more is 1"),
    ],
)
def test_a_sealed_manifest_is_held_to_its_model(release: Path, fields: Any, why: str, capsys: pytest.CaptureFixture[str]):
    sealed_with(release, **fields)
    assert why in refused(release, capsys)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "NaN, which is not a finite number"),
        ("-Infinity", "not a finite number"),
        ("1e999", "1e999, which is not a finite number"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("1" * 5_000, "an integer of 5,000 digits; at most 20"),
        ("[" * 100_000 + "]" * 100_000, "more than 64 levels"),
        ("[" * 70 + "]" * 70, "more than 64 levels"),
    ],
)
def test_what_is_no_json_of_this_project_is_refused_wherever_it_stands(
    release: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
):
    good = (release / "decision.json").read_text()
    (release / "decision.json").write_text(good.replace('"promoted": true', f'"promoted": {text}'))
    folder = read_json(release / "release.json")
    resealed(release, folder)
    assert why in refused(release, capsys)
    (release / "release.json").write_text(json.dumps(folder | {"key": "@"}).replace('"@"', text))
    assert why in refused(release, capsys)


def resealed(release: Path, sealed: dict[str, Any]) -> None:
    """Seal a release again over what its files are now."""
    (release / "release.json").unlink()
    manifest.seal(release, sealed["name"], sealed["version"], sealed["key"], sealed["parents"])


def swap(kind: str) -> Callable[[Path], object]:
    def make(path: Path) -> object:
        path.unlink()
        outside = path.parent.parent / "outside"
        outside.write_text("a secret")
        match kind:
            case "pipe":
                return os.mkfifo(path)
            case "folder":
                return path.mkdir()
            case "sparse":
                path.touch()
                return os.truncate(path, 10 * 2**30)
            case _:
                return path.symlink_to({"link": outside, "device": "/dev/zero", "loop": path.name}[kind])

    return make


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        *[("link", "a link, not a regular file"), ("device", "a link, not a regular file"), ("loop", "a link, not a regular file")],
        *[("pipe", "a named pipe, not a regular file"), ("folder", "metrics.csv is missing")],
        ("sparse", "it has 10,737,418,240 bytes, recorded were"),
    ],
)
@pytest.mark.parametrize("file", ["metrics.csv", "release.json"])
def test_only_regular_files_of_the_recorded_size_are_read(
    release: Path, file: str, kind: str, why: str, capsys: pytest.CaptureFixture[str]
):
    swap(kind)(release / file)
    said = refused(release, capsys)
    if file == "metrics.csv":
        assert why in said
    else:
        assert said.startswith("release.json cannot be read (it ")


def test_a_file_with_an_odd_name_is_named_on_one_line(release: Path, capsys: pytest.CaptureFixture[str]):
    (release / "a\n\x1b[2Jb").write_text("x")
    assert r"a\n\x1b[2Jb is not part of the release" in refused(release, capsys)


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(release: Path) -> None:
        value = read_json(release / file)
        changed = change(value)
        write_json(release / file, changed if isinstance(changed, list) else value)
        resealed(release, read_json(release / "release.json"))

    return apply


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (edit("release_config.json", lambda value: [value]), "release_config.json is not as this project writes it"),
        (edit("release_config.json", lambda value: value["evaluate"].update(samples=10**12)), "less than or equal to 100000"),
        (edit("release_config.json", lambda value: value["data"].update(source="folder", folder="/etc")), "data.folder is '/etc'"),
        (edit("release_config.json", lambda value: value["data"].update(folder="../x")), "data.folder is '../x'"),
        (edit("release_config.json", lambda value: value["model"].update(width=10**9)), "less than or equal to 10000"),
        (edit("sweep.json", lambda value: value.pop("sample")), "sample is missing"),
        (edit("sweep.json", lambda value: value["sample"].update(batch_size=10**12)), "less than or equal to 10000"),
        (
            edit("benchmark.json", lambda value: value["onnx"].clear()),
            "benchmark.json is not as this project writes it: onnx is {}",
        ),
        (edit("metrics.json", lambda value: value.pop("onnx")), "onnx is missing"),
        (edit("metrics.json", lambda value: value["onnx"]["onnx-int8"].update(metrics={"a": "b"})), "is 'b'"),
    ],
)
def test_settings_and_figures_of_a_stranger_are_held_to_their_limits(release: Path, spoil: Callable[[Path], None], why: str):
    spoil(release)
    opened = manifest.read_release(release)
    with pytest.raises(TinycatsError) as caught:
        _ = shipped.config(opened), shipped.onnx_report(opened)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_a_release_of_the_hub_does_not_say_what_this_machine_does(release: Path):
    def change(settings: dict[str, Any]) -> None:
        settings["compute"] = {"where": "modal", "gpu": "H100:8"}
        settings["publish"] = {"folder": "x", "repo_id": "evil/x", "to": "hub"}
        settings["evaluate"] |= {"batch_size": 9_999, "samples": 77}

    edit("release_config.json", change)(release)
    opened = manifest.read_release(release)
    assert shipped.config(opened).evaluate.batch_size == 9_999
    found = shipped.config(
        opened.model_copy(update={"location": "https://hub.example/evil/x/tree/1"}), {"compute": {"device": "cpu"}}
    )
    assert (found.compute.where, found.compute.device, found.compute.gpu) == ("local", "cpu", "A100-80GB")
    assert (found.publish.to, found.publish.repo_id, found.publish.name) == ("folder", None, "tinycats")
    assert (found.evaluate.batch_size, found.evaluate.samples) == (64, 77)


def test_photos_of_a_hub_release_are_looked_for_only_where_this_machine_prepared_them(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    edit("release_config.json", lambda value: value["data"].update(source="folder", folder="pets"))(release)
    opened = manifest.read_release(release)
    assert shipped.locate_data(opened, shipped.config(opened)).data.folder == tmp_path / "pets"
    public = opened.model_copy(update={"location": "https://hub.example/evil/x/tree/1"})
    with pytest.raises(ConfigError, match="lay in a folder named 'pets'"):
        shipped.locate_data(public, shipped.config(public))


@pytest.mark.parametrize("where", ["weights", "constant"])
def test_an_onnx_file_that_reads_weights_from_elsewhere_is_not_run(release: Path, where: str):
    model = onnx.load(release / "denoiser-int8.onnx")
    tensor = model.graph.initializer[0] if where == "weights" else model.graph.node[0].attribute.add(name="value", type=4).t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret\n")
    (release / "denoiser-int8.onnx").write_bytes(model.SerializeToString())
    resealed(release, read_json(release / "release.json"))
    with pytest.raises(ExportError, match=r"reads weights from another file \(\.\./\.\./secret\\n\)"):
        shipped.onnx(manifest.read_release(release))
    assert "reads weights from another file" in lineage.inspect(release)["wrong"][0]


def test_the_metadata_of_an_onnx_file_is_read_without_running_it(built: Release, tmp_path: Path):
    assert require_self_contained(built.folder / "denoiser-int8.onnx")["format"] == "tinycats-denoiser/1"
    for content in (b"", b"\xff" * 100, b"\x08"):
        (tmp_path / "x.onnx").write_bytes(content)
        if content:
            with pytest.raises(ExportError, match="not a complete ONNX file"):
                require_self_contained(tmp_path / "x.onnx")


def test_mutations_at_random_neither_crash_nor_print_what_they_should_not(built: Release, tmp_path: Path):
    for case in range(60):
        file, what = fuzz.mutate(built.folder, tmp_path / "mutated", random.Random(case))
        assert fuzz.read(tmp_path / "mutated")["crashed"] == [], (file, what)
