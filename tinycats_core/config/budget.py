"""What a whole release may take."""

import math
from typing import Any, Self

from pydantic import ValidationInfo, field_validator, model_validator

from tinycats_core.config.base import Part

MOST = {"minutes": 2_880.0, "dollars": 10_000.0}  # two days: nothing longer was measured


class BudgetConfig(Part):
    """What a whole release may take, from its first stage to its last. `compute.plan` decides what is made of it."""

    minutes: float | None = None  # on this machine; None: train.steps decides
    dollars: float | None = None  # of the training on Modal; None: train.steps decides

    @field_validator("minutes", "dollars", mode="before")
    @classmethod
    def _is_an_amount(cls, value: Any, info: ValidationInfo) -> Any:
        most = MOST[str(info.field_name)]
        if isinstance(value, int | float) and not (math.isfinite(value) and 0 < value <= most):
            raise ValueError(
                f"it must be above 0 and at most {most:,.0f}; give what a release may take, or set train.steps instead"
            )
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.minutes is not None and self.dollars is not None:
            raise ValueError(f"budget.minutes is {self.minutes:g} and budget.dollars is {self.dollars:g}; give one of them")
        return self
