"""The settings of the generator's training."""

import math
import re
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from tinycats_core.config.base import Fraction, FullPath, Part, Positive, Seed, Share, numbers
from tinycats_core.errors import ConfigError

Augmentation = Literal["none", "basic", "medium", "full"]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average of the weights; 0: the last weights themselves
Decays = Annotated[tuple[Decay, ...], BeforeValidator(numbers, json_schema_input_type=Decay | tuple[Decay, ...])]


class BaseRelease(NamedTuple):
    """The release whose weights a training starts from: its name or `hub:owner/name`, its version, and the weights' sha256."""

    source: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return "@".join(self)

    @classmethod
    def parse(cls, text: str) -> "BaseRelease | None":
        """Return the base that a text names in full, as a release records it; None for anything else."""
        found = re.fullmatch(r"([^@]+)@([^@/]+)@([0-9a-f]{64})", text)
        return cls(*found.groups()) if found else None


class TrainConfig(Part):
    """The optimisation of the generator. `batch_size` is the whole batch, split into `accumulation` micro-batches."""

    steps: Positive = 200_000
    passes: Annotated[float, Field(gt=0, le=1e6)] | None = None  # over the training photos: fewer steps for few of them
    batch_size: Positive = 256
    accumulation: Positive = 1
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    schedule: Literal["constant", "cosine"] = "cosine"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip: Annotated[float, Field(gt=0)] = 1.0
    # One of them is shipped, as it was at one of the snapshots: the sweep chooses.
    ema_decays: Annotated[Decays, Field(min_length=1)] = (0.9999, 0.999)
    snapshots: Annotated[int, Field(ge=1, le=100)] = 5  # evenly spaced over the steps, the last one at the end
    patience: Annotated[int, Field(ge=1, le=100)] = 2  # snapshots without a better one, after which a training that copies ends
    stop_at: Positive | None = None  # the step to end at before `steps`, whose schedule stays: how a flow trains to a snapshot
    label_dropout: Fraction = 0.1
    augmentation: Augmentation = "basic"  # basic: flips; medium: and zooms and shifts; full: docs/training.md
    other_share: Share | None = None  # of the class `other` among the images of the steps; None: as among the training images
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    timestep_mean: float = -0.8  # of the logit of t; below 0 means nearer to noise
    timestep_std: Annotated[float, Field(gt=0)] = 0.8
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    compile: Literal["auto", "off", "default", "reduce-overhead"] = "auto"  # a mode of torch.compile; auto: on a GPU, for long runs
    max_skipped_steps: Annotated[int, Field(ge=0)] = (
        0  # steps whose loss or gradient is not finite are left out; more than this stop
    )
    resume_from: FullPath | None = None  # a training's folder or checkpoint to continue from, as with more steps
    start_from: Annotated[str, Field(min_length=1, max_length=4_096)] | None = None  # a release: docs/training.md
    checkpoint_every: Positive = 5_000
    sample_every: Positive = 10_000
    log_every: Positive = 100
    seed: Seed = 0

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"train.batch_size is {self.batch_size}, not divisible by train.accumulation {self.accumulation}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"train.warmup_steps is {self.warmup_steps}, more than train.steps {self.steps}")
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"train.ema_decays is {list(self.ema_decays)}, which names one twice")
        return self

    @property
    def base(self) -> BaseRelease | None:
        """The release of `start_from`. Raises ConfigError if it has not been resolved (`release.base.resolve`)."""
        if self.start_from is None:
            return None
        if (base := BaseRelease.parse(self.start_from)) is None:
            raise ConfigError(
                f"train.start_from is {self.start_from!r}, which has not been resolved; release.base.resolve does that"
            )
        return base

    @property
    def last_step(self) -> int:
        """The step that the training ends at."""
        return min(self.stop_at or self.steps, self.steps)

    def snapshot_steps(self) -> tuple[int, ...]:
        """Return the steps up to the last one at which the averages are kept."""
        evenly = {self.steps * number // self.snapshots for number in range(1, self.snapshots + 1)} - {0}
        return tuple(sorted({step for step in evenly if step < self.last_step} | {self.last_step}))

    def until(self, step: int) -> Self:
        """Return this training as far as a step. How patient the whole training is plays no part in it."""
        return self.model_copy(update={"stop_at": step, "patience": type(self).model_fields["patience"].default})

    def for_photos(self, count: int) -> Self:
        """Return this training with as many steps as its passes over `count` photos take, at most `steps`."""
        if self.passes is None:
            return self
        steps = min(self.steps, max(1, math.ceil(self.passes * count / self.batch_size)))
        return self.model_copy(update={"steps": steps, "warmup_steps": min(self.warmup_steps, steps // 10)})
