"""Files are either complete or absent."""

import json
import os
from pathlib import Path

import pytest

from tinycats_core.errors import TinycatsError
from tinycats_core.files import (
    atomic_path,
    check_writable,
    digest_of,
    home,
    parse_json,
    read_json,
    sha256_of,
    write_json,
    write_text,
)
from tinycats_core.records import Dataset, FileRecord


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = write_text(tmp_path / "a.txt", "old")

    def half_written():
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half_written()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    for content in ("one", "two"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert os.listdir(tmp_path / "folder") == ["two"]
    assert os.listdir(tmp_path) == ["folder"]


def test_json_refuses_what_is_not_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(TinycatsError, match=r"b\.json is not a JSON file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(TinycatsError, match="does not exist"):
        read_json(tmp_path / "c.json")


def test_json_that_is_too_large_or_no_file_is_not_read(tmp_path: Path):
    (tmp_path / "a.json").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(TinycatsError, match=r"has 203 bytes; a JSON file may have 100"):
        read_json(tmp_path / "a.json", 100)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(TinycatsError, match="is not a regular file"):
            read_json(path)


@pytest.mark.parametrize("text", ["NaN", "[1e999]", '{"a": -Infinity}', '"\\udc00"', "1" * 21, "[" * 65 + "]" * 65, "[" * 10**5])
def test_json_that_no_file_of_the_project_holds_is_a_value_error(text: str):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_json_of_the_project_is_read():
    value = {"a": [1, -2.5, 2**63, None, True, "ü", "\N{GRINNING CAT FACE WITH SMILING EYES}"], "b": {}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 64 + "]" * 64)


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TinycatsError, match=r"cannot write to .*file/home: Not a directory"):
        check_writable(tmp_path / "file" / "home")


@pytest.mark.parametrize(
    ("named", "where"), [(None, ".tinycats"), ("", ".tinycats"), ("below", "below"), ("~/x", "/me/x"), ("/x", "/x")]
)
def test_home_is_where_the_environment_says(named: str | None, where: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.delenv("TINYCATS_HOME")
    if named is not None:
        monkeypatch.setenv("TINYCATS_HOME", named)
    assert home() == Path.cwd() / where


def test_a_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYCATS_HOME", "~nobody.here/x")
    with pytest.raises(TinycatsError, match=r"^TINYCATS_HOME is '~nobody\.here/x': ~nobody\.here is .*; write the path in full$"):
        home()


def test_a_record_knows_when_its_file_is_gone_or_changed(tmp_path: Path):
    path = write_text(tmp_path / "a", "content")
    record = FileRecord(path=path, sha256=sha256_of(path))
    assert record.verify() is record
    path.write_text("c0ntent")
    assert not record.is_intact()
    with pytest.raises(TinycatsError, match="has changed"):
        record.verify()
    path.unlink()
    assert not record.is_intact()
    with pytest.raises(TinycatsError, match="is gone"):
        record.verify()


def test_a_record_is_the_same_thing_wherever_it_lies(tmp_path: Path):
    facts = {"sha256": "0" * 64, "source": "toycats", "image_size": 8, "classes": ("a",), "train_count": 1, "val_count": 0}
    here = Dataset(path=tmp_path / "here", test_count=1, **facts)
    there = Dataset(path=tmp_path / "there", test_count=1, **facts)
    other = Dataset(path=tmp_path / "here", test_count=2, **facts)
    assert here.content == there.content
    assert here.content != other.content
