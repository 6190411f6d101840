"""A MediaWiki pages-articles dump as a corpus: XML, plain or bz2, read as a stream.

In: the file that Wikipedia offers for download, with or without its index. Out: an Article of clean prose for each page
that is one. Memory holds a page at a time, however large the dump.
"""

import difflib
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.dump_xml import DAMAGE, DumpPage, damaged, parse_pages
from attention_guided_rl.data.multistream import Multistream, normal_title, unpack
from attention_guided_rl.data.plain_text import clean
from attention_guided_rl.data.wikitext import (
    MAX_WIKITEXT,
    clean_wikitext,
    is_disambiguation,
)
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.records import Article

MAX_REDIRECTS = 5  # each costs a pass over the file, or over its index

_log = logging.getLogger(__name__)


class DumpCorpus:
    """The articles of a MediaWiki dump; a place is a page, and what is no article is an empty place.

    None are redirects, disambiguation pages, pages of other namespaces, empty ones and those above MAX_WIKITEXT. Pages
    come in file order; with `corpus.index` and `corpus.shuffle` the bz2 streams come in one random order.
    """

    def __init__(self, config: CorpusConfig) -> None:
        """Check the paths; raise CorpusError if the dump is no file that ends in .xml or .bz2, or the index no file."""
        if config.path is None:
            raise ConfigError("corpus.kind: dump needs corpus.path")
        self.bytes_read = 0
        """Bytes of XML read so far, by all passes together."""
        self._path = config.path
        self._title = config.title
        if not self._path.is_file():
            raise CorpusError(f"{self._path}: no such file; set corpus.path to a pages-articles XML dump")
        if self._path.suffix.lower() not in (".xml", ".bz2"):
            raise CorpusError(f"{self._path}: neither .xml nor .bz2; set corpus.path to a pages-articles XML dump")
        seed = config.seed if config.shuffle else None
        self._multistream = None if config.index is None else Multistream(self._path, config.index, seed)

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield what is at each page of the dump from place `start` on, in the same order in every epoch.

        Without an index the pages before `start` are read but not converted; with one they are not read.

        Raises:
            CorpusError: the file is damaged, has no article, or lacks the one with the configured title; the index is
                damaged or of another dump.
        """
        if self._title is not None:
            yield from (self._only,)[start:]
            return
        found = start > 0  # the end of a pass need not hold an article
        for page in self._pages_from(start):
            article = self._convert(page)
            found = found or article is not None
            yield article
        if not found:
            raise CorpusError(f"{self._path}: only redirects or disambiguation pages; set corpus.path to another dump")

    def _convert(self, page: DumpPage) -> Article | None:
        if not page.is_main or page.redirect is not None or not page.text:
            return None
        if len(page.text) > MAX_WIKITEXT:
            _log.warning("%s: skipped %r: %d characters of wikitext", self._path, page.title, len(page.text))
            return None
        return None if _is_disambiguation(page) else _article(page, self._path.name)

    @functools.cached_property
    def _only(self) -> Article:
        """The article with the configured title, behind any redirects; kept, for every epoch asks for it."""
        wanted = [normal_title(self._title or "")]
        while (page := self._find(wanted)).redirect is not None:
            wanted.append(normal_title(page.redirect))
            if wanted[-1] in wanted[:-1] or len(wanted) > MAX_REDIRECTS:
                raise CorpusError(f"{self._path}: {' → '.join(wanted)}: redirects lead nowhere; change corpus.title")
        if _is_disambiguation(page):
            links = ", ".join(re.findall(r"\[\[([^\[\]|#:\n]{1,100})", page.text)[:5])
            raise CorpusError(f"{self._path}: {page.title!r} has several meanings; set corpus.title to one: {links}")
        if not 0 < len(page.text) <= MAX_WIKITEXT:
            raise CorpusError(f"{self._path}: {page.title!r} is empty or too large; change corpus.title")
        return _article(page, self._path.name)

    def _find(self, wanted: list[str]) -> DumpPage:
        """Stop at the page with the last title; the titles passed on the way are suggested if there is none."""
        found: list[DumpPage] = []

        def titles() -> Iterator[str]:
            for page in filter(lambda page: page.is_main, self._pages_for(wanted[-1])):
                if normal_title(page.title) == wanted[-1]:
                    found.append(page)
                    return
                yield page.title

        near = difflib.get_close_matches(wanted[-1], titles())
        if not found:
            near = self._multistream.nearest(wanted[-1]) if self._multistream else near
            hint = f"nearest: {', '.join(map(repr, near))}" if near else "none is near it; change corpus.title"
            raise CorpusError(f"{self._path}: no page {' → '.join(map(repr, wanted))}; {hint}")
        return found[0]

    def _pages_for(self, title: str) -> Iterator[DumpPage]:
        """Yield the pages among which the title must be: with an index those of one stream, otherwise all."""
        if self._multistream is None:
            yield from self._pages_from(0)
        elif (offset := self._multistream.find(title)) is not None:
            titles = set()
            for page in self._pages_of_stream(self._multistream, offset):
                titles.add(normal_title(page.title))
                yield page
            if title not in titles:
                raise self._multistream.mismatch(f"{title!r} is not where it should be in {self._path.name}")

    def _pages_from(self, start: int) -> Iterator[DumpPage]:
        if self._multistream is None:
            yield from itertools.islice(self._parsed(self._counted(unpack(self._path))), start, None)
            return
        skip, streams = self._multistream.streams_from(start)
        for offset, num_pages in streams:
            count = 0
            for count, page in enumerate(self._pages_of_stream(self._multistream, offset), 1):
                if skip < count <= num_pages:
                    yield page
            if count != num_pages:
                raise self._multistream.mismatch(
                    f"{num_pages} pages at byte {offset}, where {self._path.name} has {count}"
                )
            skip = 0

    def _pages_of_stream(self, multistream: Multistream, offset: int) -> Iterator[DumpPage]:
        """Read the head of the dump, then one stream, as if they were a dump that goes on."""
        chunks = itertools.chain(multistream.read(0), self._counted(multistream.read(offset)))
        return self._parsed(chunks, f" of the bz2 stream at byte {offset}", is_whole=False)

    def _parsed(self, chunks: Iterable[bytes], where: str = "", *, is_whole: bool = True) -> Iterator[DumpPage]:
        """Yield the pages of a dump's XML; raise CorpusError that says how far it could be read."""
        count, last = 0, ""
        try:
            for page in parse_pages(chunks, is_whole=is_whole):
                count, last = count + 1, page.title
                yield page
        except DAMAGE as error:
            read = f"after {count} pages{where}, the last {last!r}" if count else f"before the first page{where}"
            raise damaged(self._path, error, read) from error

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.bytes_read += len(chunk)
            yield chunk


def _article(page: DumpPage, file_name: str) -> Article:
    name = quote(page.title.replace(" ", "_"), safe=";@$!*(),/~:")  # as MediaWiki writes its addresses
    return Article(
        id=f"page:{page.id}",
        title=page.title,
        text=clean(clean_wikitext(page.text, page.site.no_prose)),  # entities may stand for what is no text
        source=f"dump:{file_name}",
        revision=page.revision,
        url=page.site.base + name if page.site.base else "",
        licence="CC BY-SA 4.0",
    )


def _is_disambiguation(page: DumpPage) -> bool:
    return page.title.lower().endswith("(disambiguation)") or is_disambiguation(page.text)
