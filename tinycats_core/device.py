"""Devices: which one, at which precision, and how to make its arithmetic fast without changing what it computes."""

import ctypes
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinycats_core import threads
from tinycats_core.errors import ComputeError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # by the autocast type of `pick_precision`
EXACT = 1e-6  # relative error below which a product of single-precision matrices was computed in single precision


def pick_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `mps`; auto takes a GPU if there is one.

    Raises:
        ComputeError: a GPU was asked for and there is none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(name, name == "auto"):
        kind = {"cuda": "CUDA", "mps": "MPS"}.get(name, "such")
        raise ComputeError(f"compute.device is {name!r} but this machine has no usable {kind} device; use 'auto' or 'cpu'")
    return torch.device(next(kind for kind, there in available.items() if there) if name == "auto" else name)


def pick_exact_device(name: str) -> torch.device:
    """Return the device as `pick_device`, but a CPU instead of MPS, which has no double precision. Raises ComputeError."""
    device = pick_device(name)
    return torch.device("cpu") if device.type == "mps" else device


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type, None for full precision. `auto`: bf16 where the GPU has it, else fp16; fp32 on CPU and MPS.

    Raises:
        ComputeError: the precision is not available on this device.
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type == "mps":
        raise ComputeError(f"train.precision is {precision!r}, which is not available on MPS; use 'auto' or 'fp32'")
    if device.type == "cpu" and precision == "fp16":
        raise ComputeError("train.precision is 'fp16', which needs a GPU; on a CPU use 'auto', 'fp32' or 'bf16'")
    if precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.float16


def name_of(device: torch.device) -> str:
    """Return what records call a device: cpu, or `cuda: ` and the GPU's name."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


@contextmanager
def fast_arithmetic(device: torch.device) -> Iterator[None]:
    """Set a CPU up for training for as long as this lasts, at unchanged accuracy; leave a GPU as it is.

    Matrix products go to oneDNN where it computes them in full single precision: MKL uses half the vector width on CPUs of
    other makers. Attention over a few dozen tokens is two batched products then, because the fused kernel calls a
    product for each head. Freed memory is kept for the next step: giving it back costs a page fault for every 4 KiB. Threads
    hardly spin while other programs need the cores.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    keeping = _keep_freed_memory(True)
    try:
        if not _onednn_is_exact():
            with threads.sharing():
                yield
            return
        torch.set_float32_matmul_precision("medium")
        with sdpa_kernel(SDPBackend.MATH), threads.sharing():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        if keeping:
            _keep_freed_memory(False)


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the FLOP/s of the fastest of three matrix products, each the median of ten runs."""
    sizes = [(8192, 8192, 8192)] if device.type == "cuda" else [(1024, 384, 1536), (1024, 1536, 384), (2048, 2048, 2048)]
    best = 0.0
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        seconds = []
        for _ in range(12):
            synchronize(device)
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        best = max(best, 2 * rows * inner * columns / sorted(seconds[2:])[5])
    return best


def has_compiler(device: torch.device) -> bool:
    """Return whether `torch.compile` finds what it needs: a C++ compiler, and Triton for a GPU."""
    compiler = os.environ.get("CXX") or "g++"
    return shutil.which(compiler) is not None and (device.type == "cpu" or find_spec("triton") is not None)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done everything that was asked of it; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give back the GPU memory that PyTorch holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device's memory, or a CPU's, does not suffice."""
    said = (
        "can't allocate memory",
        "could not create a primitive",  # oneDNN, whose message does not say why: it found no memory for one
        "MPS backend out of memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(x in str(error) for x in said))


def machine() -> dict[str, Any]:
    """Return processor, usable cores, the facts of PyTorch's threads, the GPU's name or None. Nothing that names the host."""
    found = threads.facts()
    return {
        "cpu": _processor(),
        "vnni": _multiplies_bytes(),
        "cores": cores(),
        "torch_threads": found.pop("threads"),
        **found,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those of these packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.machine()


def _multiplies_bytes() -> bool | None:
    """Return whether the CPU has instructions for dot products of bytes (VNNI, or those of Arm); None if it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return None
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & set(found[1].split())) if found else None


@lru_cache(maxsize=1)
def _onednn_is_exact() -> bool:
    """Return whether the products that PyTorch's `medium` sends to oneDNN keep full single precision on this CPU.

    The setting allows bf16 inside a product, which CPUs with matrix tiles (AMX) make use of and others do not.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = left @ right
    finally:
        torch.set_float32_matmul_precision(before)
    return float((found - exact).norm() / exact.norm()) < EXACT


def _keep_freed_memory(keep: bool) -> bool:
    """Let glibc's allocator keep what is freed, or give it back to the system again. Returns whether it is glibc's.

    The allocator stops adapting its thresholds once one of them was set, so they end where it would have taken them.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65_536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 64 << 20)
        if not keep:
            libc.malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return True
