"""How fast the device at hand is."""

import statistics
import time

import torch

# The first two are the products of TinyDiT's MLP at width 384; the cube is what a library is tuned for.
SHAPES = {
    "cpu": ((1024, 384, 1536), (1024, 1536, 384), (2048, 2048, 2048)),
    "cuda": ((1024, 384, 1536), (1024, 1536, 384), (8192, 8192, 8192)),
}
RUNS = 10


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Measure the FLOP/s of the best of three matrix products, the median of 10 runs each (2 operations a multiply-add)."""
    return max(_rate(shape, device, dtype) for shape in SHAPES[device.type])


def _rate(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    rows, inner, columns = shape
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)
    seconds = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / statistics.median(seconds[1:])  # the first run also sets things up
