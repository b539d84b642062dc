"""The configuration of a release: a frozen part per stage. `presets` joins them from a preset and a person's overrides."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tinycats_core.errors import ConfigError
from tinycats_core.files import digest_of, expanded

BREEDS = (
    "Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau",
    "Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx",
)  # fmt: skip
CLASSES = (*BREEDS, "other")
GUIDANCE_SETTINGS = ("guidance", "guidance_interval")  # part of a release, as its weights are
SIGSTORE = "sigstore"  # as publish.sign_key: sign by identity instead of by key
Seed = Annotated[int, Field(ge=0, lt=2**31)]
MOST_CLASSES = 10_000
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a release, whose folder in the registry is named so: no path
ReleaseName = Annotated[str, Field(pattern=NAME_PATTERN)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Thousands = Annotated[int, Field(ge=1, le=10_000)]
Images = Annotated[int, Field(ge=16, le=100_000)]  # drawn and measured at a time: they are held in memory
ImageSize = Annotated[int, Field(ge=8, le=1024)]
Backbone = Literal["resnet18", "resnet34", "resnet50", "mobilenet_v3_small"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average of the weights; 0: the last weights themselves
FullPath = Annotated[Path, AfterValidator(expanded)]  # a worker may run in another folder


def _numbers(value: Any) -> Any:
    """Return a number that stands alone as a list of one."""
    return (value,) if isinstance(value, int | float) else value


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def digest(self) -> str:
        """Return the hex sha256 of the part's canonical JSON."""
        return digest_of(self.model_dump(mode="json"))


class DataConfig(Part):
    """Where the images come from and how they are decoded."""

    source: str = "oxford_pets"  # a name in data.sources, which checks it
    folder: FullPath | None = None  # for source=folder: the folder that holds the photos
    # What the folders in it are; auto: told from how they lie. docs/photos.md explains the others.
    layout: Literal["auto", "single", "classes", "breeds", "splits", "subfolders"] = "auto"
    image_size: ImageSize = 128
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of each class, where the source has no official split
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of each class's training images; a class of one keeps it
    corrupt_files: Literal["fail", "skip"] = "fail"
    toy_train_per_class: Thousands = 200
    toy_val_per_class: Annotated[int, Field(ge=0, le=10_000)] = 20
    toy_test_per_class: Thousands = 80
    seed: Seed = 0  # of the toy cats; images of the other sources are split by their sha256


class ModelConfig(Part):
    """TinyDiT's shape."""

    image_size: ImageSize = 128
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 16
    width: Thousands = 384
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    heads: Thousands = 6
    num_classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)] = (
        13  # of a release: `ReleaseConfig.for_classes` takes it from the data
    )
    prediction: Literal["x", "v"] = "x"

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            allowed = [p for p in range(1, self.image_size + 1) if self.image_size % p == 0]
            raise ValueError(
                f"model.patch_size is {self.patch_size}, which does not divide model.image_size {self.image_size}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        if self.width % self.heads:
            raise ValueError(f"model.width is {self.width}, which is not a multiple of model.heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width is {self.width}; allowed: multiples of 4 (2-D sine-cosine positions)")
        return self


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
    ema_decays: Annotated[tuple[Decay, ...], BeforeValidator(_numbers), Field(min_length=1)] = (0.9999, 0.999)
    label_dropout: Fraction = 0.1
    flip: bool = True
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


class ClassifierConfig(Part):
    """The breed classifier."""

    backbone: Backbone = "resnet18"
    pretrained: bool = False  # ImageNet weights, downloaded by torchvision
    epochs: Thousands = 30
    batch_size: Annotated[int, Field(ge=3, le=10_000)] = (
        64  # batch normalisation cannot take one image; of 2, an odd number leaves one
    )
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3  # the highest: it rises for 30 % of the steps, then falls to nothing
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    balance: Fraction = 1.0  # 1: every class weighs the same in the loss, 0: every image does
    seed: Seed = 0


class ClassifierShape(Part):
    """What the header of a classifier's weights says of the network."""

    backbone: Backbone
    image_size: ImageSize
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_CLASSES)]
    first_stride: Annotated[int, Field(ge=1, le=2)]


def _rising(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the first must not exceed the second")
    return interval


def _pairs(value: Any) -> Any:
    """Return a pair of numbers that stands alone as a list of one."""
    return (value,) if isinstance(value, list | tuple) and value and not isinstance(value[0], list | tuple) else value


Guidance = Annotated[float, Field(ge=0, le=1_000)]  # 1 = none; v = v_null + guidance · (v_class − v_null)
Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_rising)]  # of t, where guidance is applied


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

    guidance: Annotated[tuple[Guidance, ...], BeforeValidator(_numbers), Field(min_length=1)] = (1.5, 1.0, 2.0, 3.0)
    guidance_interval: Annotated[tuple[Interval, ...], BeforeValidator(_pairs), Field(min_length=1)] = ((0.0, 1.0),)
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


