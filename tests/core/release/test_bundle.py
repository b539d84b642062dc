import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from tinycats_core.config import ReleaseConfig
from tinycats_core.errors import RegistryError
from tinycats_core.files import read_json
from tinycats_core.generator.weights import load_generator
from tinycats_core.presets import load
from tinycats_core.records import OnnxModel, Release, ReleaseParts, StageCode, Weights
from tinycats_core.release import bundle
from tinycats_core.release.card import number
from tinycats_core.release.manifest import verify

ROOT = Path(bundle.__file__).parents[2]


def test_a_release_holds_everything_and_verifies(built: Release, parts: dict[str, Any]):
    files = {path.relative_to(built.folder).as_posix() for path in built.folder.rglob("*") if path.is_file()}
    sheets = {f"samples/{name}.png" for name in parts["dataset"].classes}
    assert files == sheets | {
        *(
            "model.safetensors",
            "denoiser-fp32.onnx",
            "denoiser-int8.onnx",
            "cats-fp32.onnx",
            "cats-int8.onnx",
            "config.json",
            "release_config.json",
            "metrics.json",
            "metrics.csv",
        ),
        *(
            "benchmark.json",
            "precision.json",
            "decision.json",
            "data.json",
            "training_log.jsonl",
            "samples/grid.png",
            "samples/metadata.json",
        ),
        *(
            "training_diary.jsonl",
            "training_cost.json",
            "sweep.json",
            "samples/neighbours.png",
            "LICENSE",
            "README.md",
            "release.json",
        ),
        "sample.py",
        "samples/course.png",
        "samples/ema_and_raw.png",
    }
    manifest = verify(built.folder)
    assert set(manifest["files"]) == files - {"release.json"}
    assert (manifest["name"], manifest["version"]) == (built.name, built.version) == ("tinycats", built.folder.name)
    assert manifest["parents"]["checkpoint"]["sha256"] == parts["choice"].weights.sha256
    assert manifest["parents"]["classifier"] is None
    assert manifest["key"] == bundle.release_key(parts["config"], parts["dataset"])
    assert not built.published
    assert built.verify() == built
    assert [path.name for path in built.folder.parent.iterdir()] == [built.version]  # no temporary folder is left


def test_a_release_with_a_classifier_holds_it_twice_with_what_it_gets_right(
    parts: dict[str, Any], classifier: Weights, classifier_onnx: OnnxModel, tmp_path: Path
):
    release = bundle.build(tmp_path, ReleaseParts(**{**parts, "classifier": classifier, "classifier_onnx": classifier_onnx}))
    manifest = verify(release.folder)
    assert {"classifier.safetensors", "classifier.onnx", "classifier.json"} <= manifest["files"].keys()
    assert manifest["files"]["classifier.onnx"]["sha256"] == classifier_onnx.sha256
    assert manifest["parents"]["classifier-onnx"]["sha256"] == classifier_onnx.sha256
    text = (release.folder / "classifier.json").read_text()
    assert os.fsencode(classifier.path.parent) not in text.encode()
    kept, report = json.loads(text), read_json(classifier.path.with_name("report.json"))
    assert kept["onnx"] == classifier_onnx.facts
    assert {name: kept[name] for name in report if name != "made"} == {name: report[name] for name in report if name != "made"}
    card = (release.folder / "README.md").read_text()
    section = card.split("## Classifier\n\n")[1].split("\n## ")[0]
    assert f"a share of {number(report['accuracy'])} of the 26 test images" in section
    assert f"would reach {number(report['majority_accuracy'])}" in section
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == list(parts["dataset"].classes)
    assert rows[2][1:] == [number(report["classes"][0][key]) for key in ("precision", "recall", "f1", "support")]
    assert "| `classifier.onnx` |" in card


def test_the_weights_are_the_trained_ones_to_the_bit(built: Release, parts: dict[str, Any]):
    assert (built.folder / "model.safetensors").read_bytes() == parts["choice"].weights.path.read_bytes()
    _, header = load_generator(built.folder / "model.safetensors")
    assert header.classes == parts["dataset"].classes


