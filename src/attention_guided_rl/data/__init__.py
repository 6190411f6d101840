"""Corpora: where articles come from. `CORPORA` is the table; `package.module:name` in the configuration works too."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.encyclopedia import EncyclopediaCorpus
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.records import Article


@runtime_checkable
class Corpus(Protocol):
    """A sequence of articles in a fixed order, read from any place."""

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield the articles of pass number `epoch` from place `start` on; end after one pass, or never."""
        ...


CORPORA: dict[str, Callable[[CorpusConfig], Corpus]] = {
    "encyclopedia": EncyclopediaCorpus,
    "files": FilesCorpus,
    "dump": DumpCorpus,
}
