"""docs/extending.md as a reader meets it: each block is executed, from outside the package, and what it adds is used."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sets import make_samples

from tinycats_core.compute import costs
from tinycats_core.compute.gpus import GPUS
from tinycats_core.config import ComputeConfig, DataConfig, EvaluateConfig, ModelConfig, SampleConfig, TrainConfig
from tinycats_core.data import sources
from tinycats_core.data.preparation import prepare
from tinycats_core.data.splits import load_split
from tinycats_core.data.validation import validate
from tinycats_core.evaluation import fidelity, metrics
from tinycats_core.generator.samplers import SAMPLERS, integrate
from tinycats_core.generator.sampling import sample
from tinycats_core.presets import PRESETS, resolve
from tinycats_core.records import Dataset, Weights
from tinycats_core.release import card_words

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))


@pytest.fixture(autouse=True)
def tables_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give every table back as it was: other tests count their rows."""
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS)
    tables: list[dict[str, Any]] = [SAMPLERS, sources.SOURCES, card_words.METRICS, PRESETS, GPUS]
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def add(heading: str) -> None:
    """Execute the block below a heading."""
    exec(compile(BLOCKS[heading], f"docs/extending.md: {heading}", "exec"), {"__name__": "extension"})


def test_every_addition_has_a_block():
    assert list(BLOCKS) == ["A sampler", "A data source", "A metric", "A preset", "A GPU"]


def test_a_sampler():
    add("A sampler")

    def towards_grey(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (0.3 - x) / (1 - t).clamp_min(0.05).view(-1, 1, 1, 1)

    settings = SampleConfig(sampler="midpoint", steps=4, guidance=1)
    images = sample(towards_grey, torch.tensor([0, 1]), 8, 2, settings)
    assert (images.int() - round((0.3 + 1) * 127.5)).abs().max() <= 1
    times = [i / 64 for i in range(65)]
    end = integrate(lambda x, t: x * math.cos(t), torch.ones(1, dtype=torch.float64), SAMPLERS["midpoint"](times))
    assert float(end) == pytest.approx(math.exp(math.sin(1)), abs=1e-2)


def test_a_data_source(tmp_path: Path):
    add("A data source")
    config = DataConfig(source="fractals", image_size=16)
    sources.check(config)
    dataset = prepare(config, tmp_path)
    assert (dataset.source, dataset.classes) == ("fractals", ("coarse", "fine"))
    assert dataset.train_count + dataset.val_count + dataset.test_count == len(load_split(dataset, "train")[0]) + 4 + 8
    assert [row["class"] for row in validate(dataset, config).rows] == ["coarse", "fine"]
    assert prepare(config, tmp_path) == dataset


def test_a_metric(dataset: Dataset, classifier: Weights, tmp_path: Path):
    add("A metric")
    images, labels = load_split(dataset, "test")
    samples = make_samples(tmp_path / "samples.safetensors", images, labels)
    config = EvaluateConfig(extractor="breed", samples=len(images), kid_subsets=2)
    report = fidelity.evaluate(samples, dataset, config, classifier, tmp_path, "cpu")
    assert report.metrics["brightness"] == pytest.approx(images.double().mean().item() / 255)
    assert report.floor["brightness"] == pytest.approx(load_split(dataset, "train")[0].double().mean().item() / 255, abs=0.05)
    assert card_words.METRICS["brightness"]


def test_a_preset():
    add("A preset")
    assert resolve("tiny", {"train": {"steps": 500}}).publish.name == "tinycats-tiny"


def test_a_gpu():
    add("A GPU")
    compute = ComputeConfig(where="modal", gpu="B300:2", processes=2)
    found = costs.estimate(ModelConfig(), TrainConfig(), compute)
    assert found.hours
    hourly = 7.5 + 2 * 0.0000131 * 3600 + 16 * 0.00000222 * 3600  # with its cores and memory
    assert found.dollars == pytest.approx([hours * hourly * 2 for hours in found.hours])