def test_the_facts_are_the_records(built: Release, parts: dict[str, Any]):
    assert (built.folder / "sweep.json").read_bytes() == parts["choice"].path.read_bytes()
    metrics = json.loads((built.folder / "metrics.json").read_text())
    assert metrics["candidate"]["metrics"] == parts["report"].metrics
    assert metrics["candidate"]["floor"] == parts["report"].floor
    assert metrics["candidate"]["notes"] == list(parts["report"].notes)
    assert metrics["baseline"]["metrics"] == parts["baseline"].metrics
    assert metrics["baseline"]["version"] == parts["decision"].baseline
    assert metrics["onnx"]["onnx-int8"]["metrics"] == parts["onnx_reports"][0].metrics
    benchmark = json.loads((built.folder / "benchmark.json").read_text())
    assert benchmark["onnx"] == {model.precision: model.facts for model in parts["models"]}
    assert benchmark["inference"] == parts["inference"].facts
    assert (built.folder / "samples/ema_and_raw.png").read_bytes() == parts["ema_and_raw"].path.read_bytes()
    data = json.loads((built.folder / "data.json").read_text())
    assert data["counts"]["Bombay"] == {"train": 2, "val": 1, "test": 2}
    frame = pandas.read_csv(built.folder / "metrics.csv", index_col="metric")
    assert list(frame.columns) == ["candidate", "floor", "baseline", "onnx-int8"]
    assert frame.loc["kid_breed", "baseline"] == parts["baseline"].metrics["kid_breed"]
    assert frame.loc["is_breed"].isna().all()


def test_other_code_makes_another_version_and_kept_results_are_told(parts: dict[str, Any], tmp_path: Path):
    code = StageCode(sha256="a" * 64, core="b" * 64, files={"tinycats_core/training/step.py": "c" * 64})
    releases = [
        bundle.build(tmp_path, ReleaseParts(**{**parts, "code": {"train_generator": made_by}}))
        for made_by in (code, code.model_copy(update={"sha256": "d" * 64, "kept": ("tinycats_core/training/step.py",)}))
    ]
    assert releases[0].version != releases[1].version
    recorded = read_json(releases[1].path)["code"]
    assert recorded["stages"]["train_generator"]["kept"] == ["tinycats_core/training/step.py"]
    assert recorded["commit"] is None or len(recorded["commit"]) == 40
    said = "The result of the stage `train_generator` was made by earlier code and kept: `tinycats_core/training/step.py` changed"
    assert [said in (release.folder / "README.md").read_text() for release in releases] == [False, True]


def test_what_training_took_is_kept_as_it_was_recorded(built: Release, parts: dict[str, Any]):
    source = parts["choice"].weights.path
    assert (built.folder / "training_cost.json").read_bytes() == source.with_name("cost.json").read_bytes()
    stop, finish = map(json.loads, (built.folder / "training_diary.jsonl").read_text().splitlines())
    assert stop["cause"] == "checkpoints cannot be written"  # without the folder where it was
    assert finish == json.loads(source.with_name("diary.jsonl").read_text().splitlines()[-1])


def test_a_training_without_a_diary_is_released_without_its_cost(parts: dict[str, Any], tmp_path: Path):
    alone = shutil.copyfile(parts["choice"].weights.path, tmp_path / "ema.safetensors")
    choice = parts["choice"].model_copy(update={"weights": parts["choice"].weights.model_copy(update={"path": alone})})
    release = bundle.build(tmp_path / "registry", ReleaseParts(**{**parts, "choice": choice}))
    assert [path.name for path in release.folder.glob("training_*")] == []
    assert "## Training\n" not in (release.folder / "README.md").read_text()


def test_the_sheets_show_the_samples(built: Release):
    with Image.open(built.folder / "samples/grid.png") as grid, Image.open(built.folder / "samples/Bengal.png") as sheet:
        assert grid.height > 13 * 16
        assert len(sheet.getcolors(100_000) or []) > 50
    facts = json.loads((built.folder / "samples/metadata.json").read_text())
    assert facts["count"] == 52
    assert facts["sheets"]["Bengal.png"]["indices"] == [4, 5, 6, 7]
    assert facts["settings"]["runtime"] == "pytorch"


