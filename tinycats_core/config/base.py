"""What the parts of the configuration share: their class, and the types of their fields."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tinycats_core.files import digest_of, expanded

Seed = Annotated[int, Field(ge=0, lt=2**31)]
MOST_CLASSES = 10_000
Positive = Annotated[int, Field(ge=1, le=10**9)]
Thousands = Annotated[int, Field(ge=1, le=10_000)]
Images = Annotated[int, Field(ge=16, le=100_000)]  # drawn and measured at a time: they are held in memory
ImageSize = Annotated[int, Field(ge=8, le=1024)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]  # of the class `other`: something has to be left for the cats
FullPath = Annotated[Path, AfterValidator(expanded)]  # a worker may run in another folder


def numbers(value: Any) -> Any:
    """Return a number that stands alone as a list of one."""
    return (value,) if isinstance(value, int | float) else value


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def digest(self) -> str:
        """Return the hex sha256 of the part's canonical JSON."""
        return digest_of(self.model_dump(mode="json"))
