"""Memory: how much is in use and there is, on the GPU if the work is there; and what to do when it runs out.

Work that goes through a model some rows at a time asks a RowLimit how many. When memory runs out, the limit is lowered
and the work done again from its start; so the result is that of a run with the smaller limit.
"""

import contextlib
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from attention_guided_rl.errors import MemoryLimitError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_CPU_NUMBERS = 2**18
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # RuntimeErrors
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


def rows_at_once(device: torch.device, row_len: int, hidden_size: int, num_rows: int) -> int:
    """Return how many of `num_rows` rows of `row_len` tokens to take through a model at once.

    On a CPU more than a quarter of a million numbers in a layer's hidden states make nothing faster: caches do not hold
    them, and the memory they need is asked of the system anew at every step. A GPU takes all rows.
    """
    return max(1, _CPU_NUMBERS // (row_len * hidden_size) if device.type == "cpu" else num_rows)


class RowLimit:
    """How many rows go through a model at once: fewer each time that memory runs out."""

    def __init__(self, rows: int, row_len: int, *, forward_rows: int | None = None) -> None:
        """Begin with so many rows, of `row_len` tokens; `forward_rows`, no fewer, where nothing is kept to go back."""
        self.rows, self.row_len = rows, row_len
        self.forward_rows = forward_rows or rows
        self.lowered_to: int | None = None
        """What memory has forced so far; None: nothing."""

    def forward_rows_of(self, length: int) -> int:
        """Return how many rows of another length have about as many tokens."""
        return max(1, self.forward_rows * self.row_len // length)

    def lower(self, rows: int | None) -> None:
        """Allow no more than so many rows from now on, to go back or not."""
        if rows is not None and rows < self.forward_rows:
            self.forward_rows = self.lowered_to = rows
            self.rows = min(self.rows, rows)

    @contextlib.contextmanager
    def watch(self, doing: str, num_rows: int, *, forward: bool = False) -> Iterator[None]:
        """Raise MemoryLimitError where memory runs out while doing something to so many rows."""
        at_once = min(self.forward_rows if forward else self.rows, num_rows)
        with out_of_memory(f"{doing}: {at_once} rows × {self.row_len} tokens at a time"):
            yield

    def fit(self, num_rows: int, work: Callable[[], Result]) -> Result:
        """Do work on so many rows, and each time that it raises MemoryLimitError do it again with fewer at once.

        First no more rows where nothing is kept to go back than where it is; then half as many each time.
        Work that has collectives in it must raise on all processes if it does on one (`Processes.meeting`).

        Raises:
            MemoryLimitError: one row is too much.
        """
        while True:
            try:
                return work()
            except MemoryLimitError as error:
                at_once, said = min(self.forward_rows, num_rows), str(error)
                if at_once <= 1:
                    raise MemoryLimitError(
                        f"{said}; lower rollout.steps or rollout.context_tokens, set model.dtype: bfloat16, or take a "
                        "smaller model"
                    ) from None
            self.lower(self.rows if at_once > self.rows else at_once // 2)
            logger.warning("%s; going on with %d", said, self.rows)
            if torch.cuda.is_initialized():
                gc.collect()  # the error may be in a cycle with the frames that hold the tensors
                torch.cuda.empty_cache()


@contextlib.contextmanager
def out_of_memory(doing: str) -> Iterator[None]:
    """Raise MemoryLimitError where memory runs out."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise MemoryLimitError(f"out of memory while {doing}") from None


def ran_out(error: BaseException) -> bool:
    """Return whether this is how a GPU, PyTorch on a CPU, or Python says that there is no memory left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in _NO_MEMORY)


def total_bytes(device: torch.device) -> int | None:
    """Return the memory there is: of the GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
