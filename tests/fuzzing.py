"""Fuzzing: hundreds of malformed inputs for one parser, made from valid ones, and what must hold for each of them.

    fuzz("manifests", mutated(VALID), check, folder, seeds=FOUND)

In the suite the inputs are the same in every run. With AGRL_FUZZ_EXAMPLES=N, which `make fuzz` sets, each target gets N
new ones; what that finds is kept as a seed.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from attention_guided_rl.cli import main
from attention_guided_rl.errors import AgrlError

INPUTS = {
    "configuration": 180,
    "overrides": 120,
    "text files": 160,
    "dumps": 150,
    "dumps by title": 90,
    "multistream": 200,
    "pages": 90,
    "lists": 60,
    "vectors": 150,
    "checkpoints": 250,
    "logs": 150,
    "orders": 400,
    "evaluations": 100,
    "reports": 70,
}
"""Different malformed inputs of each target in the suite, seeds included."""
EXAMPLES = int(os.environ.get("AGRL_FUZZ_EXAMPLES", "0"))

EXITS = {0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13}
"""What the command line may end with; 70 is a bug, and nothing here interrupts."""
MAX_CPU_S, MAX_MEMORY = 10, 2**30  # bytes, above what the process has before an input
MAX_LINE = 2100  # characters of what is said about an error

DEEP, HUGE, ENDLESS = "<deep>", "<huge>", "<endless>"  # stand for what cannot be written as a value
RAW = {DEEP: "[" * 2000 + "]" * 2000, HUGE: "9" * 5000, ENDLESS: "1e999999"}
JUNK = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), DEEP, HUGE, ENDLESS),
    *("", " ", "x", "null", "12", "\0", "\ud800", "\u2028", "\x1b[31m", "\u202e", "a\nb", "../../x", "/etc/passwd"),
    *("word " * 2000, "=HYPERLINK()", "{{x}}", [], [[]], [None], {}, {"": None}, {"x": {"x": []}}, [0] * 300),
]


class HangError(BaseException):
    """An input took more than MAX_CPU_S of the processor; nobody catches this by accident."""


def fuzz(
    target: str, inputs: st.SearchStrategy[Any], check: Callable[[Any], object], folder: Path, seeds: Sequence[Any] = ()
) -> None:
    """Check seeds and drawn inputs, within bounds of time and memory and writing in `folder` only; count them."""
    seen: set[bytes] = set()

    def name(item: Any) -> bytes:
        return hashlib.sha256(repr(item).encode(errors="surrogatepass")).digest()

    def one(item: Any) -> None:
        with bounded(), only_in(folder):
            check(item)
        seen.add(name(item))

    for seed in {name(seed): seed for seed in seeds}.values():
        one(seed)

    def drawn(item: Any) -> None:
        assume(name(item) not in seen)
        one(item)

    options = {"derandomize": True, "database": None, "phases": [Phase.generate]} if not EXAMPLES else {}
    count = EXAMPLES or max(INPUTS[target] - len(seen), 1)
    bounds = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), **options)
    bounds(given(inputs)(drawn))()
    assert EXAMPLES or len(seen) >= INPUTS[target], f"{target}: {len(seen)} different inputs"


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise HangError or MemoryError in the middle of what takes too much."""

    def hang(*_: object) -> None:
        raise HangError

    size = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if size.exists():
        used = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY, before[1]))
    old = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def only_in(folder: Path) -> Iterator[None]:
    """Require that nothing outside a folder is written, and that no program is started."""
    _watched.append((os.path.realpath(folder), []))
    try:
        yield
    finally:
        _, strays = _watched.pop()
        assert not strays, strays


_watched: list[tuple[str, list[str]]] = []
_CHANGES = (
    "mkdir",
    "rename",
    "remove",
    "rmdir",
    "link",
    "symlink",
    "truncate",
    "chmod",
    "system",
    "exec",
    "posix_spawn",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in ("open", "subprocess.Popen", "shutil.rmtree", *(f"os.{name}" for name in _CHANGES)):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    folder, strays = _watched[-1]
    if isinstance(arguments[0], int):  # a file that is open
        return
    path = os.path.realpath(os.fsdecode(arguments[0]))
    if not path.startswith((f"{folder}/", "/dev/null")) and "__pycache__" not in path:
        strays.append(f"{event} {path}")


sys.addaudithook(_watch)


def agrl(*arguments: object) -> tuple[int, str]:
    """Run the command line as a terminal would see it, require a documented end of one line, return code and stdout."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=e) for e in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    shown, said = (stream.seek(0) or stream.read() for stream in (out, err))
    assert code in EXITS, said[-3000:]
    assert "Traceback" not in shown + said
    errors = [line for line in said.splitlines() if not line.startswith("agrl: warning: ")]
    assert len(errors) == (code != 0), said[-3000:]
    assert all(line.startswith("agrl: error: ") and len(line) <= MAX_LINE for line in errors), said[:3000]
    return code, shown


def documented(error: AgrlError) -> None:
    """Require of what a parser raises that the command line can end with it."""
    assert error.exit_code in EXITS, repr(error)
    assert str(error).strip(), repr(error)
    assert "\n" not in str(error)


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[Any]) -> Any:
    """Draw a valid value with one to three places lost, doubled, renamed, wrapped or replaced by JUNK."""
    value = {"": copy.deepcopy(draw(st.sampled_from(valid)))}
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(value)))
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "rename", "double", "wrap")))
        if how == "drop" and parent is not value:
            del parent[key]
        elif how == "rename" and isinstance(parent, dict) and parent is not value:
            parent[draw(st.sampled_from(("", "x", "\ud800", key + "s", key.upper())))] = parent.pop(key)
        elif how == "double" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "wrap":
            parent[key] = draw(st.sampled_from(([parent[key]], {"x": parent[key]}, str(parent[key]))))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    return value[""]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a value, the first few of long lists."""
    found: list[tuple[Any, Any]] = [(value, "")]
    for parent, key in found:
        child = parent[key]
        if isinstance(child, dict):
            found += [(child, k) for k in child]
        elif isinstance(child, list):
            found += [(child, i) for i in range(min(len(child), 4))]
    return found


def as_json(value: Any) -> bytes:
    """Write a mutated value as JSON, which bare NaN and what RAW stands for need not be."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def as_json_lines(rows: Any) -> bytes:
    """Write a list as JSON lines; a mutation may have made something else of it."""
    return b"".join(as_json(row) + b"\n" for row in (rows if isinstance(rows, list) else [rows]))


@st.composite
def damaged(draw: st.DrawFn, valid: Sequence[bytes], junk: Sequence[bytes] = ()) -> bytes:
    """Draw a valid file with one to three places cut off, lost, doubled, flipped or overwritten."""
    data = draw(st.sampled_from(valid))
    pieces = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b'"', b"<", b"{", b"-" * 70_000, *junk)
    for _ in range(draw(st.integers(1, 3))):
        place, size = draw(st.integers(0, len(data))), draw(st.integers(1, 40))
        how = draw(st.sampled_from(("cut", "lose", "double", "flip", "insert", "insert", "overwrite")))
        head, middle, tail = data[:place], data[place : place + size], data[place + size :]
        if how == "cut":
            data = head
        elif how == "lose":
            data = head + tail
        elif how == "double":
            data = head + middle * 2 + tail
        elif how == "flip":
            data = head + bytes(byte ^ 1 << size % 8 for byte in middle[:1]) + data[place + 1 :]
        else:
            data = head + draw(st.sampled_from(pieces)) + (tail if how == "overwrite" else middle + tail)
    return data
