"""A stage runs once for each content of its arguments, and again when its files are gone or changed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow
from prefect.states import Failed

from tasks.cache import content_of, key_of
from tasks.runs import tally
from tasks.stage import may_pass, stage
from tinycats_core import records
from tinycats_core.config import ComputeConfig, DataConfig, ReleaseConfig, TrainConfig
from tinycats_core.errors import DataError, ModalUnreachable, RegistryError, TinycatsError
from tinycats_core.files import home, sha256_of
from tinycats_core.records import Trained, Weights


def record(path: Path, text: str = "weights") -> Weights:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Weights(path=path, sha256=sha256_of(path), kind="generator", step=1)


def test_a_key_is_what_things_are_and_not_where_they_lie(tmp_path: Path) -> None:
    here, there = record(tmp_path / "here" / "a"), record(tmp_path / "there" / "b")
    other = record(tmp_path / "other" / "a", "other weights")
    assert key_of(here, TrainConfig()) == key_of(there, TrainConfig())
    assert key_of(here) != key_of(other)
    assert key_of(here, TrainConfig()) != key_of(here, TrainConfig(seed=1))
    assert key_of([here, None]) != key_of([None, here])


def test_where_something_is_computed_is_in_no_key() -> None:
    assert key_of(ComputeConfig()) == key_of(ComputeConfig(where="modal", gpu="H100"))
    assert key_of(ReleaseConfig()) == key_of(ReleaseConfig(compute=ComputeConfig(device="cpu")))
    assert key_of(ReleaseConfig()) != key_of(ReleaseConfig(train=TrainConfig(seed=1)))


def test_a_data_configuration_stands_for_the_files_it_names(tmp_path: Path) -> None:
    for name in ("cat/Bengal/1.jpg", "other/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    config = DataConfig(source="folder", folder=tmp_path)
    before = key_of(config)
    assert key_of(config) == before
    (tmp_path / "cat/Bengal/2.jpg").write_bytes(b"2")
    assert key_of(config) != before


def test_what_has_no_content_cannot_be_part_of_a_key() -> None:
    with pytest.raises(TypeError, match="object cannot be part of a key"):
        content_of(object())


def test_only_what_a_network_does_is_tried_again() -> None:
    def again(error: Exception) -> bool:
        return may_pass(None, None, Failed(data=error))

    refused = RegistryError("HTTP 403")
    lost = RegistryError("the network is down")
    lost.__cause__ = ConnectionError()
    assert again(lost)
    assert again(ModalUnreachable("no answer"))
    assert not again(refused)
    assert not again(DataError("no images"))


Made = tuple[Callable[[Weights, str], tuple[Weights, str]], list[str], Weights]


@pytest.fixture
def made(prefect_server: str, tmp_path: Path) -> Made:
    """A flow of one stage, whose calls are counted."""
    calls: list[str] = []

    @stage(beside=("log.txt",))
    def make(source: Weights, place: str) -> Weights:
        calls.append(place)
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "log.txt").write_text("log")
        return record(tmp_path / place / "made", source.path.read_text() + " made")

    @flow
    def one_stage(source: Weights, place: str) -> tuple[Weights, str]:
        return make(source, place), tally()

    return one_stage, calls, record(tmp_path / "source")


def test_the_second_run_takes_the_result_from_the_cache(made: Made, tmp_path: Path) -> None:
    one_stage, calls, source = made
    first, said = one_stage(source, "a")
    assert said == "1 stage executed, 0 came from the cache"
    moved = record(tmp_path / "elsewhere")
    second, said = one_stage(moved, "a")
    assert (second, said) == (first, "nothing to do: no stage executed, 1 came from the cache")
    assert calls == ["a"]


@pytest.mark.parametrize("damage", ["gone", "changed", "its log is gone"])
def test_a_result_whose_files_are_gone_or_changed_is_made_again(made: Made, damage: str) -> None:
    one_stage, calls, source = made
    place = damage.replace(" ", "-")
    first, _ = one_stage(source, place)
    if damage == "gone":
        first.path.unlink()
    elif damage == "changed":
        first.path.write_text("something else")
    else:
        (first.path.parent / "log.txt").unlink()
    second, said = one_stage(source, place)
    assert said == "1 stage executed, 0 came from the cache"
    assert second == first.verify()
    assert calls == [place] * 2


@pytest.mark.parametrize("left", ["", '{"metadata": {', '{"result": "{}"}'])
def test_a_result_that_a_killed_process_left_half_written_is_made_again(made: Made, left: str) -> None:
    one_stage, calls, source = made
    place = f"half-{len(left)}"
    before = set((home() / "results").glob("make-*"))
    first, _ = one_stage(source, place)
    (kept,) = set((home() / "results").glob("make-*")) - before
    kept.write_text(left)
    assert one_stage(source, place) == (first, "1 stage executed, 0 came from the cache")
    assert one_stage(source, place) == (first, "nothing to do: no stage executed, 1 came from the cache")
    assert calls == [place] * 2


def test_a_damaged_argument_is_refused_before_anything_is_computed(made: Made, tmp_path: Path) -> None:
    one_stage, calls, _ = made
    source = record(tmp_path / "source")
    source.path.write_text("weightz")
    with pytest.raises(TinycatsError, match="source has changed: its sha256 is"):
        one_stage(source, "damaged")
    assert calls == []


def test_each_file_of_nested_arguments_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(records, "sha256_of", lambda path: (hashed.append(path), sha256_of(path))[1])
    parts = [record(tmp_path / name) for name in "abc"]

    @stage()
    def use(trained: Trained, others: dict[str, list[Weights]]) -> int:
        return 1

    use.fn(Trained(averages=(parts[0], parts[1]), raw=parts[2]), {"again": [parts[0]]})
    assert hashed == [part.path for part in parts]


def test_results_are_kept_as_json_under_the_home(made: Made) -> None:
    one_stage, _, source = made
    one_stage(source, "json")
    kept = [json.loads(path.read_text()) for path in (home() / "results").glob("make-*")]
    assert "tinycats_core.records.Weights" in {json.loads(item["result"])["__class__"] for item in kept}


def test_an_error_for_people_is_shown_without_a_traceback(prefect_server: str, caplog: pytest.LogCaptureFixture) -> None:
    @stage()
    def fail(number: int) -> int:
        raise DataError("data.folder is /nowhere, which is not a folder. Give another.")

    @flow
    def failing() -> int:
        return fail(1)

    with caplog.at_level(logging.INFO), pytest.raises(DataError):
        failing()
    assert "data.folder is /nowhere" in caplog.text
    assert "Traceback" not in caplog.text


def test_any_other_error_keeps_its_traceback(prefect_server: str, caplog: pytest.LogCaptureFixture) -> None:
    @flow
    def broken() -> int:
        raise KeyError("a defect")

    with caplog.at_level(logging.INFO), pytest.raises(KeyError):
        broken()
    assert "Traceback" in caplog.text
