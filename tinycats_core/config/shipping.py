"""The settings of judging, exporting, publishing, and of where all that is computed."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tinycats_core.config.base import Fraction, FullPath, Images, Part, Positive, Seed, Share, Thousands
from tinycats_core.config.forms import OTHERS
from tinycats_core.files import expanded

SIGSTORE = "sigstore"  # as publish.sign_key: sign by identity instead of by key
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a release, whose folder in the registry is named so: no path
ReleaseName = Annotated[str, Field(pattern=NAME_PATTERN)]


class EvaluateConfig(Part):
    """What is measured, with which feature extractor, and the bars of the gate."""

    extractor: Literal["inception", "breed"] = "inception"
    dinov2_weights: FullPath | None = None  # a safetensors file of DINOv2, for fd_dinov2; None: not measured
    samples: Images = 5_000
    other_share: Share | None = None  # of the class `other` among them; None: as among the test images
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
    forms: tuple[str, ...] = OTHERS  # of cats-*.onnx, compared with fp32 and int8; the one that is chosen ships, too
    compared_images: Images = 1_000  # drawn with each form to compare it; evaluate.samples if that is fewer
    pixel_tolerance: Annotated[int, Field(ge=0, le=255)] = 0  # of a pixel of cats-*.onnx against the sampler on the denoiser file

    @field_validator("forms")
    @classmethod
    def _forms_exist(cls, forms: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in forms if name not in OTHERS]:
            raise ValueError(f"{wrong[0]!r} is not a further form; allowed: {', '.join(OTHERS)}, or none")
        return tuple(dict.fromkeys(forms))


class PublishConfig(Part):
    """Where a release goes."""

    name: ReleaseName = "tinycats"
    to: Literal["folder", "hub"] = "folder"
    folder: FullPath = Path("releases")  # the local registry: <folder>/<name>/<version>, <folder>/<name>/latest
    repo_id: str | None = None  # for to=hub: owner/name; None = the token's account and `name`
    private: bool = False
    sign_key: str | None = None  # a private key in PEM form, or "sigstore"; None: no signature
    page: Literal["auto", "bundled", "linked", "none"] = (
        "auto"  # of each release, draws in a browser; auto: if its runtime is found
    )
    page_runtime: str | None = None  # its runtime: a folder or npm's archive; for page=linked an address; None: the cache, then npm
    space: bool = False  # for to=hub: publish the page as a static Space, too
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

    @model_validator(mode="after")
    def _page_has_a_runtime(self) -> Self:
        linked = self.page == "linked"
        if linked != bool(self.page_runtime and self.page_runtime.startswith("https://")) and (linked or self.page_runtime):
            wanted = "the https:// address of a folder" if linked else "a folder or an archive on this machine"
            raise ValueError(f"publish.page_runtime is {self.page_runtime!r}; with publish.page {self.page!r} it is {wanted}")
        if self.space and (self.to != "hub" or self.page == "none"):
            raise ValueError(
                f"publish.space is true, with publish.to {self.to!r} and publish.page {self.page!r}; a Space is the page on the "
                "Hub: set publish.to to 'hub' and publish.page to 'bundled'"
            )
        return self


class ComputeConfig(Part):
    """Where the networks are trained. Does not change what is computed, so it is in no cache key."""

    where: Literal["local", "modal"] = "local"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # mps: the GPU of an Apple computer
    processes: Positive = 1  # devices of one machine that share the batch, a process each
    threads: Positive | None = None  # of PyTorch on a CPU while it trains; None: as many as are measured to be fastest
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

    @model_validator(mode="after")
    def _threads_are_of_one_process(self) -> Self:
        if self.threads is not None and (self.where == "modal" or self.processes > 1):
            raise ValueError(
                f"compute.threads is {self.threads}, with compute.where {self.where!r} and compute.processes {self.processes}; "
                "it is for one process on this machine: leave it out"
            )
        return self

    @property
    def device_on_modal(self) -> str:
        """The device of a container: `auto` must not mean a GPU's price for a CPU's work."""
        return "cuda" if self.device == "auto" else self.device

    def one_gpu(self) -> "ComputeConfig":
        """Return the same place with one GPU, for what does not share its batch."""
        return self.model_copy(update={"gpu": self.gpu.partition(":")[0], "processes": 1})
