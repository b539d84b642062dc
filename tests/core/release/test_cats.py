"""A release as an object that draws: from a folder and from the Hub, with PyTorch and onnxruntime."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hub_server import Hub, loopback_hub

import tinycats_core
from tinycats_core.config import PublishConfig, SampleConfig
from tinycats_core.errors import ConfigError, ExportError, RegistryError
from tinycats_core.files import read_json, write_json
from tinycats_core.generator import onnx_file
from tinycats_core.records import Release
from tinycats_core.release import hub, manifest
from tinycats_core.release.cats import Cats

ROOT = Path(__file__).resolve().parents[3]
REPO = "someone/cats"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as running:
        yield running


def pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def test_the_same_call_draws_the_same_cats(built: Release):
    cats = tinycats_core.load(str(built.folder))
    first = pixels(cats.sample("Siamese", n=3, seed=3))
    assert first.shape == (3, cats.image_size, cats.image_size, 3)
    assert np.array_equal(first, pixels(tinycats_core.from_pretrained(str(built.folder)).sample("siamese", n=3, seed=3)))
    assert np.array_equal(first[:2], pixels(cats.sample("Siamese", n=2, seed=3)))
    assert not np.array_equal(first, pixels(cats.sample("Siamese", n=3, seed=4)))
    assert not np.array_equal(first, pixels(cats.sample("Siamese", n=3, seed=3, guidance=3)))
    assert len(cats.sample()) == len(cats.classes)


def test_the_shipped_script_draws_the_same_pixels_as_onnxruntime_here(built: Release, tmp_path: Path):
    cats = tinycats_core.load(str(built.folder), runtime="onnx")
    options = ["--class", "Siamese", "-n", "2", "--seed", "3", "--model", "cats-int8.onnx", "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, built.folder / "sample.py", *options], check=True, cwd=tmp_path)
    from PIL import Image

    shipped = [Image.open(path) for path in sorted((tmp_path / "out").glob("Siamese-*.png"))]
    assert np.array_equal(pixels(shipped), pixels(cats.sample("Siamese", n=2, seed=3)))


def test_the_shipped_script_does_not_write_into_the_release(release: Path):
    done = subprocess.run([sys.executable, "sample.py", "-n", "1"], cwd=release, capture_output=True, text=True)
    assert done.returncode == 2
    assert "inside the release, which would damage it; give a folder elsewhere" in done.stderr
    assert manifest.inspect(release)[1] == []


def test_from_the_hub_and_again_without_it(server: Hub, built: Release, tmp_path: Path):
    hub.publish_to_hub(built, PublishConfig(name=built.name, to="hub", repo_id=REPO), None)
    drawn = pixels(tinycats_core.load(f"hub:{REPO}").sample("Siamese", seed=3))
    assert np.array_equal(drawn, pixels(tinycats_core.load(str(built.folder)).sample("Siamese", seed=3)))
    assert np.array_equal(drawn, pixels(tinycats_core.from_pretrained(REPO, local_files_only=True).sample("Siamese", seed=3)))
    with pytest.raises(RegistryError, match="holds no downloaded release"):
        tinycats_core.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "empty")
    with pytest.raises(RegistryError, match="someone/none holds no release"):
        tinycats_core.load("someone/none")


def test_what_cannot_be_drawn_is_named(built: Release, release: Path, tmp_path: Path):
    cats = tinycats_core.load(str(built.folder))
    for call, message in (
        (lambda: cats.sample("Siamse"), "there is no class 'Siamse'; did you mean Siamese?"),
        (lambda: cats.sample("xyz"), "there is no class 'xyz'; allowed: Abyssinian, "),
        (lambda: cats.sample("Siamese", n=0), "n is 0; at least 1 is needed"),
        (lambda: cats.sample("Siamese", seed=-1), "seed is -1: input should be greater than or equal to 0"),
        (lambda: cats.sample("Siamese", guidance=-1), "guidance is -1"),
        (lambda: Cats(built.folder, runtime="tflite"), "runtime is 'tflite'; allowed: pytorch, onnx"),  # pyright: ignore
    ):
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            call()
    with pytest.raises(RegistryError, match="does not exist"):
        tinycats_core.load(str(tmp_path / "none"))
    (release / "model.safetensors").write_bytes(b"")
    with pytest.raises(RegistryError, match="is not an intact release"):
        tinycats_core.load(str(release))
    with pytest.raises(RegistryError, match="published by its flow"):
        tinycats_core.from_pretrained(str(built.folder)).push_to_hub("someone/cats")  # pyright: ignore


def resealed(release: Path) -> None:
    """Seal a release again over what its files are now."""
    made = read_json(release / "release.json")
    (release / "release.json").unlink()
    manifest.seal(release, made["name"], made["version"], made["key"], made["parents"])


def test_a_release_from_before_there_were_graphs_draws_the_same(built: Release, release: Path):
    wanted = pixels(tinycats_core.load(str(built.folder), runtime="onnx").sample("Siamese", n=3, guidance=2))
    for path in release.glob("cats-*.onnx"):
        path.unlink()
    (release / "precision.json").unlink()
    benchmark = read_json(release / "benchmark.json")
    write_json(release / "benchmark.json", {name: value for name, value in benchmark.items() if name != "graphs"})
    resealed(release)
    assert np.array_equal(pixels(tinycats_core.load(str(release), runtime="onnx").sample("Siamese", n=3, guidance=2)), wanted)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"classes": '["dark", "bright"]'}, "draws other classes or another size than its release says"),
        ({"image_size": "32"}, "draws other classes or another size"),
        ({"sampling": "no JSON"}, "draws by other settings than its release says"),
        ({"sampling": SampleConfig(steps=99).model_dump_json()}, "draws by other settings"),
        ({"format": onnx_file.DENOISER}, "is not a graph of this project"),
    ],
)
def test_a_graph_that_is_not_that_of_its_release_is_refused(release: Path, facts: dict[str, str], why: str):
    model = onnx.load(release / "cats-int8.onnx")
    for entry in model.metadata_props:
        entry.value = facts.get(entry.key, entry.value)
    onnx.save(model, release / "cats-int8.onnx")
    resealed(release)
    with pytest.raises(ExportError, match=why):
        tinycats_core.load(str(release), runtime="onnx")


def test_a_saved_copy_is_the_same_release(built: Release, tmp_path: Path):
    cats = tinycats_core.from_pretrained(str(built.folder))
    cats.save_pretrained(tmp_path / "copy")  # pyright: ignore
    assert manifest.read_release(tmp_path / "copy").sha256 == built.sha256


def test_three_lines_of_python_run_as_the_page_shows_them(built: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "releases" / "tinycats-smoke").mkdir(parents=True)
    (tmp_path / "releases" / "tinycats-smoke" / "latest").symlink_to(built.folder)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "commands.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert np.array_equal(pixels(names["pictures"]), pixels(tinycats_core.load(str(built.folder)).sample("Siamese", n=4, seed=3)))


def test_the_graph_draws_as_the_page_shows_it(built: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "releases" / "tinycats-smoke").mkdir(parents=True)
    (tmp_path / "releases" / "tinycats-smoke" / "latest").symlink_to(built.folder)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "drawing.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    wanted = pixels(tinycats_core.load(str(built.folder)).sample("Siamese", seed=3, guidance=1.5))
    assert np.abs(names["images"].transpose(0, 2, 3, 1).astype(int) - wanted).max() <= 1  # fp32 of another runtime


def test_prefect_is_not_imported(built: Release):
    code = "import sys, tinycats_core; tinycats_core.load(sys.argv[1]).sample('Siamese'); sys.exit('prefect' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(built.folder)], check=True)
    assert json.loads((built.folder / "data.json").read_text())["classes"]
