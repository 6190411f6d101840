"""Processes: the only collectives of the package. With one process everything here is the identity.

Each process holds a contiguous share of an update's articles, in rank order, so concatenating in rank order restores
the global list: the same numbers in the same order for 1, 2 or 4 processes.
"""

import atexit
import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from attention_guided_rl import errors
from attention_guided_rl.errors import AgrlError, ConfigError
from attention_guided_rl.memory import ran_out
from attention_guided_rl.peers import Peers

MEETING_INTERVAL = 0.002  # seconds between looks at who has come
FAREWELL = 10.0  # seconds that the process with the store waits for the others to have read why it ends


class Processes:
    """The processes of this run and this process's place among them."""

    def __init__(self, device: str = "auto") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("training.device: cuda asked for, but PyTorch sees no GPU")
        on_gpu = device != "cpu" and torch.cuda.is_available()
        try:
            if on_gpu and int(os.environ.get("LOCAL_RANK", "0")) >= (gpus := torch.cuda.device_count()):
                raise ConfigError(f"each process needs a GPU of its own, and there are {gpus}; lower --nproc-per-node")
            self._state = PartialState(cpu=not on_gpu)
        except ValueError as error:  # what torchrun sets and a person may have set half of
            raise ConfigError(f"the environment's RANK, WORLD_SIZE, MASTER_ADDR …: {error}") from None
        self.device: torch.device = self._state.device
        if self.count == 1:  # all objects of this process share the state, with the device of the first
            self.device = torch.device("cuda" if on_gpu else "cpu")
        self._meetings = 0
        self._peers: Peers | None = None
        if self.count > 1:
            self._peers = _watched(self.rank, self.count)

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self._state.num_processes)

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self._state.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self._state.is_main_process)

    def share(self, num_articles: int) -> slice:
        """Return which of the update's articles are this process's."""
        if num_articles % self.count:
            raise ConfigError(f"rollout.articles ({num_articles}) must be divisible by the {self.count} processes")
        size = num_articles // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate every process's rows, in rank order; all processes get the result."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        with self._collective():
            distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """Concatenate every process's list, in rank order."""
        if self.count == 1:
            return objects
        with self._collective():
            return list(gather_object(objects))

    def first_signal(self, received: list[int]) -> int | None:
        """Return a signal number that any process has received, the same on all: all stop after the same update."""
        number = torch.tensor([received[0] if received else 0], device=self.device)
        return int(self.gather_rows(number).max()) or None

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value everywhere."""
        if self.count == 1:
            return value
        holder = [value]
        with self._collective():
            broadcast_object_list(holder, from_process=0)
        return holder[0]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over the processes, in place, in one message."""
        tensors = list(tensors)
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten().float() for t in tensors])
        with self._collective():
            distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def rendezvous(self, error: Exception | None = None) -> None:
        """Wait until every process is here, without a collective: one may be busy with the network for minutes.

        A collective that waits longer than its backend's timeout ends the run; this only ends with the processes.
        An error that one process brings along is raised on all, so that none waits for another that has gone.
        """
        if self.count > 1:
            with self._collective():
                error = self._meet(error)
        if error is not None:
            raise error

    def _meet(self, error: Exception | None) -> Exception | None:
        """Wait for all; return this process's error, or the first that another brought along."""
        self._meetings += 1
        store = distributed.distributed_c10d._get_default_store()
        word = "" if error is None else f"{type(error).__name__} {error}"
        store.set(f"agrl/{self._meetings}/{self.rank}", f"here {word}")
        for rank in range(self.count):
            while not store.check([f"agrl/{self._meetings}/{rank}"]):
                if self._peers is not None and rank in self._peers.left():
                    raise self._peers.lost("it did not come to a meeting")
                time.sleep(MEETING_INTERVAL)
            name, _, message = store.get(f"agrl/{self._meetings}/{rank}").decode()[len("here ") :].partition(" ")
            if name and error is None:
                kind = getattr(errors, name, None)  # None: a bug
                where = f"process {rank}: "
                error = kind(where + message) if kind else AgrlError(f"{where}{name} {message}")
        if error is not None:
            self._part(store)
        return error

    def _part(self, store: Any) -> None:
        """Leave no sooner than all know why: the store, in which they read it, ends with the main process."""
        store.set(f"agrl/{self._meetings}/{self.rank}/parted", "")
        everyone = [f"agrl/{self._meetings}/{rank}/parted" for rank in range(self.count)]
        until = time.monotonic() + FAREWELL
        while self.is_main and not store.check(everyone) and time.monotonic() < until:
            time.sleep(MEETING_INTERVAL)

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Do what may take minutes of network, on all processes, and meet afterwards; one's error is raised on all."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.rendezvous(error)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process through before the others: what it has fetched and paid for, they find in the cache.

        If it fails, none of them starts; put it inside a `meeting` for the errors of the others.
        """
        if self.is_main:
            with self.meeting():
                yield
        else:
            self.rendezvous()
            yield

    def wait(self) -> None:
        """Wait until every process is here."""
        with self._collective():
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """Name the process that has gone when a message to all fails."""
        try:
            yield
        except RuntimeError as error:
            if self._peers is None or ran_out(error):
                raise
            raise self._peers.lost(str(error).split("\n")[0][:100]) from error


@cache
def _watched(rank: int, count: int) -> Peers:
    """Watch the peers of this process from now to its end."""
    store: Any = distributed.distributed_c10d._get_default_store()
    peers = Peers(store.clone(), rank, count)  # one per thread
    atexit.register(peers.leave)
    return peers
