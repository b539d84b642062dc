"""What must never be published, and why it is not: each canary is refused, and by the term that is about it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_sets import draw_cats, make_dataset, make_samples
from torch import Tensor

from tinycats_core import fidelity, gate
from tinycats_core.classifier import train_classifier
from tinycats_core.config import ClassifierConfig, EvaluateConfig, ModelConfig, SampleConfig
from tinycats_core.data import load_split
from tinycats_core.errors import ReleaseRejected
from tinycats_core.model import TinyDiT
from tinycats_core.records import Checkpoint, Dataset, Decision, FidelityReport
from tinycats_core.sampling import sample

CLASSES = ("Abyssinian", "Bombay", "Persian", "Sphynx", "other")
SIZE, EACH, PATCH = 32, 32, 8
CONFIG = EvaluateConfig(extractor="breed", samples=len(CLASSES) * EACH, kid_subsets=50)
LABELS = torch.arange(len(CLASSES)).repeat_interleave(EACH)

Draw = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Held-out pictures, twice as many as are needed: one half is the test split, the other one is passed off as generated."""
    return draw_cats(CLASSES, 2 * EACH, SIZE, seed=1)


@pytest.fixture(scope="module")
def cats(drawn: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train = draw_cats(CLASSES, 40, SIZE, seed=0)
    return make_dataset(tmp_path_factory.mktemp("cats"), train, (drawn[0][::2], drawn[1][::2]), CLASSES)


@pytest.fixture(scope="module")
def eyes(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = ClassifierConfig(backbone="resnet18", epochs=4, batch_size=24)
    return train_classifier(cats, config, tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="module")
def measure(cats: Dataset, eyes: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], FidelityReport]:
    folder = tmp_path_factory.mktemp("evaluations")

    def measure(images: Tensor) -> FidelityReport:
        samples = make_samples(folder / f"{images.sum()}.safetensors", images, LABELS, patch_size=PATCH)
        return fidelity.evaluate(samples, cats, CONFIG, eyes, folder, "cpu")

    return measure


@pytest.fixture(scope="module")
def honest(measure: Callable[[Tensor], FidelityReport], drawn: tuple[Tensor, Tensor]) -> FidelityReport:
    return measure(drawn[0][1::2])


def with_noise(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def copycat(train: Tensor, labels: Tensor) -> Tensor:
    return with_noise(torch.cat([train[labels == label][:EACH] for label in range(len(CLASSES))]), 4)


def mirrored_copycat(train: Tensor, labels: Tensor) -> Tensor:
    return copycat(train, labels).flip(-1)


def noisy_copycat(train: Tensor, labels: Tensor) -> Tensor:
    """Training images under so much noise that their pixels no longer say so; their features do."""
    return with_noise(copycat(train, labels), 12)


def now_and_then_a_copy(train: Tensor, labels: Tensor) -> Tensor:
    images = unseen(train, labels)
    images[::8] = copycat(train, labels)[::8]
    return images


def one_picture(train: Tensor, labels: Tensor) -> Tensor:
    return unseen(train, labels)[:1].repeat(len(LABELS), 1, 1, 1)


def one_picture_a_class(train: Tensor, labels: Tensor) -> Tensor:
    return unseen(train, labels)[::EACH].repeat_interleave(EACH, 0)


def one_picture_a_class_with_noise(train: Tensor, labels: Tensor) -> Tensor:
    return with_noise(one_picture_a_class(train, labels), 4)


def one_picture_with_noise(train: Tensor, labels: Tensor) -> Tensor:
    return with_noise(one_picture(train, labels), 4)


def three_pictures_a_class_with_noise(train: Tensor, labels: Tensor) -> Tensor:
    pictures = unseen(train, labels).view(len(CLASSES), EACH, 3, SIZE, SIZE)[:, :3]
    return with_noise(pictures.repeat_interleave(EACH // 3 + 1, 1)[:, :EACH].flatten(0, 1), 4)


def one_class(train: Tensor, labels: Tensor) -> Tensor:
    return draw_cats(("Persian",), len(LABELS), SIZE, seed=2)[0]


def noise(train: Tensor, labels: Tensor) -> Tensor:
    return torch.randint(0, 256, (len(LABELS), 3, SIZE, SIZE), generator=torch.Generator().manual_seed(7)).to(torch.uint8)


def untrained(train: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    shape = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "depth": 2, "heads": 2, "num_classes": len(CLASSES)}
    network = TinyDiT(ModelConfig.model_validate(shape)).eval()
    return sample(network, LABELS, SIZE, len(CLASSES), SampleConfig(sampler="euler", steps=4))


def unseen(train: Tensor, labels: Tensor) -> Tensor:
    return draw_cats(CLASSES, EACH, SIZE, seed=2)[0]


def blurred(train: Tensor, labels: Tensor) -> Tensor:
    small = F.avg_pool2d(unseen(train, labels).float(), 2)
    return F.interpolate(small, size=SIZE, mode="bilinear").to(torch.uint8)


def swapped(train: Tensor, labels: Tensor) -> Tensor:
    return unseen(train, labels).roll(EACH, 0)


def shuffled(train: Tensor, labels: Tensor) -> Tensor:
    return unseen(train, labels)[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(7))]


FIRST = [  # of a first release, by the bars that need nothing to compare with
    (copycat, "no_copies"),
    (mirrored_copycat, "no_copies"),
    (noisy_copycat, "authentic"),
    (now_and_then_a_copy, "no_copies"),
    (one_picture, "distinct"),
    (one_picture_with_noise, "covered"),
    (one_picture_a_class, "varied"),
    (one_picture_a_class_with_noise, "varied"),
    (one_class, "obeys"),
    (noise, "learnt"),
    (untrained, "learnt"),
    (swapped, "obeys"),
    (shuffled, "obeys"),
]
REPLACING = [  # of a candidate that would replace an honest one
    (blurred, "not_worse"),
    (one_class, "coverage_kept"),
    (three_pictures_a_class_with_noise, "coverage_kept"),
    (swapped, "breeds_kept"),
    (noise, "not_worse"),
    (untrained, "not_worse"),
]


def failed(decision: Decision) -> list[str]:
    return [term["name"] for term in decision.terms if not term["passed"]]


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("draw", "term"), FIRST, ids=name_of)
def test_a_first_release_is_refused_for_its_reason(
    draw: Draw, term: str, measure: Callable[[Tensor], FidelityReport], cats: Dataset, tmp_path: Path
) -> None:
    decision = gate.decide(measure(draw(*load_split(cats, "train"))), None, None, CONFIG, tmp_path)
    assert term in failed(decision), decision.terms
    with pytest.raises(ReleaseRejected, match=f"{term}: "):
        gate.require_promoted(decision)


@pytest.mark.parametrize(("draw", "term"), REPLACING, ids=name_of)
def test_an_honest_release_is_not_replaced_by_a_canary(
    draw: Draw, term: str, measure: Callable[[Tensor], FidelityReport], honest: FidelityReport, cats: Dataset, tmp_path: Path
) -> None:
    candidate = measure(draw(*load_split(cats, "train")))
    decision = gate.decide(candidate, honest, "0123456789ab", CONFIG, tmp_path)
    assert term in failed(decision), decision.terms
    assert gate.decide(honest, candidate, "0123456789ab", CONFIG, tmp_path).promoted


def test_real_pictures_that_are_passed_off_as_generated_pass(
    measure: Callable[[Tensor], FidelityReport], honest: FidelityReport, cats: Dataset, tmp_path: Path
) -> None:
    assert gate.decide(honest, None, None, CONFIG, tmp_path).promoted
    others = measure(unseen(*load_split(cats, "train")))
    assert gate.decide(others, honest, "0123456789ab", CONFIG, tmp_path).promoted
    assert gate.decide(honest, others, "0123456789ab", CONFIG, tmp_path).promoted


def test_the_seams_of_patches_show(measure: Callable[[Tensor], FidelityReport], honest: FidelityReport, cats: Dataset) -> None:
    images = unseen(*load_split(cats, "train")).float()
    shade = torch.arange(SIZE // PATCH) % 2 * 24.0
    board = (shade[:, None] + shade).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1) - 24
    seen, real = measure((images + board).clamp(0, 255).to(torch.uint8)).metrics["patch_step"], honest.floor["patch_step"]
    assert seen is not None
    assert real is not None
    assert honest.metrics["patch_step"] == pytest.approx(real, rel=0.1)
    assert seen > 1.5 * real
