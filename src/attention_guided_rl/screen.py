"""Screen: text from anywhere, as a terminal may show it."""

import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


def visible(text: str) -> str:
    """Return text on one line in which no character can control the terminal."""
    return "".join(
        c if c.isprintable() else (" " if c in "\n\t" else f"<{unicodedata.name(c, f'U+{ord(c):04X}')}>") for c in text
    ).strip()


def make_console() -> Console:
    """Return the console for everything a person reads; width 100 where there is no terminal."""
    width = None if sys.stdout.isatty() else 100
    return _Console(width=width, soft_wrap=True, markup=False, emoji=False)


class _Console(Console):
    """A console whose own control sequences reach the terminal and those of any text do not."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.replace("\n", "").isprintable():
                yield segment
            else:
                yield segment._replace(
                    text="".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in segment.text)
                )