def test_nobodys_own_photos_leave_the_machine(built: Release, parts: dict[str, Any], tmp_path: Path):
    own = parts["dataset"].model_copy(update={"source": "folder"})
    release = bundle.build(tmp_path / "registry", ReleaseParts(**{**parts, "dataset": own}))
    assert not (release.folder / "samples/neighbours.png").exists()
    assert "neighbours.png" not in (release.folder / "README.md").read_text()
    assert "(samples/neighbours.png)" in (built.folder / "README.md").read_text()


def test_nothing_in_a_release_says_where_it_was_made(built: Release, parts: dict[str, Any]):
    trained = parts["choice"].weights.path.parents[2]
    places = {os.fsencode(place) for place in (ROOT, Path.home(), trained, built.folder.parents[1])}
    text = b"".join(path.read_bytes() for path in built.folder.rglob("*") if path.is_file())
    assert [place for place in places if place != b"/" and place in text] == []
    assert b"read from weights.pth" in text


def test_a_folder_of_photos_is_kept_by_its_name_alone(parts: dict[str, Any], tmp_path: Path):
    size = {"image_size": 16}
    data = {"source": "folder", "folder": "/somewhere/private/pets", "crop": "subject", "boxes": "/somewhere/private/boxes.csv"}
    config = load({"data": data | size, "model": size | {"patch_size": 4}})
    assert bundle.portable({"a": [f"see {config.data.folder}, and https://example.org/a/b", 3]}) == {
        "a": ["see pets, and https://example.org/a/b", 3]
    }
    photos = parts["dataset"].model_copy(update={"source": "folder"})
    settings = parts["config"].model_copy(
        update={"data": config.data, "publish": load({"publish": {"folder": "/private/r"}}).publish}
    )
    release = bundle.build(tmp_path, ReleaseParts(**{**parts, "config": settings, "dataset": photos}))
    kept = json.loads((release.folder / "release_config.json").read_text())
    assert (kept["data"]["folder"], kept["data"]["boxes"]) == ("pets", "boxes.csv")
    assert not {"publish", "compute"} & kept.keys()
    ReleaseConfig.model_validate(kept)
    assert "/private" not in "".join(path.read_text() for path in release.folder.glob("*.json"))


def test_the_hub_and_its_mixin_find_what_the_generator_is(built: Release, parts: dict[str, Any]):
    shape = read_json(built.folder / "config.json")
    assert {name: shape[name] for name in ("image_size", "patch_size", "width")} == {"image_size": 16, "patch_size": 4, "width": 32}
    assert tuple(shape["classes"]) == parts["dataset"].classes
    assert shape["sampling"]["guidance"] == parts["choice"].sample.guidance


def test_the_same_parents_give_the_same_version_which_stays_as_it_is(built: Release, parts: dict[str, Any]):
    stamps = {path: path.stat().st_mtime_ns for path in built.folder.rglob("*")}
    assert bundle.build(built.folder.parents[1], ReleaseParts(**parts)) == built
    assert {path: path.stat().st_mtime_ns for path in built.folder.rglob("*")} == stamps


def test_other_parents_give_another_version(built: Release, parts: dict[str, Any], tmp_path: Path):
    assert bundle.build(tmp_path, ReleaseParts(**{**parts, "baseline": None})).version != built.version


def test_a_release_that_is_timed_again_is_the_same_release(built: Release, parts: dict[str, Any], tmp_path: Path):
    again = parts["inference"].model_copy(update={"facts": parts["inference"].facts | {"notes": ["slower today"]}})
    assert bundle.build(tmp_path, ReleaseParts(**{**parts, "inference": again})).version == built.version


def test_a_training_without_raw_weights_is_released_without_their_picture(parts: dict[str, Any], tmp_path: Path):
    release = bundle.build(tmp_path, ReleaseParts(**{**parts, "ema_and_raw": None}))
    assert not (release.folder / "samples/ema_and_raw.png").exists()
    assert "ema_and_raw.png" not in (release.folder / "README.md").read_text()


