"""Devices: absent ones are named, and what makes a CPU fast leaves accuracy and settings as they were."""

import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

from tinycats_core.device import (
    fast_arithmetic,
    is_out_of_memory,
    machine,
    matmul_peak,
    pick_device,
    pick_exact_device,
    pick_precision,
    versions,
)
from tinycats_core.errors import ComputeError, ConfigError
from tinycats_core.presets import resolve
from tinycats_core.training.start import check_processes

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_an_absent_gpu_says_so():
    assert pick_device("auto") == CPU
    with pytest.raises(ComputeError, match="no usable CUDA device"):
        pick_device("cuda")


def test_an_apple_gpu_is_used_for_what_needs_no_double_precision(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ComputeError, match="compute.device is 'mps' but this machine has no usable MPS device"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = pick_device("auto")
    assert (mps.type, pick_device("mps"), pick_device("cpu")) == ("mps", mps, CPU)
    assert (pick_exact_device("auto"), pick_exact_device("mps")) == (CPU, CPU)
    assert pick_precision("auto", mps) is None
    with pytest.raises(ComputeError, match="train.precision is 'bf16', which is not available on MPS"):
        pick_precision("bf16", mps)
    with pytest.raises(ComputeError, match="compute.processes is 2, and an Apple computer has one MPS device"):
        check_processes("auto", 2)
    with pytest.raises(ConfigError, match="compute.device is 'mps', which Modal does not have"):
        resolve("smoke", {"compute": {"where": "modal", "device": "mps"}})


def test_precision_follows_the_device():
    assert pick_precision("auto", CPU) is None
    assert pick_precision("bf16", CPU) is torch.bfloat16
    with pytest.raises(ComputeError, match=r"train\.precision is 'fp16'"):
        pick_precision("fp16", CPU)


def test_fast_arithmetic_keeps_single_precision():
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(96, 384, generator=generator), torch.randn(1536, 384, generator=generator)
    q, k, v = torch.randn(3, 2, 4, 64, 32, generator=generator)
    with fast_arithmetic(CPU):
        product, attention = F.linear(x, w), F.scaled_dot_product_attention(q, k, v)
    exact = F.linear(x.double(), w.double())
    assert float((product - exact).norm() / exact.norm()) < 1e-6
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert float((attention - exact).norm() / exact.norm()) < 1e-6


def test_fast_arithmetic_ends_where_it_began():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), fast_arithmetic(CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_freed_memory_is_given_back_at_the_end():
    code = """
import torch
from pathlib import Path
from tinycats_core.device import fast_arithmetic
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
with fast_arithmetic(torch.device("cpu")):
    before = resident()
    big = [torch.ones(2**20) for _ in range(64)]
    del big
    kept = resident() - before
print(kept, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, left = map(float, done.stdout.split())
    assert left < 64
    assert kept >= left


def test_a_peak_is_measured():
    assert 1e8 < matmul_peak(CPU) < 1e15


def test_running_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(MemoryError())


def test_the_machine_is_described_and_not_named():
    facts = machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["vnni"] in (True, False, None)
    known = {"cpu", "vnni", "cores", "torch_threads", "spin", "spin_set_by", "spin_adapts", "load", "busy", "gpu"}
    assert facts.keys() == known
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


def test_versions_are_those_of_what_is_installed():
    assert versions("torch", "no-such-package") == {"python": platform.python_version(), "torch": version("torch")}