class EvaluateConfig(Part):
    """What is measured, with which feature extractor, and the bars of the gate."""

    extractor: Literal["inception", "breed"] = "inception"
    samples: Images = 5_000
    neighbours: Thousands = 3  # k of precision and recall, which are given at 5 as well
    kid_subsets: Thousands = 100
    batch_size: Thousands = 64
    seed: Seed = 0
    max_kid: Annotated[float, Field(gt=0)] | None = None  # absolute bars: None = not asked for
    min_recall: Fraction | None = None
    min_breed_accuracy: Fraction | None = None
    tolerance: Annotated[float, Field(ge=0)] = 2.0  # standard errors by which KID may exceed the published one's


class ExportConfig(Part):
    """The ONNX files and what they must reproduce."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    fp32_tolerance: Annotated[float, Field(gt=0)] = 1e-3  # relative error of the velocity against PyTorch
    int8_tolerance: Annotated[float, Field(gt=0)] = 0.15  # at t = 1, where the velocity is small, it is largest
    int8: bool = True


class PublishConfig(Part):
    """Where a release goes."""

    name: ReleaseName = "tinycats"
    to: Literal["folder", "hub"] = "folder"
    folder: FullPath = Path("releases")  # the local registry: <folder>/<name>/<version>, <folder>/<name>/latest
    repo_id: str | None = None  # for to=hub: owner/name; None = the token's account and `name`
    private: bool = False
    sign_key: str | None = None  # a private key in PEM form, or "sigstore"; None: no signature
    approval: bool = False  # pause the flow and wait for a person before publishing

    @field_validator("sign_key")
    @classmethod
    def _in_full(cls, key: str | None) -> str | None:
        return key if key in (None, SIGSTORE) else str(expanded(key))

    @model_validator(mode="after")
    def _repository_has_an_owner(self) -> Self:
        if self.repo_id is not None and self.repo_id.count("/") != 1:
            raise ValueError(f"publish.repo_id is {self.repo_id!r}; allowed: 'owner/name'")
        return self


class ComputeConfig(Part):
    """Where the networks are trained. Does not change what is computed, so it is in no cache key."""

    where: Literal["local", "modal"] = "local"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # mps: the GPU of an Apple computer
    processes: Positive = 1  # devices of one machine that share the batch, a process each
    gpu: str = "A100-80GB"  # Modal's name of a GPU, with ":N" for N of them
    timeout_hours: Annotated[float, Field(gt=0, le=24)] = 24.0  # of one attempt on Modal; a call makes retries + 1 at most
    retries: Annotated[int, Field(ge=0, le=10)] = 10
    poll_seconds: Annotated[float, Field(gt=0)] = 30.0
    patience_minutes: Annotated[float, Field(ge=0)] = 60.0  # without an answer, before a run gives up; the call on Modal continues
    max_cost_usd: Annotated[float, Field(gt=0)] | None = None  # of one training on Modal, all its calls together; None: no limit
    cpu: Annotated[float, Field(ge=0.125)] = 2.0  # physical cores on Modal for each GPU, reserved and no more than that
    memory_gb: Annotated[float, Field(ge=1)] = 16.0  # GiB on Modal for each GPU, likewise
    region: str | None = None  # of Modal; None: any region with a free GPU
    secrets: tuple[str, ...] = ()  # Modal Secrets by name: environment variables of the training

    @model_validator(mode="after")
    def _device_is_there(self) -> Self:
        if self.where == "modal" and self.device == "mps":
            raise ValueError("compute.device is 'mps', which Modal does not have; set it to 'auto', or compute.where to 'local'")
        return self

    @property
    def device_on_modal(self) -> str:
        """The device of a container: `auto` must not mean a GPU's price for a CPU's work."""
        return "cuda" if self.device == "auto" else self.device

    def one_gpu(self) -> "ComputeConfig":
        """Return the same place with one GPU, for what does not share its batch."""
        return self.model_copy(update={"gpu": self.gpu.partition(":")[0], "processes": 1})


class ReleaseConfig(Part):
    """Everything that decides what a release is."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    sample: SampleOptions = SampleOptions()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    publish: PublishConfig = Field(default_factory=PublishConfig)  # made when asked for: its folder is relative to here
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size} but model.image_size is {self.model.image_size}; "
                "they must be equal: override both"
            )
        if self.train.batch_size % self.compute.processes:
            raise ValueError(
                f"train.batch_size is {self.train.batch_size}, not divisible by compute.processes {self.compute.processes}"
            )
        if self.compute.where == "modal" and self.train.resume_from is not None:
            raise ValueError(
                "train.resume_from is a path on this machine, and compute.where is 'modal'; set compute.where to 'local'"
            )
        least = self.evaluate.neighbours
        for name, count in (("sample.sweep_images", self.sample.sweep_images), ("evaluate.samples", self.evaluate.samples)):
            if count <= least:
                raise ValueError(f"{name} is {count}; it must be more than evaluate.neighbours, which is {least}")
        return self

    def for_classes(self, count: int) -> Self:
        """Return this configuration with the number of classes that the data has. Raises ConfigError if another was set."""
        if "num_classes" in self.model.model_fields_set and self.model.num_classes != count:
            raise ConfigError(
                f"model.num_classes is {self.model.num_classes}, but the data has {count}; leave it out: the data decides it"
            )
        if self.evaluate.samples < count * 2:
            raise ConfigError(
                f"evaluate.samples is {self.evaluate.samples}; at least {count * 2} are needed (two for each of {count} classes)"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": count})})
