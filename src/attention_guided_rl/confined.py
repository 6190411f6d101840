"""Confined: a function that strangers have a say in, run in a process of its own with bounded time, memory and answer.

Jinja's sandbox keeps a chat template from code, but not from a loop without end or a text of a billion characters.
"""

import contextlib
import math
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

MAX_SECONDS = 10.0
MAX_MEMORY = 2**30  # bytes, above what this process has
MAX_ANSWER = 2**20  # bytes


def confined(function: Callable[[], str]) -> str:
    """Call a function that needs no thread and no device, and return its text.

    Raises:
        ValueError: it fails, or needs more time or memory than it is given; or its text is too long.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer, args=(function, sender))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of this process hold no lock the child needs
        child.start()
    sender.close()
    try:
        if not receiver.poll(MAX_SECONDS):
            raise ValueError(f"it takes longer than {MAX_SECONDS:.0f} s")
        try:
            answer = receiver.recv_bytes(MAX_ANSWER)
        except EOFError:
            raise ValueError("it ends without an answer") from None
        except OSError:
            raise ValueError(f"it writes more than {MAX_ANSWER:,} bytes") from None
    finally:
        receiver.close()
        child.kill()
        child.join()
    text = answer[1:].decode("utf-8", "replace")
    if answer[:1] == b"-":
        raise ValueError(text)
    return text


def _answer(function: Callable[[], str], sender: Connection) -> None:
    with contextlib.suppress(OSError, ValueError):  # where no limit can be set
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(MAX_SECONDS) + 1,) * 2)  # should the other process be gone
    try:
        answer = b"+" + function().encode("utf-8", "replace")
    except MemoryError:
        answer = b"-it needs too much memory"
    except Exception as error:
        answer = b"-" + " ".join(f"{type(error).__name__}: {error}".split())[:300].encode("utf-8", "replace")
    with contextlib.suppress(OSError):  # the other side has heard enough
        sender.send_bytes(answer)
