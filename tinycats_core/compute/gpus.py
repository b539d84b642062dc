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
        most: how many of them a container can have.
    """

    name: str
    price: Price | None = None
    tflops: float | None = None
    native: tuple[str, ...] = ("bf16", "fp16")
    most: int = 8


def _listed(usd_per_hour: float) -> Price:
    return Price(usd_per_hour, LISTED, "second-hand list, not verified")


# Names and most GPUs of a container: https://modal.com/docs/guide/gpu. Prices are second-hand, none is checked against
# https://modal.com/pricing. Peaks are from NVIDIA's data sheets, and left out where no data sheet was at hand.
LISTED = "2026-07-01"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", _listed(0.5904), 65.0, native=("fp16",)),
        Gpu("L4", _listed(0.7992), 121.0),
        Gpu("A10", _listed(1.10), 125.0, most=4),  # may be an A10G, which is slower
        Gpu("L40S", _listed(1.9512), 362.0),
        Gpu("A100", _listed(2.10), 312.0),  # one of 40 GB
        Gpu("A100-40GB", _listed(2.10), 312.0),
        Gpu("A100-80GB", _listed(2.4984), 312.0),
        Gpu("RTX-PRO-6000", _listed(3.0312)),
        Gpu("H100", _listed(3.9492), 989.0),
        Gpu("H100!", _listed(3.9492), 989.0),  # an H100 that is never upgraded to an H200
        Gpu("H200", _listed(4.54), 989.0),
        Gpu("B200", _listed(6.2496), 2250.0),
        Gpu("B200+", _listed(6.2496)),  # a B200, or a B300 at the price of one
    )
}


def parse_gpu(name: str) -> tuple[Gpu, int]:
    """Return a GPU and how many are asked for: H100 and 4 for "H100:4". Raises ComputeError."""
    model, colon, count = name.upper().partition(":")
    if model not in GPUS or (colon and not (count.isdecimal() and int(count) > 0)):
        raise ComputeError(f"compute.gpu is {name!r}; allowed: {', '.join(GPUS)}, or several of one, such as H100:4")
    gpu, number = GPUS[model], int(count or 1)
    if number > gpu.most:
        raise ComputeError(f"compute.gpu is {name!r}, but a container has at most {gpu.most} of {gpu.name}; ask for fewer")
    return gpu, number


# Of the same date as the GPUs: $0.0000131 for a second of a physical core, $0.00000222 for one of a GiB
# (https://finops.apis.io/finops/modal/modal-finops/, and the same for the core in
# https://www.beam.cloud/blog/modal-pricing-explained of 2026-06-27).
USD_PER_CORE_HOUR = 0.0000131 * 3600
USD_PER_GIB_HOUR = 0.00000222 * 3600

# https://modal.com/docs/guide/region-selection: the factor is on everything, and a part of a broad region is a narrow one.
BROAD_REGIONS = ("us", "eu", "ap", "uk", "ca", "me", "sa", "af", "mx")
BROAD_FACTOR, NARROW_FACTOR = 1.5, 1.75


def region_factor(region: str | None) -> float:
    """Return by what a region multiplies the price; a region that is not known to be broad counts as narrow."""
    if region is None:
        return 1.0
    return BROAD_FACTOR if region in BROAD_REGIONS else NARROW_FACTOR


def usd_per_second(compute: ComputeConfig) -> float | None:
    """Return what a second of a training's container costs: GPUs, cores and memory, where it runs; None if no price is known.

    This is the only place that computes it: estimate, meter and the stand-in's bill use it. Modal bills the larger of what is
    requested and what is used; the request is also the limit (`modal_client.resources`), so it is what is billed. The factor
    for containers that are never preempted does not apply: ours may be.
    """
    gpu, count = parse_gpu(compute.gpu)
    if gpu.price is None:
        return None
    hourly = gpu.price.usd_per_hour + compute.cpu * USD_PER_CORE_HOUR + compute.memory_gb * USD_PER_GIB_HOUR
    return count * hourly * region_factor(compute.region) / 3600


def charge(compute: ComputeConfig) -> str:
    """Return in words what the price of a container consists of, or that none is known."""
    gpu, count = parse_gpu(compute.gpu)
    if gpu.price is None:
        return f"no dollars: no price of {gpu.name} is known, see https://modal.com/pricing"
    cores, memory = f"{compute.cpu * count:g} cores", f"{compute.memory_gb * count:g} GiB"
    region = f", times {region_factor(compute.region):g} for the region {compute.region}" if compute.region else ""
    return f"{gpu.price}, {cores} and {memory} on top{region}"
