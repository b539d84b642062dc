"""Samplers against fields whose solution is known; seeds, guidance, labels."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tinycats_core.config import SampleConfig
from tinycats_core.errors import ConfigError
from tinycats_core.generator.samplers import SAMPLERS, Evaluation, euler, integrate, time_grid
from tinycats_core.generator.sampling import generate, guide, initial_noise, labels_like, load_samples, sample


def towards_grey(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The exact velocity of a data set that holds one grey image a class, of brightness label / 10."""
    target = (labels / 10).view(-1, 1, 1, 1)
    return (target - x) / (1 - t).clamp_min(0.05).view(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_samples_land_on_the_data(sampler: str, shift: float):
    labels = torch.tensor([0, 3, 5])
    images = sample(towards_grey, labels, 8, 6, SampleConfig(sampler=sampler, steps=10, shift=shift, guidance=1))
    expected = ((labels / 10 + 1) * 127.5).round().to(torch.uint8)
    assert images.shape == (3, 3, 8, 8)
    assert (images.int() - expected.view(-1, 1, 1, 1).int()).abs().max() <= 1


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_samplers_converge_at_their_order(sampler: str, order: int, shift: float):
    def error(steps: int) -> float:
        times = time_grid(steps, shift)
        end = integrate(lambda x, t: x * math.cos(t), torch.ones(1, dtype=torch.float64), SAMPLERS[sampler](times))
        return abs(float(end) - math.exp(math.sin(1)))

    assert error(80) / error(160) == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 8), ("ab2", 8), ("heun", 15)])
def test_what_a_sampler_costs(sampler: str, evaluations: int):
    plan = SAMPLERS[sampler](time_grid(8, 0.5))
    assert len(plan) == evaluations
    assert max(evaluation.t for evaluation in plan) < 1  # where nothing is left to divide by


def test_one_step_is_eulers_for_every_sampler():
    ends = {name: float(integrate(lambda x, t: x + 1 + t, torch.ones(1), plan([0.0, 1.0]))) for name, plan in SAMPLERS.items()}
    assert set(ends.values()) == {3.0}


def test_a_sampler_is_added_by_one_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAMPLERS, "twice", lambda times: euler(sorted({*times, 0.95})))
    images = sample(towards_grey, torch.tensor([3]), 8, 6, SampleConfig(sampler="twice", steps=2, guidance=1))
    assert (images.int() - 166).abs().max() <= 1


def runge_kutta(times: Sequence[float]) -> list[Evaluation]:
    """The classical method of fourth order, which looks back three evaluations."""
    plan = []
    for t, t_next in itertools.pairwise(times):
        step, middle = t_next - t, (t + t_next) / 2
        plan += [
            Evaluation(t, step / 2, lands=False),
            Evaluation(middle, step / 2, lands=False),
            Evaluation(middle, step, lands=False),
            Evaluation(t_next, step, (-1 / 3, -1 / 3, -1 / 6)),
        ]
    return plan


def test_a_plan_may_look_back_as_far_as_it_likes():
    def error(steps: int) -> float:
        plan = runge_kutta(time_grid(steps, 1.0))
        end = integrate(lambda x, t: x * math.cos(t), torch.ones(1, dtype=torch.float64), plan)
        return abs(float(end) - math.exp(math.sin(1)))

    assert error(10) / error(20) == pytest.approx(2**4, rel=0.15)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ConfigError, match="sample.sampler is 'dpm'; allowed: euler, heun, ab2"):
        sample(towards_grey, torch.tensor([3]), 8, 6, SampleConfig(sampler="dpm"))


def test_the_time_grid_ends_at_the_image_and_may_crowd_there():
    assert time_grid(4, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    crowded = time_grid(4, 0.5)
    assert (crowded[0], crowded[-1]) == (0, 1)
    steps = [b - a for a, b in itertools.pairwise(crowded)]
    assert steps == sorted(steps, reverse=True)
    noise = [1 - t for t in crowded]  # as SD3 writes it: of the noise level
    assert noise == pytest.approx([0.5 * level / (1 + (0.5 - 1) * level) for level in (1, 0.75, 0.5, 0.25, 0)])


def test_an_image_depends_on_its_index_and_the_seed_alone():
    first, again = initial_noise([0, 1, 2], 8, seed=5), initial_noise([2], 8, seed=5)
    assert torch.equal(first[2], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], initial_noise([0], 8, seed=6)[0])
    assert first.mean().abs() < 0.15
    assert first.std() == pytest.approx(1, rel=0.1)


def test_the_batch_size_changes_nothing():
    labels = torch.arange(5)
    together = sample(towards_grey, labels, 8, 6, SampleConfig(steps=4, batch_size=5))
    apart = sample(towards_grey, labels, 8, 6, SampleConfig(steps=4, batch_size=2))
    assert torch.equal(together, apart)


def test_guidance_extrapolates_from_the_null_class_once_and_only_in_its_interval():
    seen: list[int] = []

    def by_label(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(labels))
        return labels.float().view(-1, 1, 1, 1).expand_as(x)

    field = guide(by_label, torch.tensor([2]), null=10, guidance=3.0, interval=(0.2, 0.6))
    x = torch.zeros(1, 3, 4, 4)
    assert torch.equal(field(x, 0.4), torch.full_like(x, 10 + 3 * (2 - 10)))
    assert torch.equal(field(x, 0.1), torch.full_like(x, 2))
    assert torch.equal(field(x, 0.7), torch.full_like(x, 2))
    assert seen == [2, 1, 1]


def test_guidance_of_one_is_the_class_and_of_zero_is_the_null_class():
    def by_label(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labels.float().view(-1, 1, 1, 1).expand_as(x)

    x = torch.zeros(1, 3, 4, 4)
    assert guide(by_label, torch.tensor([2]), 10, 1.0, (0, 1))(x, 0.5).unique().tolist() == [2]
    assert guide(by_label, torch.tensor([2]), 10, 0.0, (0, 1))(x, 0.5).unique().tolist() == [10]


def test_labels_keep_the_proportions():
    labels = torch.tensor([0] * 70 + [1] * 20 + [3] * 10)
    drawn = labels_like(labels, 33, num_classes=4)
    assert torch.bincount(drawn, minlength=4).tolist() == [23, 7, 0, 3]
    assert torch.equal(labels_like(labels, 100, 4), labels)


def test_a_sample_set_round_trips_with_its_settings(tmp_path: Path):
    labels = torch.tensor([0, 1])
    path = tmp_path / "s.safetensors"
    config = SampleConfig(steps=3, seed=9)
    made = generate(towards_grey, labels, 8, 6, config, path, {"model": "abc", "runtime": "pytorch"})
    images, back = load_samples(made)
    assert torch.equal(back, labels)
    assert torch.equal(images, sample(towards_grey, labels, 8, 6, config))
    assert made.settings["seed"] == 9
    assert made.settings["model"] == "abc"
    again = generate(towards_grey, labels, 8, 6, config, tmp_path / "t.safetensors", {"model": "abc", "runtime": "pytorch"})
    assert made.sha256 == again.sha256


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ConfigError, match="label 6 is not a class; allowed: 0 to 5"):
        sample(towards_grey, torch.tensor([6]), 8, 6, SampleConfig(steps=2))


def test_a_velocity_with_threads_of_its_own_has_the_cores_to_itself():
    class Field:
        own_threads = True

        def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return towards_grey(x, t, labels)

    seen: list[int] = []
    labels, config = torch.tensor([0, 3, 5]), SampleConfig(steps=3, guidance=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images = sample(Field(), labels, 8, 6, config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert torch.equal(images, sample(towards_grey, labels, 8, 6, config))
