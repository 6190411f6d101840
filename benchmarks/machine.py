"""What the machine can do: the rate of a matrix product and of a copy, measured in the same run as everything else."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from attention_guided_rl.onednn import OneDnnLinear, use_onednn


@dataclass(frozen=True, slots=True)
class Limits:
    """The best that was measured of a device, for one dtype."""

    flops_per_s: float
    bytes_per_s: float
    product: str
    """The matrix product that was fastest: its shape, and by what if not by PyTorch's own choice."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Have the C library hand back what it keeps, so that it does not count as the memory of what comes next."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that something takes, until the device is idle again."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def measure_limits(device: torch.device, dtype: torch.dtype, *, sizes: tuple[int, ...], copy_bytes: int) -> Limits:
    """Measure square products of several sizes (the best median counts) and a copy that no cache holds."""
    limits = _measure_limits(device, dtype, sizes, copy_bytes)
    release_memory()
    return limits


def _measure_limits(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], copy_bytes: int) -> Limits:
    rates: dict[str, float] = {}
    for size in sizes:
        layer = nn.Sequential(nn.Linear(size, size, bias=False, device=device, dtype=dtype)).requires_grad_(False)
        x = torch.randn(size, size, device=device).to(dtype)
        rates[f"{size}³"] = 2 * size**3 / _median_seconds(lambda layer=layer, x=x: layer(x), device)
        use_onednn(layer)
        if isinstance(layer[0], OneDnnLinear):
            rates[f"{size}³, oneDNN"] = 2 * size**3 / _median_seconds(lambda layer=layer, x=x: layer(x), device)
    best = max(rates, key=lambda product: rates[product])
    source = torch.zeros(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Limits(rates[best], 2 * copy_bytes / _median_seconds(lambda: target.copy_(source), device), best)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    return statistics.median([timed(work, device) for _ in range(6)][1:])


def default_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure with sizes that fit the device."""
    if device.type == "cuda":
        return measure_limits(device, dtype, sizes=(4096, 8192), copy_bytes=2**31)
    return measure_limits(device, dtype, sizes=(1024, 2048), copy_bytes=2**28)


def describe(device: torch.device) -> dict[str, object]:
    """Name the machine and the software; say how busy it was."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
