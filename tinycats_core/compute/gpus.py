"""Modal's GPUs and what it asks for them."""

from dataclasses import dataclass

from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError

# https://modal.com/docs/guide/gpu
GPUS = (
    *("T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000"),
    *("H100", "H100!", "H200", "B200", "B200+"),
)


@dataclass(frozen=True)
class Price:
    """What Modal asks for one GPU, and where that was read. `seen` is the list's day, None for a list without one."""

    usd_per_hour: float
    seen: str | None
    source: str

    def __str__(self) -> str:
        return f"${self.usd_per_hour:g}/h a GPU ({self.source}, {f'dated {self.seen}' if self.seen else 'undated'})"


# Modal's prices at second hand: none was checked against https://modal.com/pricing. The recent ones stand in
# https://techbytes.app/posts/serverless-gpu-pricing-matrix-modal-replicate-lambda-2026/ of 2026-05-07; the others come from
# lists that are older and bear no date. Processor, memory, region and non-preemptible surcharges come on top.
RECENT = {"seen": "2026-05-07", "source": "second-hand list, not verified"}
OLDER = {"seen": None, "source": "older second-hand list, not verified"}
PRICES = {
    "T4": Price(0.5904, **RECENT),
    "L4": Price(0.7992, **RECENT),
    "A10": Price(1.10, **OLDER),
    "L40S": Price(1.9512, **RECENT),
    "A100": Price(2.10, **OLDER),  # asking for an A100 is asking for one of 40 GB
    "A100-40GB": Price(2.10, **OLDER),
    "A100-80GB": Price(2.4984, **RECENT),
    "H100": Price(3.9492, **RECENT),
    "H100!": Price(3.9492, **RECENT),  # an H100 that is never upgraded to an H200
    "H200": Price(4.54, **OLDER),
}


def parse_gpu(gpu: str) -> tuple[str, int]:
    """Return Modal's name of a GPU and how many are asked for: ("H100", 4) of "H100:4". Raises ComputeError."""
    name, colon, count = gpu.upper().partition(":")
    if name not in GPUS or (colon and not (count.isdecimal() and int(count) > 0)):
        raise ComputeError(f"compute.gpu is {gpu!r}; allowed: {', '.join(GPUS)}, or several of one, such as H100:4")
    return name, int(count or 1)


def usd_per_second(compute: ComputeConfig) -> float | None:
    """Return what all GPUs of a training on Modal cost together; None where no price is known."""
    gpu, count = parse_gpu(compute.gpu)
    price = PRICES.get(gpu)
    return price.usd_per_hour * count / 3600 if price else None


# TFLOP/s of the tensor cores by NVIDIA's data sheets: dense bf16 with fp32 sums (the T4 has fp16 only). Not listed: GPUs whose
# data sheet was not at hand, and B200+, which is one of two. An A10 of Modal's may be an A10G, which is slower.
TENSOR_TFLOPS = {
    "T4": 65.0,
    "L4": 121.0,
    "A10": 125.0,
    "L40S": 362.0,
    "A100": 312.0,
    "A100-40GB": 312.0,
    "A100-80GB": 312.0,
    "H100": 989.0,
    "H100!": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
