"""Plain text: what is left of a string from anywhere, fit to be tokenised and written."""

import re

_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # NUL and lone surrogates, which cannot be tokenised or written


def clean(text: str | None) -> str:
    """Return the text without what is none, each line ending in a line feed; empty for None."""
    return _NOT_TEXT.sub("", text or "").replace("\r\n", "\n").replace("\r", "\n")


def one_line(text: str | None) -> str:
    """Return the words of the clean text with one space between them."""
    return " ".join(clean(text).split())


def printable(text: str, limit: int = 200) -> str:
    """Return text of a server so that a terminal can show it: one line, nothing that is not printable."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text[: 4 * limit].split()))[:limit]
