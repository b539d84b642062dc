"""The samplers, each a plan of evaluations, and the one loop that follows a plan.

Convention: t = 0 is noise, t = 1 is data; the velocity is dx/dt. `release.graph` writes the same loop as part of an ONNX file.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tinycats_core.config import SampleConfig
from tinycats_core.errors import ConfigError


class Evaluation(NamedTuple):
    """One evaluation of the velocity, v, at the present images and the time t, and the move that follows.

    The images become start + step · (v + Σ weights[k] · (v − v_k)). v_k is the velocity that was evaluated k + 1 evaluations
    before; if there was none, the term is left out. start are the images that the last move with `lands` led to, at first the
    noise.
    """

    t: float
    step: float
    weights: tuple[float, ...] = ()
    lands: bool = True


Plan = list[Evaluation]
Sampler = Callable[[Sequence[float]], Plan]  # times from 0 to 1 to evaluations


def euler(times: Sequence[float]) -> Plan:
    """Euler's method, of first order: one evaluation a step."""
    return [Evaluation(t, t_next - t) for t, t_next in pairwise(times)]


def heun(times: Sequence[float]) -> Plan:
    """Heun's method, of second order: two evaluations a step. The last step is Euler's, which lands on a predicted image."""
    plan = []
    for t, t_next in pairwise(times[:-1]):
        step = t_next - t
        plan += [Evaluation(t, step, lands=False), Evaluation(t_next, step, (-0.5,))]  # the mean of both velocities
    return plan + euler(times[-2:])


def ab2(times: Sequence[float]) -> Plan:
    """Adams-Bashforth's method of second order for uneven steps (Hairer, Norsett & Wanner, III.5): one evaluation a step.

    The first and the last step are Euler's.
    """
    plan: Plan = []
    for t, step, _, _ in euler(times[:-1]):
        plan.append(Evaluation(t, step, (step / (2 * plan[-1].step),) if plan else ()))
    return plan + euler(times[-2:])


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "ab2": ab2}


def integrate(field: Callable[[Any, float], Any], x: Any, plan: Sequence[Evaluation]) -> Any:
    """Return the images that a plan leads to from noise, with the velocities of `field`(images, t)."""
    start, before, memory = x, [], max(len(evaluation.weights) for evaluation in plan)
    for t, step, weights, lands in plan:
        v = slope = field(x, t)
        for weight, earlier in zip(weights, before, strict=False):
            slope = slope + weight * (v - earlier)
        x = start + step * slope
        start, before = x if lands else start, [v, *before][:memory]
    return x


def time_grid(steps: int, shift: float) -> list[float]:
    """Return steps + 1 times from 0 to 1: equal ones, with the noise level 1 - t shifted (SD3, 2403.03206, eq. 23)."""
    equal = [i / steps for i in range(steps + 1)]
    return [u / (u + shift * (1 - u)) for u in equal]


def find_sampler(name: str) -> Sampler:
    """Return the sampler of this name. Raises ConfigError."""
    if name not in SAMPLERS:
        raise ConfigError(f"sample.sampler is {name!r}; allowed: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def plan_of(config: SampleConfig) -> Plan:
    """Return the evaluations by which the settings draw. Raises ConfigError."""
    return find_sampler(config.sampler)(time_grid(config.steps, config.shift))
