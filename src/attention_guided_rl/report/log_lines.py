"""Lines of a run's logs: streamed, with whatever is damaged left out and counted."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LINE_LEN = 64_000_000  # bytes; what is longer is no line of ours
MAX_CHARACTERS = 600  # of a key, a query or a title
_VISIBLE = {"Cc": "�", "Cs": "�", "Zl": " ", "Zp": " "}  # by category: controls, halves of surrogate pairs, separators


def lines(path: Path, damaged: Counter[str], start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the whole lines of a file with their offsets; one that is cut off or endless is damaged."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        while line := file.readline(_LINE_LEN):
            if line.endswith(b"\n"):
                yield offset, line
            else:
                damaged[path.name] += 1
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LINE_LEN)
            offset = file.tell()


def objects(path: Path, damaged: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file."""
    for _, line in lines(path, damaged):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            yield content
        else:
            damaged[path.name] += 1


def clean(text: str, *, strip: bool = True) -> str:
    """Return text that any encoding and any page can hold, of bounded length; what cannot be shown becomes �."""
    text = "".join(_VISIBLE.get(unicodedata.category(c), c) if c not in "\n\t" else " " for c in text)
    text = text.strip() if strip else text
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
