"""Interruption: signals that ask a command to end, and a reader of its output that goes away."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from attention_guided_rl.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end at once; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise Stopped wherever the command is when a signal arrives."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handling(handle):
        yield


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect signals, so that an update can finish and be saved; the second raises Stopped."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise Stopped(number)
        received.append(number)

    with _handling(handle):
        yield received


@contextlib.contextmanager
def _handling(handle: object) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup says that the terminal may go
                before[number] = signal.signal(number, handle)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Go on when nobody reads the output any more, or ever did: it goes nowhere then.

    Raises:
        StorageError: from what writes or flushes the output, whose disk is full.
    """
    out, err = _Lasting(sys.stdout, must_arrive=True), _Lasting(sys.stderr, must_arrive=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


class _Lasting(io.TextIOBase):
    """A text stream whose writes succeed even when its reader has gone; what it has no sign for becomes '?'."""

    def __init__(self, stream: Any, *, must_arrive: bool) -> None:
        # None: closed before Python began
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._must_arrive = must_arrive

    def write(self, text: str) -> int:
        with self._lasting():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # what is still buffered must have somewhere to go
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._must_arrive and error.errno in FULL:
                raise StorageError(f"cannot write the output: {error.strerror}") from None
