"""The settings of drawing."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tinycats_core.config.base import Fraction, Images, Part, Seed, Thousands, numbers
from tinycats_core.errors import ConfigError

GUIDANCE_SETTINGS = ("guidance", "guidance_interval")  # part of a release, as its weights are


def _rising(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the first must not exceed the second")
    return interval


def _pairs(value: Any) -> Any:
    """Return a pair of numbers that stands alone as a list of one."""
    return (value,) if isinstance(value, list | tuple) and value and not isinstance(value[0], list | tuple) else value


Guidance = Annotated[float, Field(ge=0, le=1_000)]  # 1 = none; v = v_null + guidance · (v_class − v_null)
Guidances = Annotated[tuple[Guidance, ...], BeforeValidator(numbers, json_schema_input_type=Guidance | tuple[Guidance, ...])]
Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_rising)]  # of t, where guidance is applied
Intervals = Annotated[tuple[Interval, ...], BeforeValidator(_pairs, json_schema_input_type=Interval | tuple[Interval, ...])]


class SamplerPart(Part):
    """How images are drawn, but for the guidance."""

    sampler: str = "ab2"  # a name in generator.samplers; `sampling.find_sampler` checks it
    steps: Annotated[int, Field(ge=1, le=1_000)] = 8
    shift: Annotated[float, Field(gt=0, le=1_000)] = (
        0.5  # of the time grid: 1 = equal steps; below 1 more of them lie near the image
    )
    batch_size: Thousands = 64
    seed: Seed = 1


class SampleConfig(SamplerPart):
    """How images are drawn from the generator."""

    guidance: Guidance = 1.5
    guidance_interval: Interval = (0.0, 1.0)


class SampleOptions(SamplerPart):
    """How images may be drawn: of the guidances and intervals, one of each is chosen on the validation images."""

    guidance: Annotated[Guidances, Field(min_length=1)] = (1.5, 1.0, 2.0, 3.0)
    guidance_interval: Annotated[Intervals, Field(min_length=1)] = ((0.0, 1.0),)
    sweep_images: Images = 1_000  # drawn for each choice

    @model_validator(mode="after")
    def _none_is_named_twice(self) -> Self:
        for name in ("guidance", "guidance_interval"):
            values = self.model_dump(mode="json")[name]
            if any(values.count(value) > 1 for value in values):
                raise ValueError(f"sample.{name} is {values}, which names one twice")
        return self

    def at(self, guidance: float, guidance_interval: tuple[float, float]) -> SampleConfig:
        """Return these settings with one guidance and one interval, whether they are among the options or not."""
        shared = self.model_dump(include=set(SamplerPart.model_fields))
        return SampleConfig(**shared, guidance=guidance, guidance_interval=guidance_interval)

    def candidates(self) -> tuple[SampleConfig, ...]:
        """Return every choice of guidance and interval, in order. A guidance of 1 has no interval and is listed once."""
        pairs = [(guidance, interval) for guidance in self.guidance for interval in self.guidance_interval]
        return tuple(self.at(*pair) for pair in pairs if pair[0] != 1 or pair[1] == self.guidance_interval[0])

    def single(self) -> SampleConfig:
        """Return the only candidate. Raises ConfigError if there are several."""
        first, *others = self.candidates()
        if others:
            values = self.model_dump(mode="json")
            raise ConfigError(
                f"sample.guidance is {values['guidance']} and sample.guidance_interval is {values['guidance_interval']}; "
                "nothing is chosen here, so give one of each."
            )
        return first
