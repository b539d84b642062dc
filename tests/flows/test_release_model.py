"""A whole release, small enough to take seconds: published, found again, refused, and asked for wrongly."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.sorting import ArtifactSort

from flows.release_model import main, release_model
from tinycats_core.errors import ReleaseRejected, TinycatsError
from tinycats_core.files import home
from tinycats_core.records import Release
from tinycats_core.release import manifest, registry
from tinycats_core.tensors import read_header

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("prefect_server")


def merged(base: dict, **parts: dict) -> dict:
    """Return nested settings with those of some parts replaced."""
    return {**base, **{name: {**base.get(name, {}), **part} for name, part in parts.items()}}


def executed(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Return the names of the stages that have run."""
    return {record.getMessage().split(":")[0] for record in caplog.records if record.msg == "%s: done in %.1f s"}


def latest(overrides: dict) -> Path:
    return Path(overrides["publish"]["folder"]) / "tiny" / "latest"


def test_a_release_is_published_and_intact(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    release = release_model("smoke", tiny)
    assert release.published
    assert latest(tiny).resolve() == release.folder
    files = manifest.verify(latest(tiny))["files"]
    assert {
        "model.safetensors",
        "denoiser-fp32.onnx",
        "denoiser-int8.onnx",
        "cats-fp32.onnx",
        "cats-int8.onnx",
        "classifier.onnx",
        "classifier.json",
        "metrics.json",
        "precision.json",
        "sweep.json",
        "samples/course.png",
        "samples/ema_and_raw.png",
        "README.md",
    } <= files.keys()
    benchmark = json.loads((release.folder / "benchmark.json").read_text())
    assert [facts["max_abs_diff"] for facts in benchmark["graphs"].values()] == [0, 0]
    assert [row["runtime"] for row in benchmark["inference"]["rows"]] == ["pytorch", "onnx-fp32", "onnx-int8"]
    assert (
        benchmark["inference"]["sample"]["guidance"]
        == json.loads((release.folder / "sweep.json").read_text())["sample"]["guidance"]
    )
    sweep = json.loads((release.folder / "sweep.json").read_text())
    tried = [(row["step"], row["ema_decay"], row["guidance"]) for row in sweep["rows"]]
    step = sweep["step"]
    assert tried[:2] == [(200, 0.98, 1), (400, 0.98, 1)]  # the snapshots, then the other pairs of the chosen one
    assert tried[2:] == [(step, 0.98, 1.5), (step, 0.9, 1), (step, 0.9, 1.5)]
    assert read_header(release.folder / "model.safetensors", "generator")["step"] == step
    assert read_header(release.folder / "model.safetensors", "generator")["facts"]["ema_decay"] == sweep["ema_decay"]
    measured = json.loads((release.folder / "metrics.json").read_text())
    drawn = [measured["candidate"]["conditions"], measured["onnx"]["onnx-int8"]["conditions"]]
    assert [conditions["guidance"] for conditions in drawn] == [sweep["sample"]["guidance"]] * 2
    assert {conditions["split"] for conditions in drawn} == {"test"}
    printed = capsys.readouterr().out
    assert str(release.folder) in printed
    assert "promoted" in printed
    assert "kid_breed" in printed


def test_the_second_run_finds_it_published(
    tiny: dict[str, Any], released: Release, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        again = release_model("smoke", tiny)
    assert again.version == released.version
    assert executed(caplog) == set()
    assert "no stage executed" in capsys.readouterr().out
    with get_client(sync_client=True) as client:
        of_summaries = ArtifactFilter(key=ArtifactFilterKey(any_=["summary"]))
        newest = client.read_artifacts(artifact_filter=of_summaries, sort=ArtifactSort.CREATED_DESC)[0]
    page = str(newest.data)
    assert page.startswith("![samples](data:image/webp")
    before, after = page.split("- **release**")[0], page.split("### Standard errors")[1]
    found = [line.split(" | ")[0].strip("| ") for line in before.splitlines() if line.startswith("| ")][2:]
    assert found == ["kid_breed", "fd_breed", "precision", "recall", "copy_rate"]
    assert "kid_breed_std" in after
    assert "kid_breed_std" not in page.split("### Standard errors")[0]


def test_the_same_configuration_elsewhere_takes_every_stage_but_the_bundle_from_the_cache(
    tiny: dict[str, Any], tiny_release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        again = release_model("smoke", tiny)
    assert again.folder != tiny_release.folder
    assert executed(caplog) == {"build_bundle"}


@pytest.mark.parametrize(
    ("pattern", "damage", "stage"),
    [
        ("data/*/images.safetensors", "gone", "prepare_data"),
        ("classifier/*/classifier.safetensors", "changed", "train_classifier"),
        ("training/*/ema.safetensors", "gone", "train_generator"),
        ("training/*/ema.safetensors", "changed", "train_generator"),
        ("training/*/ema-0.9.safetensors", "gone", "train_generator"),
        ("training/*/ema-0.9.safetensors", "changed", "train_generator"),
        ("training/*/raw.safetensors", "gone", "train_generator"),
        ("training/*/raw.safetensors", "changed", "train_generator"),
        ("evaluations/sweep-*.json", "gone", "choose_sampling"),
        ("samples/*/ema_and_raw.png", "changed", "compare_with_raw"),
        ("samples/*/samples.safetensors", "gone", "generate_samples"),
        ("evaluations/fidelity-*.json", "gone", "measure"),
        ("export/*/denoiser-fp32.onnx", "gone", "export_onnx"),
        ("export/*/denoiser-int8.onnx", "changed", "quantize"),
        ("export/*/cats-int8.onnx", "changed", "export_graph"),
        ("export/*/inference.json", "gone", "benchmark_inference"),
        ("export/*/classifier.onnx", "changed", "export_classifier"),
    ],
)
def test_a_damaged_file_is_made_again_by_its_own_stage_alone(
    pattern: str, stage: str, damage: str, tiny: dict[str, Any], tiny_release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = list(home().glob(pattern))
    assert damaged
    for path in damaged:
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.INFO):
        again = release_model("smoke", tiny)
    further = {"choose_precision"} if stage == "benchmark_inference" else set()  # by times that were measured anew
    assert executed(caplog) == {stage, *further, "build_bundle"}
    assert again.version == tiny_release.version


def test_a_rejected_candidate_ends_the_run_and_leaves_the_published_one(tiny: dict[str, Any], released: Release) -> None:
    before = latest(tiny).readlink()
    worse = merged(tiny, train={"steps": 2, "warmup_steps": 1})
    state = release_model("smoke", worse, return_state=True)
    assert state.is_failed()
    assert "kid" in str(state.message)
    with pytest.raises(ReleaseRejected):
        state.result()
    assert latest(tiny).readlink() == before
    run_id = state.state_details.flow_run_id
    assert run_id
    with get_client(sync_client=True) as client:
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        artifacts = client.read_artifacts(artifact_filter=of_this_run)
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
    assert {"decision", "reason", "sweep", "ema-and-raw"} <= {artifact.key for artifact in artifacts}
    assert run.state_name == "Failed"


def test_a_refused_candidate_can_be_forced_and_says_why(
    tiny: dict[str, Any], released: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    strict, before = merged(tiny, evaluate={"max_kid": 1e-9}), latest(tiny).readlink()
    looked = release_model("smoke", strict, force="they wait", dry_run=True)
    assert f"not published: {looked.folder}" in capsys.readouterr().out
    assert latest(tiny).readlink() == before
    forced = release_model("smoke", strict, force="they wait")
    assert (forced.version, latest(tiny).resolve()) == (looked.version, looked.folder)
    decision = json.loads((forced.folder / "decision.json").read_text())
    assert (decision["promoted"], decision["forced"], decision["baseline"]) == (False, "they wait", str(before))
    assert "A person published it anyway: they wait" in (forced.folder / "README.md").read_text()
    assert "forced (compared with" in capsys.readouterr().out
    entry = registry.read_history(forced.folder.parents[1], "tiny")[-1]
    assert (entry.version, entry.how, entry.why) == (forced.version, "forced", "they wait")


def test_a_candidate_is_judged_beside_the_published_one(tiny: dict[str, Any], released: Release) -> None:
    second = release_model("smoke", merged(tiny, sample={"seed": 7, "guidance": 1.25, "guidance_interval": [0.1, 1]}))
    assert second.version != released.version
    decision = json.loads((second.folder / "decision.json").read_text())
    assert decision["baseline"] == released.version
    measured = json.loads((second.folder / "metrics.json").read_text())
    own = json.loads((released.folder / "sweep.json").read_text())["sample"]
    before, now = (measured[name]["conditions"] for name in ("baseline", "candidate"))
    assert (before["guidance"], before["guidance_interval"]) == (own["guidance"], own["guidance_interval"])
    assert (now["guidance"], now["guidance_interval"]) == (1.25, [0.1, 1])
    assert before["sampler"] == now["sampler"] == {"sampler": "ab2", "steps": 8, "shift": 0.5, "seed": 7}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"stepz": 3}}, "train.stepz is not a setting; allowed: steps"),
        ({"model": {"patch_size": 5}}, "model.patch_size is 5, which does not divide"),
        ({"data": {"source": "folder", "folder": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"train": {"resume_from": "/nowhere/run"}}, "train.resume_from is /nowhere/run, which does not exist"),
        ({"train": {"start_from": "nowhere"}}, "train.start_from is nowhere: there is no release, neither in that folder nor"),
        ({"compute": {"where": "modal"}}, "modal token new"),
        ({"publish": {"to": "hub"}}, "there is no Hugging Face token here"),
    ],
)
def test_bad_input_fails_before_any_stage(
    tiny: dict[str, Any], parts: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(TinycatsError) as raised:
        release_model("smoke", merged(tiny, **parts))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert executed(caplog) == set()
    assert not latest(tiny).exists()


def test_high_accuracy_without_credentials_says_what_to_do_before_any_stage(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(TinycatsError, match="modal token new"):
        release_model("high-accuracy")
    assert executed(caplog) == set()


def test_a_force_without_a_reason_fails_before_any_stage(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(TinycatsError, match="Say why in a few words"):
        release_model("smoke", tiny, force=" ")
    assert "done in" not in caplog.text


def test_a_folder_that_is_no_registry_is_left_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter.txt").write_text("dear")
    with pytest.raises(TinycatsError, match="not a registry"):
        release_model("smoke", merged(tiny, publish={"folder": str(tmp_path / "documents")}))
    assert [path.name for path in (tmp_path / "documents").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "enormous"], "preset is 'enormous'; allowed: smoke, photos, standard"),
        (["--overrides", "{steps: 3}"], "overrides is not JSON"),
        (["--overrides", "[]"], "it must be a JSON object"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    (error,) = capsys.readouterr().err.splitlines()  # no server was started to find that out
    assert error.startswith("error: ")
    assert message in error


def test_a_stopped_command_leaves_a_checkpoint_and_its_exit_code(prefect_server: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    long = merged(tiny, train={"steps": 100_000, "checkpoint_every": 100_000, "sample_every": 100_000, "seed": 3})
    command = [sys.executable, "-m", "flows.release_model", "--overrides", json.dumps(long)]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "TINYCATS_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "training to step 50000 of 100000" not in (line := process.stderr.readline()):
            assert line, "the command ended before it trained"
        while not list((tmp_path / "home" / "training").glob("*/log.jsonl")):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "home" / "training").glob("*/checkpoints/step-*.safetensors"))
    assert not latest(tiny).exists()


def test_the_command_ends_with_its_exit_code_and_no_traceback(prefect_server: str, tiny: dict[str, Any]) -> None:
    wrong = merged(tiny, data={"source": "folder", "folder": "/nowhere/at/all"})
    command = [sys.executable, "-m", "flows.release_model", "--overrides", json.dumps(wrong)]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: data.folder /nowhere")]
    assert "Traceback" not in done.stderr
