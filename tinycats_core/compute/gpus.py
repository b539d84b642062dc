"""The GPUs that Modal rents out, one row each: price, peak and native precisions."""

from dataclasses import dataclass

from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError


@dataclass(frozen=True)
class Price:
    """What Modal charges for one GPU, and the source. `seen` is the date of the list, None for an undated one."""

    usd_per_hour: float
    seen: str | None
    source: str

    def __str__(self) -> str:
        return f"${self.usd_per_hour:g}/h a GPU ({self.source}, {f'dated {self.seen}' if self.seen else 'undated'})"


@dataclass(frozen=True)
class Gpu:
    """A GPU under Modal's name for it.

    Args:
        price: None if none is known.
        tflops: the peak of the tensor cores for dense products of a native precision with fp32 sums; None if unknown.
        native: the precisions that the tensor cores compute in, the one that `auto` picks first.
    """

    name: str
    price: Price | None = None
    tflops: float | None = None
    native: tuple[str, ...] = ("bf16", "fp16")


def _recent(usd_per_hour: float) -> Price:
    return Price(usd_per_hour, "2026-05-07", "second-hand list, not verified")


def _older(usd_per_hour: float) -> Price:
    return Price(usd_per_hour, None, "older second-hand list, not verified")


# Names: https://modal.com/docs/guide/gpu. Prices are second-hand, none is checked against https://modal.com/pricing: the recent
# ones are from https://techbytes.app/posts/serverless-gpu-pricing-matrix-modal-replicate-lambda-2026/ of 2026-05-07, the others
# from older, undated lists. Processor, memory, region and non-preemptible surcharges come on top. Peaks are from NVIDIA's data
# sheets, and left out where no data sheet was at hand.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", _recent(0.5904), 65.0, native=("fp16",)),
        Gpu("L4", _recent(0.7992), 121.0),
        Gpu("A10", _older(1.10), 125.0),  # may be an A10G, which is slower
        Gpu("L40S", _recent(1.9512), 362.0),
        Gpu("A100", _older(2.10), 312.0),  # one of 40 GB
        Gpu("A100-40GB", _older(2.10), 312.0),
        Gpu("A100-80GB", _recent(2.4984), 312.0),
        Gpu("RTX-PRO-6000"),
        Gpu("H100", _recent(3.9492), 989.0),
        Gpu("H100!", _recent(3.9492), 989.0),  # an H100 that is never upgraded to an H200
        Gpu("H200", _older(4.54), 989.0),
        Gpu("B200", tflops=2250.0),
        Gpu("B200+"),  # one of two GPUs
    )
}


def parse_gpu(name: str) -> tuple[Gpu, int]:
    """Return a GPU and how many are asked for: H100 and 4 for "H100:4". Raises ComputeError."""
    model, colon, count = name.upper().partition(":")
    if model not in GPUS or (colon and not (count.isdecimal() and int(count) > 0)):
        raise ComputeError(f"compute.gpu is {name!r}; allowed: {', '.join(GPUS)}, or several of one, such as H100:4")
    return GPUS[model], int(count or 1)


def usd_per_second(compute: ComputeConfig) -> float | None:
    """Return what all GPUs of a training on Modal cost together; None if no price is known."""
    gpu, count = parse_gpu(compute.gpu)
    return gpu.price.usd_per_hour * count / 3600 if gpu.price else None
