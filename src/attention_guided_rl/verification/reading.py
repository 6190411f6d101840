"""Reading: a run's files as anyone may read them, strictly, and with nothing of the code that wrote them.

In: paths. Out: JSON objects, a line at a time, and tensors of safetensors files as arrays. No torch, no safetensors.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from attention_guided_rl.errors import CheckpointError

Json = dict[str, Any]
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
OTHERS = {"BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a JSONL file."""

    where: str
    """Its file and number, for messages."""
    end: int
    """Bytes of the file up to and with this line."""
    record: Json


def strict_object(text: bytes, where: str) -> Json:
    """Parse one JSON object in UTF-8, without NaN, Infinity and what becomes infinite.

    Raises:
        CheckpointError: it is none.
    """
    try:
        record = json.loads(text.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not strict JSON: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return record


def read_object(path: Path) -> Json:
    """Read a file that is one JSON object.

    Raises:
        CheckpointError: it is missing or is none.
    """
    try:
        return strict_object(path.read_bytes(), str(path))
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(path: Path, length: int | None = None) -> Iterator[Line]:
    """Yield the lines of a JSONL file, or of its first `length` bytes.

    Raises:
        CheckpointError: it is missing or shorter, a line is cut off, or is no JSON object.
    """
    end = number = 0
    try:
        with path.open("rb") as file:
            while end != length and (text := file.readline()):
                number, end = number + 1, end + len(text)
                where = f"{path}, line {number}"
                if not text.endswith(b"\n") or (length is not None and end > length):
                    raise CheckpointError(f"{where}: cut off")
                yield Line(where, end, strict_object(text, where))
    except OSError as error:
        raise unreadable(path, error) from None
    if length is not None and end < length:
        raise CheckpointError(f"{path}: {end} bytes; it had {length} when the checkpoint was written")


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read the tensors of a safetensors file: 8 bytes of length, a JSON header, the data.

    Raises:
        CheckpointError: the file is not of that form, or a number in it is not finite.
    """
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = strict_object(file.read(min(start - 8, path.stat().st_size)), str(path))
        data = np.fromfile(path, dtype=np.uint8, offset=start)
    except OSError as error:
        raise unreadable(path, error) from None
    header.pop("__metadata__", None)
    tensors, covered = {}, 0
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            tensors[name] = _array(data[begin:end], entry["dtype"]).reshape(entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: tensor {name!r} is not what the header says") from None
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"{path}: tensor {name!r} has a number that is not finite")
        covered += end - begin
    if covered != len(data):
        raise CheckpointError(f"{path}: {len(data)} bytes of tensors where the header counts {covered}")
    return tensors


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error of a file that is missing or cannot be read."""
    reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return CheckpointError(f"{path}: {reason}")


def _array(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # the upper half of a float32
        return (data.view(OTHERS[dtype]).astype("<u4") << 16).view("<f4")
    return data.view((FLOATS | OTHERS)[dtype])


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number
