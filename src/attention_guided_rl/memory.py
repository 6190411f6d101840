"""Memory: the most that was in use, on the GPU if the work is there, else by this process; and how much there is."""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch

_CPU_TOKENS = 2**12
_PROCESS = Path("/proc/self")  # Linux: a peak that can be set back


def reset_peak(device: torch.device) -> None:
    """Count the peak anew; where the system cannot, `peak_bytes` stays the peak since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes in use at once since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (_PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


def rows_at_once(device: torch.device, row_len: int, num_rows: int) -> int:
    """Return how many of `num_rows` rows of `row_len` tokens to take through a model at once.

    On a CPU more than a few thousand tokens make nothing faster: what they need is asked of the system anew at every
    step and given back after it, which costs more than it saves. A GPU takes them all.
    """
    return max(1, _CPU_TOKENS // row_len if device.type == "cpu" else num_rows)


def total_bytes(device: torch.device) -> int | None:
    """Return the memory there is: of the GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
