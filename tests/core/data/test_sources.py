"""The table of sources: what a setting may name, and a source that is added from outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinycats_core.config import DataConfig
from tinycats_core.data import preparation, sources, splits, validation
from tinycats_core.data.decode import Decoded, Progress
from tinycats_core.data.source import Collected, Source, split_as_given
from tinycats_core.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "flickr"}, "data.source is 'flickr'; allowed: toycats, folder, oxford_pets"),
        ({"source": "folder"}, "data.folder is missing: source=folder needs the folder that holds the images"),
        (
            {"source": "toycats", "folder": "photos"},
            "data.folder is given but data.source is 'toycats': set data.source to 'folder'",
        ),
    ],
)
def test_impossible_settings_name_the_field_the_value_and_what_is_allowed(settings: dict, message: str):
    with pytest.raises(ConfigError) as error:
        sources.check(DataConfig(**settings))
    assert str(error.value).startswith(message)


def test_settings_that_fit_pass():
    sources.check(DataConfig(source="oxford_pets"))
    sources.check(DataConfig(source="folder", folder=Path("photos")))


def test_an_unknown_source_is_refused_before_anything_is_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="data.source is 'flickr'"):
        preparation.prepare(DataConfig(source="flickr"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Squares(Source):
    """Six squares of two colours."""

    name = "squares"
    settings = ()
    split_rule = "a third each"
    licence = "mit"
    dataset_id = "squares"
    dataset_name = "Squares"
    note = "It was trained on squares."

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        return {"version": 1}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        size = config.image_size
        drawn = [
            Decoded(f"{split}/{label}", label, split, f"{split} {label}", size, size, np.full((3, size, size), shade, np.uint8))
            for split in ("train", "val", "test")
            for label, shade in (("dark", 20), ("bright", 230))
        ]
        return Collected(("dark", "bright"), split_as_given(drawn), [], 0)


def test_a_source_is_added_by_one_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    sources.register(Squares())
    config = DataConfig(source="squares", image_size=8)
    dataset = preparation.prepare(config, tmp_path)
    images, labels = splits.load_split(dataset, "val")
    assert dataset.classes == ("dark", "bright")
    assert torch.equal(images.float().mean((1, 2, 3)), torch.tensor([230.0, 20.0]))
    assert labels.tolist() == [1, 0]
    assert validation.validate(dataset, config).warnings == ()
