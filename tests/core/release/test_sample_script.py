"""The sample.py of a release, run as it stands, against the samplers of the project on the denoiser file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tinycats_core.generator import onnx_file, sampling
from tinycats_core.records import Release
from tinycats_core.release import manifest

ALONE = """
import runpy, sys
for name in ("torch", "tinycats_core", "pydantic", "safetensors", "PIL", "onnx"):
    sys.modules[name] = None  # importing it fails as if it were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", ALONE, str(folder / "sample.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image).transpose(2, 0, 1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_draws_what_the_sampler_draws(release: Path, parts: dict[str, Any], precision: str, tmp_path: Path):
    done = run(release, "--model", f"cats-{precision}.onnx", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    velocity = onnx_file.onnx_velocity(release / f"denoiser-{precision}.onnx")
    wanted = sampling.sample(velocity, torch.arange(13), 16, 13, parts["choice"].sample)
    for label, name in enumerate(parts["dataset"].classes):
        assert torch.equal(read(tmp_path / "out" / f"{name}-0.png"), wanted[label])


def test_class_count_seed_and_guidance_are_options(release: Path, parts: dict[str, Any], tmp_path: Path):
    done = run(release, "--class", "Bengal", "-n", "3", "--seed", "7", "--guidance", "1", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (0, f"3 images in {tmp_path / 'out'}\n")
    settings = parts["choice"].sample.model_copy(update={"seed": 7, "guidance": 1.0})
    velocity = onnx_file.onnx_velocity(release / "denoiser-int8.onnx")  # of the graph that the release recommends
    wanted = sampling.sample(velocity, torch.full((3,), parts["dataset"].classes.index("Bengal")), 16, 13, settings)
    for index in range(3):
        assert torch.equal(read(tmp_path / "out" / f"Bengal-{index}.png"), wanted[index])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "Lion"], "--class is 'Lion'; choose from Abyssinian, Bengal"),
        (["-n", "0"], "-n is 0 and --seed is 1; at least 1 and 0 are needed"),
        (["--guidance", "nan"], "--guidance is nan; give a number, or 1 for none"),
        (["--out", "{release}/mine"], "inside the release, which would damage it"),
        (["--out", "{release}/sample.py"], "sample.py, a file; give a folder"),
        (["--model", "denoiser-fp32.onnx"], "does not draw whole images; give cats-fp32.onnx or another cats"),
        (["--model", "none.onnx"], "none.onnx cannot be loaded by onnxruntime"),
        (["--model", "short.onnx"], "Download the file again, or install a newer onnxruntime"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_writes_nothing(release: Path, arguments: list[str], message: str, tmp_path: Path):
    whole = (release / "cats-int8.onnx").read_bytes()
    (release / "short.onnx").write_bytes(whole[: len(whole) // 2])
    before = sorted(tmp_path.rglob("*"))
    done = run(release, *[argument.format(release=release) for argument in arguments], cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_it_is_part_of_the_release_and_a_release_without_it_is_still_read(built: Release, release: Path):
    assert "sample.py" in manifest.verify(built.folder)["files"]
    sealed = json.loads((release / "release.json").read_text())
    (release / "sample.py").unlink()
    (release / "release.json").unlink()
    manifest.seal(release, sealed["name"], sealed["version"], sealed["key"], sealed["parents"])
    assert manifest.read_release(release).version == built.version
