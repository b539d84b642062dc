"""What must never be published, and why it is not: each canary is refused, and by the term that is about it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_sets import draw_cats, make_dataset, make_samples
from torch import Tensor

from benchmarks.judge.canaries import FIRST, PATCH, REPLACING, Draw
from tinycats_core.config import ClassifierConfig, EvaluateConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import ReleaseRejected
from tinycats_core.evaluation import fidelity, gate
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.records import Dataset, Decision, FidelityReport, Weights

CLASSES = ("Abyssinian", "Bombay", "Persian", "Sphynx", "other")
SIZE, EACH = 32, 32
CONFIG = EvaluateConfig(extractor="breed", samples=len(CLASSES) * EACH, kid_subsets=50)
LABELS = torch.arange(len(CLASSES)).repeat_interleave(EACH)

UNSEEN = draw_cats(CLASSES, EACH, SIZE, seed=2)[0]


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Held-out pictures, twice as many as are needed: one half is the test split, the other one is passed off as generated."""
    return draw_cats(CLASSES, 2 * EACH, SIZE, seed=1)


@pytest.fixture(scope="module")
def cats(drawn: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train = draw_cats(CLASSES, 40, SIZE, seed=0)
    return make_dataset(tmp_path_factory.mktemp("cats"), train, (drawn[0][::2], drawn[1][::2]), CLASSES)


@pytest.fixture(scope="module")
def classifier(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    config = ClassifierConfig(backbone="resnet8", epochs=4, batch_size=24)
    return train_classifier(cats, config, tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="module")
def measure(cats: Dataset, classifier: Weights, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], FidelityReport]:
    folder = tmp_path_factory.mktemp("evaluations")

    def measure(images: Tensor) -> FidelityReport:
        samples = make_samples(folder / f"{images.sum()}.safetensors", images, LABELS, patch_size=PATCH)
        return fidelity.evaluate(samples, cats, CONFIG, classifier, folder, "cpu")

    return measure


@pytest.fixture(scope="module")
def honest(measure: Callable[[Tensor], FidelityReport], drawn: tuple[Tensor, Tensor]) -> FidelityReport:
    return measure(drawn[0][1::2])


@pytest.fixture(scope="module")
def draw(cats: Dataset) -> Callable[[Draw], Tensor]:
    train, labels = load_split(cats, "train")
    copied = torch.cat([train[labels == label][:EACH] for label in range(len(CLASSES))])
    return lambda canary: canary(copied, UNSEEN, LABELS)


def failed(decision: Decision) -> list[str]:
    return [term.name for term in decision.terms if not term.passed]


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("canary", "term"), FIRST, ids=name_of)
def test_a_first_release_is_refused_for_its_reason(
    canary: Draw, term: str, draw: Callable[[Draw], Tensor], measure: Callable[[Tensor], FidelityReport], tmp_path: Path
) -> None:
    decision = gate.decide(measure(draw(canary)), None, None, CONFIG, tmp_path)
    assert term in failed(decision), decision.terms
    with pytest.raises(ReleaseRejected, match=f"{term}: "):
        gate.require_promoted(decision)


@pytest.mark.parametrize(("canary", "term"), REPLACING, ids=name_of)
def test_an_honest_release_is_not_replaced_by_a_canary(
    canary: Draw,
    term: str,
    draw: Callable[[Draw], Tensor],
    measure: Callable[[Tensor], FidelityReport],
    honest: FidelityReport,
    tmp_path: Path,
) -> None:
    candidate = measure(draw(canary))
    decision = gate.decide(candidate, honest, "0123456789ab", CONFIG, tmp_path)
    assert term in failed(decision), decision.terms
    assert gate.decide(honest, candidate, "0123456789ab", CONFIG, tmp_path).promoted


def test_real_pictures_that_are_passed_off_as_generated_pass(
    measure: Callable[[Tensor], FidelityReport], honest: FidelityReport, tmp_path: Path
) -> None:
    decision = gate.decide(honest, None, None, CONFIG, tmp_path)
    assert gate.require_promoted(decision) is decision
    assert decision.baseline is None
    others = measure(UNSEEN)
    assert gate.decide(others, honest, "0123456789ab", CONFIG, tmp_path).promoted
    assert gate.decide(honest, others, "0123456789ab", CONFIG, tmp_path).promoted


def test_a_weak_but_honest_generator_passes(measure: Callable[[Tensor], FidelityReport], cats: Dataset, tmp_path: Path) -> None:
    """Pictures are drawn from a normal distribution that is fit to the pixels of each class."""
    train, labels = load_split(cats, "train")
    generator, drawn = torch.Generator().manual_seed(7), []
    for label in range(len(CLASSES)):
        pixels = train[labels == label].float().flatten(1)
        mix = torch.randn(EACH, len(pixels), generator=generator) / len(pixels) ** 0.5
        drawn.append(pixels.mean(0) + mix @ (pixels - pixels.mean(0)))
    images = torch.cat(drawn).round().clamp(0, 255).to(torch.uint8).view(-1, 3, SIZE, SIZE)
    decision = gate.decide(measure(images), None, None, CONFIG, tmp_path)
    assert decision.promoted, decision.terms


def test_the_seams_of_patches_show(measure: Callable[[Tensor], FidelityReport], honest: FidelityReport) -> None:
    images = UNSEEN.float()
    shade = torch.arange(SIZE // PATCH) % 2 * 24.0
    board = (shade[:, None] + shade).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1) - 24
    seen, real = measure((images + board).clamp(0, 255).to(torch.uint8)).metrics["patch_step"], honest.floor["patch_step"]
    assert seen is not None
    assert real is not None
    assert honest.metrics["patch_step"] == pytest.approx(real, rel=0.1)
    assert seen > 1.5 * real
