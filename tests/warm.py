"""A warm parent: a process that has imported everything and started no thread, and forks a child for each command.

So a command that is killed and resumed a hundred times costs a hundred runs, not a hundred imports of PyTorch. A child
may be killed, refused by the disk or sent signals just before a chosen file operation.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WARM_UP = (  # what a training run imports late
    *("attention_guided_rl.runs", "attention_guided_rl.report.html", "openai", "peft", "torch._dynamo"),
    *("transformers.models.llama.modeling_llama", "torch.optim.adamw"),
)


class Warm:
    """The parent process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
        )  # fmt: skip
        assert self._read() == "ready"

    def __call__(
        self,
        arguments: Sequence[str],
        *,
        kill_after_s: float | None = None,
        trace: Path | None = None,
        **how: Any,
    ) -> int:
        """Run the command line in a child and return its exit code, or minus the signal that ended it.

        `kill_after_s`: send SIGKILL then; `trace`: what strace is to write of its file operations; `how`: see `start`.
        """
        child = self.start(arguments, stopped=trace is not None, **how)
        if trace is not None:
            _follow(child, trace)
        timer = None
        if kill_after_s is not None:
            timer = threading.Timer(kill_after_s, _kill, [child])
            timer.start()
        code = self.wait(child)
        if timer is not None:
            timer.cancel()
        return code

    def start(self, arguments: Sequence[str], *, folder: Path, log: Path, **how: Any) -> int:
        """Run the command line in a child and return its process id.

        `folder`: where it runs; `log`: what its output is appended to. `how`, with file operations numbered from 0:
        `kill_at`: end as by SIGKILL before this one; `full_at`: from this one on the disk is full; `signals`: pairs of
        an operation and a signal; `unread`: before this one the reader of its output goes away; `steps`: file that
        operations are listed in; `ignored`: signals; `environment`: variables; `silence_s`: when a peer counts as lost.
        """
        self._tell({"arguments": list(arguments), "folder": str(folder), "log": str(log), **how})
        return int(self._read())

    def wait(self, child: int) -> int:
        """Return a child's exit code, or minus the signal that ended it."""
        self._tell({"wait": child})
        return int(self._read())

    def _tell(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the parent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _follow(process: int, trace: Path) -> None:
    """Let a stopped process go on under strace."""
    calls = "trace=openat,close,fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "--quiet=all", "-f", "-y", "-e", calls, "-o", str(trace), "-p", str(process)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text(encoding="ascii"):
        assert tracer.poll() is None, "strace cannot attach"
        time.sleep(0.01)
    os.kill(process, signal.SIGCONT)
    threading.Thread(target=tracer.wait).start()


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def warm(environment: Mapping[str, str] | None = None) -> Iterator[Warm]:
    """Keep a warm parent for as long as the block lasts."""
    parent = Warm(environment)
    try:
        yield parent
    finally:
        parent.close()


def _listen(job: Mapping[str, Any]) -> None:
    """Do to this process what the job says, each time a file operation is announced."""
    from attention_guided_rl import storage

    number, steps, start = 0, None, time.monotonic()
    if "steps" in job:
        steps = open(job["steps"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # for as long as the child lives

    def before(name: str) -> None:
        nonlocal number
        if steps is not None:
            steps.write(f"{time.monotonic() - start:.3f} {name}\n")
        if number == job.get("unread"):
            os.close(job["reader"])
        if number == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        for at, signal_number in job.get("signals", []):
            if number == at:
                os.kill(os.getpid(), signal_number)
        number += 1
        if number > job.get("full_at", float("inf")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.listener = before


def _child(job: Mapping[str, Any]) -> None:
    """Run one command; never returns."""
    os.environ.update(job.get("environment", {}))
    if job.get("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    os.chdir(job["folder"])
    for number in job.get("ignored", []):
        signal.signal(number, signal.SIG_IGN)
    reader = None
    if "unread" in job:
        reader, descriptor = os.pipe()
    else:
        descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from attention_guided_rl import peers
    from attention_guided_rl.cli import main

    peers.SILENCE = job.get("silence_s", peers.SILENCE)
    _listen({**job, "reader": reader})
    code = main(job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import importlib

    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # the package beside these tests, if there is another
    import torch

    torch.set_num_threads(1)
    for module in WARM_UP:
        importlib.import_module(module)
    assert threading.active_count() == 1
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the child"
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _child(job)
        print(child, flush=True)


if __name__ == "__main__":
    _serve()
