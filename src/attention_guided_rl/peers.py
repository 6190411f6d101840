"""Peers: whether the other processes of a run are still there, so that none waits for one that has gone.

Each process counts upward in a store that all see, and looks at the counts of the others. One whose count stands still
was killed or is frozen: then this process ends, even if it is waiting for that one.
"""

import os
import sys
import threading
import time
from typing import Any

from attention_guided_rl.errors import PeerLostError

SILENCE = 25.0
"""Seconds without a sign of life after which a process counts as lost; a process may be busy, but not its threads."""
INTERVAL = 0.5  # seconds between signs of life
FAREWELL = 10.0  # seconds that the process with the store waits for the others
_LEFT = b"left"


class Peers:
    """The signs of life of all processes; the store is in the main process and ends with it."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self.rank, self._others = store, rank, [r for r in range(count) if r != rank]
        self._seen = dict.fromkeys(self._others, b"")
        self._heard = dict.fromkeys(self._others, time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def lost(self, cause: str) -> PeerLostError:
        """Return the error for a message that failed, naming the process that has gone once that is known."""
        until = time.monotonic() + SILENCE + 5  # the thread ends this process when it finds one silent
        while time.monotonic() < until and not self.left():
            time.sleep(INTERVAL)
        who = ", ".join(f"process {rank}" for rank in self.left()) or "another process"
        return PeerLostError(f"{who} has ended before the work was done ({cause})")

    def left(self) -> list[int]:
        """Return the processes that have said that they end."""
        return [rank for rank, sign in self._seen.items() if sign == _LEFT]

    def leave(self) -> None:
        """Say that this process ends; the main one waits a little until the others have said so too."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        try:
            self._store.set(self._key(self.rank), _LEFT)
            until = time.monotonic() + FAREWELL
            while self.rank == 0 and len(self.left()) < len(self._others) and time.monotonic() < until:
                time.sleep(0.05)
                self._look()
        except RuntimeError:  # the store has gone
            return

    def _watch(self) -> None:
        count, looked = 0, time.monotonic()
        while not self._over.wait(INTERVAL):
            count += 1
            if time.monotonic() - looked > SILENCE / 2:  # this process was stopped, as by Ctrl-Z, maybe all were
                self._heard = dict.fromkeys(self._others, time.monotonic())
            looked = time.monotonic()
            try:
                self._store.set(self._key(self.rank), str(count))
                self._look()
            except RuntimeError:
                if not self._over.is_set() and 0 not in self.left():
                    _end(0, "its store has gone")
                return
            for rank in self._others:
                silent = time.monotonic() - self._heard[rank]
                if rank not in self.left() and silent > SILENCE:
                    _end(rank, f"no sign of life for {silent:.0f} s")

    def _look(self) -> None:
        for rank in self._others:
            if self._store.check([self._key(rank)]):
                sign = self._store.get(self._key(rank))
                if sign != self._seen[rank]:
                    self._seen[rank], self._heard[rank] = sign, time.monotonic()

    def _key(self, rank: int) -> str:
        return f"agrl/alive/{rank}"


def _end(rank: int, why: str) -> None:
    """End this process at once: its main thread may be waiting for the one that is lost."""
    print(
        f"agrl: error: process {rank} is lost: {why}; what was saved stays; to go on, start all processes again with "
        "--resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PeerLostError.exit_code)
