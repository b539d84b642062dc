"""Distances come to what torch-fidelity, plain formulas and known distributions say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycats_core.evaluation.distances import Moments, frechet, kernel_distance, neighbourhoods, patch_step, radii


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Return features (count, width) whose scatter falls from one to the next, as that of networks does."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5 * torch.logspace(0, -2, width)
    return torch.randn(count, width, generator=generator) @ mix + shift


def plain_frechet(made: Tensor, real: Tensor) -> float:
    """The formula as it stands in the paper, with NumPy's symmetric matrix roots."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    mine, theirs = made.double().numpy(), real.double().numpy()
    cov, other = np.cov(mine.T), np.cov(theirs.T)
    shared = root(root(cov) @ other @ root(cov))
    return float(np.square(mine.mean(0) - theirs.mean(0)).sum() + np.trace(cov + other - 2 * shared))


@pytest.mark.parametrize(("made", "real"), [(300, 200), (40, 200), (300, 40), (40, 30)])
def test_frechet_is_that_of_the_plain_formula_and_of_torch_fidelity(made: int, real: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mine, theirs = normal(made, 64, 0, 0.1), normal(real, 64, 1)
    found = frechet(mine, Moments.of(theirs), 0).value
    assert found == pytest.approx(plain_frechet(mine, theirs), rel=1e-5)
    library = fid_statistics_to_metric(*map(fid_features_to_statistics, (mine, theirs)), verbose=False)
    assert found == pytest.approx(library["frechet_inception_distance"], rel=1e-5)
    assert frechet(mine, Moments.of(mine), 0).value == pytest.approx(0, abs=1e-5)


def test_frechet_at_infinity_is_rid_of_the_bias_of_few_images() -> None:
    real = Moments.of(normal(100_000, 32, 1))
    truth = frechet(normal(100_000, 32, 0, 0.1), real, 0).value
    found = [frechet(normal(250, 32, seed, 0.1), real, 0) for seed in range(2, 18)]
    bias = np.mean([few.value for few in found]) - truth
    left = np.mean([few.infinite for few in found if few.infinite is not None]) - truth
    assert bias > 0.02
    assert abs(left) < bias / 3
    assert frechet(normal(63, 32, 0), real, 0).infinite is None


def test_frechet_at_infinity_is_that_of_a_line_through_plain_distances() -> None:
    made, real = normal(250, 32, 0, 0.1), normal(300, 32, 1)
    generator = torch.Generator().manual_seed(3)
    sizes = [125, 156, 187, 218, 250]
    subsets = [torch.randperm(250, generator=generator)[:size] for size in sizes]
    line = np.polyfit(1 / np.array(sizes), [plain_frechet(made[subset], real) for subset in subsets], 1)
    assert frechet(made, Moments.of(real), 3).infinite == pytest.approx(line[1], rel=1e-9)


def test_kernel_distance_is_that_of_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    mine, theirs = normal(300, 64, 0, 0.1), normal(200, 64, 1)
    library = kid_features_to_metric(mine, theirs, kid_subsets=30, kid_subset_size=90, rng_seed=5, verbose=False)
    found = kernel_distance(mine, theirs, 30, 90, 5)
    assert found.value == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-5)