def test_a_damaged_version_is_moved_aside_and_made_again(
    built: Release, parts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = bundle.build(tmp_path, ReleaseParts(**parts))
    (first.folder / "README.md").write_text("precious")
    second = bundle.build(tmp_path, ReleaseParts(**parts))
    assert second.version == first.version
    verify(second.folder)
    (aside,) = second.folder.parent.glob("*.damaged-*")
    assert (aside / "README.md").read_text() == "precious"
    assert "README.md has changed" in caplog.text


def test_two_builders_at_once_end_with_one_intact_release(parts: dict[str, Any], tmp_path: Path):
    found: list[Release] = []
    threads = [threading.Thread(target=lambda: found.append(bundle.build(tmp_path, ReleaseParts(**parts)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({release.version for release in found}) == 1
    assert len(found) == 3
    verify(found[0].folder)
    assert [path.name for path in found[0].folder.parent.iterdir()] == [found[0].version]


def test_the_key_ignores_where_and_minds_what(config: ReleaseConfig, parts: dict[str, Any]):
    dataset = parts["dataset"]
    key = bundle.release_key(config, dataset)

    def changed(part: str, **values: Any) -> ReleaseConfig:
        return config.model_copy(update={part: getattr(config, part).model_copy(update=values)})

    assert bundle.release_key(changed("publish", to="hub", folder=Path("/x"), private=True, approval=True), dataset) == key
    assert bundle.release_key(changed("compute", where="modal", gpu="T4"), dataset) == key
    assert bundle.release_key(config, dataset.model_copy(update={"path": Path("/y/images.safetensors")})) == key
    others = [
        bundle.release_key(changed("train", seed=9), dataset),
        bundle.release_key(changed("export", int8=False), dataset),
        bundle.release_key(changed("publish", name="other"), dataset),
        bundle.release_key(config, dataset.model_copy(update={"sha256": "0" * 64})),
    ]
    assert len({key, *others}) == 5


def test_any_changed_byte_of_any_file_is_found(release: Path):
    for path in sorted(release.rglob("*")):
        if path.is_file():
            intact = path.read_bytes()
            for position in {0, len(intact) // 3, len(intact) - 1}:
                path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
                with pytest.raises(RegistryError, match=path.name):
                    verify(release)
            path.write_bytes(intact)
    verify(release)


def test_every_byte_of_the_manifest_counts(release: Path):
    path = release / "release.json"
    intact = path.read_bytes()
    for position in range(0, len(intact), 7):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 4]) + intact[position + 1 :])
        with pytest.raises(RegistryError, match="release.json"):
            verify(release)
    spellings = [
        intact + b"\n",
        intact.replace(b": ", b":  ", 1),
        json.dumps(json.loads(intact)).encode(),
        intact.replace(b"tinycats", b"tinyc\\u0061ts", 1),
        b"[]",
        b"[" * 100_000,
    ]
    for spelling in spellings:
        path.write_bytes(spelling)
        with pytest.raises(RegistryError, match="release.json"):
            verify(release)


def test_missing_extra_and_linked_files_are_named(release: Path):
    (release / "samples/grid.png").unlink()
    (release / "notes.txt").write_text("extra")
    (release / "samples/outside").symlink_to(release.parent)
    with pytest.raises(RegistryError) as caught:
        verify(release)
    message = str(caught.value)
    assert "samples/grid.png is missing" in message
    assert "notes.txt is not part of the release" in message
    assert "samples/outside is not part of the release" in message
    assert "\n" not in message


def test_what_a_download_from_the_hub_leaves_beside_a_release_is_no_problem(release: Path):
    for name in (".gitattributes", ".git/HEAD", ".cache/huggingface/download/model.metadata"):
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_text("")
    verify(release)
    (release / ".cache/other").write_text("")
    with pytest.raises(RegistryError, match=".cache/other is not part of the release"):
        verify(release)
