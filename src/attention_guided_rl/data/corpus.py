"""Corpus: what every source of articles looks like to the rest."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from attention_guided_rl.records import Article


@runtime_checkable
class Corpus(Protocol):
    """A sequence of places in a fixed order, read from any one on; most places hold an article.

    A corpus that knows all of its articles may have an attribute `pinned`, a digest of them and their revisions: a run
    is resumed only where it is the same.
    """

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield what is at each place of pass number `epoch` from place `start` on; end after one pass, or never.

        None: nothing to read there, such as a redirect. A place means the same article whatever `start` was.
        Several passes may be read at the same time, and none disturbs another.
        """
        ...
