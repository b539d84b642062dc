"""`tinycats sample` and `tinycats compare`: what they write, what they refuse, and that nothing is left half-written."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinycats_core
from flows import cli
from tinycats_core.files import read_json, write_json
from tinycats_core.records import Release
from tinycats_core.release import manifest


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def changed(release: Path, name: str, **changes: object) -> Path:
    """Seal a release again after changing its measured figures and conditions."""
    measured = read_json(release / "metrics.json")
    for key, value in changes.items():
        measured["candidate"]["conditions" if key in measured["candidate"]["conditions"] else "metrics"][key] = value
    write_json(release / "metrics.json", measured)
    made = read_json(release / "release.json")
    (release / "release.json").unlink()
    manifest.seal(release, name, "0123", made["key"], made["parents"])
    return release


@pytest.mark.parametrize("runtime", ["onnx", "pytorch"])
def test_sample_draws_what_the_python_object_draws(
    built: Release, runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [
        "--class",
        "Siamese",
        "-n",
        3,
        "--seed",
        3,
        "--guidance",
        2,
        "--runtime",
        runtime,
        "--out",
        tmp_path / "cats",
        "--json",
    ]
    status, out, err = run(capsys, "sample", built.folder, *options)
    told = json.loads(out)
    assert (status, err, told["runtime"]) == (0, "", runtime)
    assert [Path(file).name for file in told["files"]] == ["Siamese-0.png", "Siamese-1.png", "Siamese-2.png"]
    assert {path.name for path in (tmp_path / "cats").iterdir()} == {*(Path(file).name for file in told["files"]), "sheet.png"}
    wanted = tinycats_core.load(str(built.folder), runtime).sample("Siamese", 3, 3, 2)  # pyright: ignore[reportArgumentType]
    for file, picture in zip(told["files"], wanted, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture))


def test_every_class_is_drawn_into_a_folder_that_holds_other_files(
    built: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine")
    status, out, _ = run(capsys, "sample", built.folder, "--out", tmp_path)
    assert (status, out) == (0, f"13 pictures of {built.name} {built.version} in {tmp_path}\n")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 15  # pictures, sheet, notes


def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for options, why in (
        (["--class", "Siamse"], "there is no class 'Siamse'; did you mean Siamese?"),
        (["-n", "0"], "n is 0; at least 1 is needed"),
        (["--seed", "-1"], "seed is -1"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--runtime", "tflite"], "runtime is 'tflite'; allowed: pytorch, onnx"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--out", tmp_path / "file"], "is a file; give a folder"),
        (["--out", tmp_path / "file" / "below"], "cannot write to"),
        (["--out", release / "samples" / "mine"], "lies in the release, which it would damage"),
    ):
        status, out, err = run(capsys, "sample", release, "--out", tmp_path / "cats", *options)
        assert (status, out, len(err.splitlines())) == (1, "", 1), options
        assert why in err
    (release / "denoiser-int8.onnx").write_bytes(b"")
    status, _, err = run(capsys, "sample", release, "--out", tmp_path / "cats")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "denoiser-int8.onnx has changed" in err
    status, _, err = run(capsys, "sample", "hub:nobody", "--out", tmp_path / "cats")
    assert (status, err) == (1, "error: hub:nobody names no repository; write hub:owner/name, or give the folder of a release.\n")
    assert not (tmp_path / "cats").exists()


def test_drawing_with_onnxruntime_imports_no_torch(built: Release, tmp_path: Path):
    code = "import sys; from flows import cli; cli.main(sys.argv[1:]); sys.exit(bool({'torch', 'prefect'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code, "sample", built.folder, "--out", tmp_path], check=True)


def test_compare_says_which_is_better_in_what(built: Release, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = changed(release, "other", kid_breed=0.0001, kid_breed_drawn_std=1e-6, coverage=0.0)
    page = tmp_path / "pages" / "compared.html"
    status, out, _ = run(capsys, "compare", built.folder, other, "--html", page, "--json")
    told = json.loads(out)
    figures = {row["metric"]: row for row in told["figures"]}
    assert (status, told["comparable"], told["releases"][1]) == (0, True, "other 0123")
    assert figures["kid_breed"]["better"] == 1
    assert figures["kid_breed"]["difference"] == pytest.approx(0.0001 - figures["kid_breed"]["values"][0])
    assert figures["coverage"]["better"] == 0
    text = page.read_text()
    HTMLParser().feed(text)
    assert "other 0123" in text
    assert "http" not in text  # nothing is loaded from elsewhere
    assert text.count("data:image/png;base64,") == 2
    assert "from the same noise (seed 0)" in text
    status, out, _ = run(capsys, "compare", built.folder, other)
    assert status == 0
    assert [line.split()[-1] for line in out.splitlines() if line.split()[:1] in (["kid_breed"], ["coverage"])] == ["B", "A"]


def test_releases_measured_on_other_data_are_not_compared(
    built: Release, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = read_json(release / "metrics.json")["candidate"]["conditions"]["split"]
    other, page = changed(release, "other", split="<b>val</b>", coverage=0.0), tmp_path / "compared.html"
    status, out, _ = run(capsys, "compare", built.folder, other, "--html", page)
    assert (status, out.splitlines()[-2:]) == (
        0,
        ["not comparable, measured on other data or under other conditions:", f"  split: {before} and <b>val</b>"],
    )
    assert not [line for line in out.splitlines() if line.split()[:1] == ["coverage"] and line.split()[-1] in ("A", "B")]
    text = page.read_text()
    assert "Not comparable: measured on other data" in text
    assert f"split: {before} and &lt;b&gt;val&lt;/b&gt;" in text
    assert "<b>" not in text
