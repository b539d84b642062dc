"""The settings of the generator's training."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tinycats_core.config.base import Fraction, FullPath, Part, Positive, Seed, Share, numbers

Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average of the weights; 0: the last weights themselves


class TrainConfig(Part):
    """The optimisation of the generator. `batch_size` is the whole batch, split into `accumulation` micro-batches."""

    steps: Positive = 200_000
    batch_size: Positive = 256
    accumulation: Positive = 1
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    schedule: Literal["constant", "cosine"] = "cosine"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip: Annotated[float, Field(gt=0)] = 1.0
    # One of them is shipped, after the sweep.
    ema_decays: Annotated[tuple[Decay, ...], BeforeValidator(numbers), Field(min_length=1)] = (0.9999, 0.999)
    label_dropout: Fraction = 0.1
    flip: bool = True
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