def test_kernel_distance_without_blocks_and_with(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = normal(300, 64, 0, 0.1), normal(200, 64, 1)
    whole, near = kernel_distance(mine, theirs, 30, 90, 5), neighbourhoods(mine, theirs, radii(theirs, (3, 5)))
    monkeypatch.setattr("tinycats_core.evaluation.distances.BLOCK", 70)
    assert kernel_distance(mine, theirs, 30, 90, 5) == pytest.approx(whole, rel=1e-4)
    assert neighbourhoods(mine, theirs, radii(theirs, (3, 5))) == near


def test_errors_of_the_kernel_distance_are_what_repeated_sets_show() -> None:
    """Both sets drawn anew; and the generated one alone. An interval of 95 % holds the middle of all nearly always."""
    both = [kernel_distance(normal(150, 16, 2 * i, 0.1), normal(150, 16, 2 * i + 1), 20, 75, 0) for i in range(60)]
    real = normal(150, 16, 1)
    drawn = [kernel_distance(normal(150, 16, 2 * i, 0.1), real, 20, 75, 0) for i in range(60)]
    values, of_drawn = np.array([found.value for found in both]), np.array([found.value for found in drawn])
    assert 0.75 < np.mean([found.std for found in both]) / values.std() < 1.35
    assert 0.75 < np.mean([found.drawn_std for found in drawn]) / of_drawn.std() < 1.35
    held = np.mean([found.low <= values.mean() <= found.high for found in both])
    assert held >= 0.87  # 52 of 60: fewer happen once in a hundred times
    assert all(found.drawn_std < found.std for found in both)


def test_error_over_other_images_of_a_generator_with_classes() -> None:
    """Classes far apart, as many of each every time: only what differs within them is chance."""
    labels = torch.arange(3).repeat_interleave(50)
    centres = 0.6 * torch.eye(3, 16)[labels]
    real = normal(150, 16, 1) + centres
    drawn = [kernel_distance(normal(150, 16, 2 + i, 0.1) + centres, real, 20, 75, 0, labels) for i in range(60)]
    scatter = np.array([found.value for found in drawn]).std()
    assert 0.75 < np.mean([found.drawn_std for found in drawn]) / scatter < 1.35
    blind = kernel_distance(normal(150, 16, 2, 0.1) + centres, real, 20, 75, 0)
    assert blind.drawn_std > drawn[0].drawn_std


def test_images_are_resampled_within_classes_of_any_size_in_any_order() -> None:
    """Where all images of a class are the same, another draw of as many of each is nearly the same set."""
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 100)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    made, real = 2 * torch.eye(3, 16)[labels], normal(150, 16, 1)
    within, blind = (kernel_distance(made, real, 20, 75, 0, of).drawn_std for of in (labels, None))
    assert within < blind / 10


def test_neighbourhoods_are_those_of_torch_fidelity_and_of_plain_loops() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    mine, theirs = normal(120, 8, 0, 0.3), normal(90, 8, 1)
    found = neighbourhoods(mine, theirs, radii(theirs, (3, 5)))
    assert found.keys() == {3, 5}
    for k in (3, 5):
        library = prc_features_to_metric(mine, theirs, prc_neighborhood=k, verbose=False)
        assert found[k]["precision"] == pytest.approx(library["precision"])
        assert found[k]["recall"] == pytest.approx(library["recall"])
    distances = (mine[:, None] - theirs).norm(dim=2)
    reach = (theirs[:, None] - theirs).norm(dim=2).sort(1).values[:, 5]
    inside = [[bool(distances[i, j] <= reach[j]) for j in range(90)] for i in range(120)]
    assert found[5]["density"] == pytest.approx(sum(map(sum, inside)) / (5 * 120))
    assert found[5]["coverage"] == pytest.approx(sum(any(column) for column in zip(*inside, strict=True)) / 90)


def test_a_set_covers_itself_and_one_image_covers_little() -> None:
    real = normal(100, 8, 1)
    itself = neighbourhoods(real, real, radii(real, (5,)))[5]
    assert (itself["precision"], itself["recall"], itself["coverage"]) == (1, 1, 1)
    one = neighbourhoods(real[:1].repeat(100, 1), real, radii(real, (5,)))[5]
    assert one["precision"] == 1
    assert one["coverage"] <= 0.2


def test_steps_at_the_borders_of_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randint(0, 256, (20, 3, 16, 16), generator=generator).to(torch.uint8)
    assert patch_step(even, 4) == pytest.approx(1, abs=0.03)
    ramp = (torch.arange(16) + 10 * (torch.arange(16) // 4)).to(torch.uint8)  # steps of 1, and of 11 at the borders
    across = ramp.expand(2, 3, 16, 16)
    assert patch_step(across, 4) == pytest.approx(11)
    assert patch_step(across.mT.contiguous(), 4) == pytest.approx(11)
    assert patch_step(across, 8) == pytest.approx(11 / ((12 * 1 + 2 * 11) / 14))
    assert patch_step(even, 1) is None  # every step crosses a border
    assert patch_step(even, 16) is None  # none does
    assert patch_step(torch.zeros_like(even), 4) is None
