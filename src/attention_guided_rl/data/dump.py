"""A MediaWiki pages-articles dump as a corpus: XML, plain or bz2, read as a stream.

In: the file that Wikipedia offers for download, with or without its index. Out: an Article of clean prose for each page
that is one. Memory holds a page at a time, however large the dump.
"""

import difflib
import functools
import itertools
import logging
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import quote
from xml.parsers import expat

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.multistream import Multistream, normal_title, open_unpacked, unpack
from attention_guided_rl.data.wikitext import (
    MAX_WIKITEXT,
    NO_PROSE_NAMESPACES,
    clean_wikitext,
    is_disambiguation,
    redirect_target,
)
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.records import Article

MAX_PAGE = 2**25  # bytes of XML without the end of a page: a decompression bomb, or a dump with full history
MAX_REDIRECTS = 5  # each costs a pass over the file, or over its index

_HEAD = 2**12  # bytes; most dumps need no more to be known for dumps
_DAMAGE = (ET.ParseError, expat.ExpatError, EOFError, OSError, ValueError, LookupError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Site:
    """What the head of a dump says about its wiki."""

    base: str = ""
    """Address that page names are appended to; empty if the dump names none."""
    namespaces: frozenset[str] = frozenset()
    """Names of all but the main one: old dumps have no `<ns>`, only these names in titles."""
    no_prose: frozenset[str] = NO_PROSE_NAMESPACES
    """Names of those whose links show no text."""


@dataclass(frozen=True, slots=True)
class _Page:
    """A page; `redirect` is the title it points to."""

    title: str
    id: str
    revision: str
    redirect: str | None
    text: str
    site: _Site
    is_main: bool
    """Whether it is wikitext of the main namespace."""


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

    def _convert(self, page: _Page) -> Article | None:
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

    def _find(self, wanted: list[str]) -> _Page:
        """Stop at the page with the last title; the titles passed on the way are suggested if there is none."""
        found: list[_Page] = []

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

    def _pages_for(self, title: str) -> Iterator[_Page]:
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

    def _pages_from(self, start: int) -> Iterator[_Page]:
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

    def _pages_of_stream(self, multistream: Multistream, offset: int) -> Iterator[_Page]:
        """Read the head of the dump, then one stream, as if they were a dump that goes on."""
        chunks = itertools.chain(multistream.read(0), self._counted(multistream.read(offset)))
        return self._parsed(chunks, f" of the bz2 stream at byte {offset}", is_whole=False)

    def _parsed(self, chunks: Iterable[bytes], where: str = "", *, is_whole: bool = True) -> Iterator[_Page]:
        """Yield the pages of a dump's XML; raise CorpusError that says how far it could be read."""
        count, last = 0, ""
        try:
            for page in _parse_pages(_checked(chunks), is_whole):
                count, last = count + 1, page.title
                yield page
        except _DAMAGE as error:
            read = f"after {count} pages{where}, the last {last!r}" if count else f"before the first page{where}"
            raise _damaged(self._path, error, read) from error

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.bytes_read += len(chunk)
            yield chunk


def bare_parse(path: Path) -> tuple[int, float]:
    """Unpack and parse a dump and do nothing else, as the yardstick for reading it; return bytes of XML and seconds.

    Raises:
        CorpusError: the file is damaged.
    """
    begin = time.perf_counter()
    try:
        with open_unpacked(path) as stream:
            elements = ET.iterparse(stream, events=("start", "end"))
            _, root = next(elements)
            for event, element in elements:
                if event == "end":
                    element.clear()
                    root.clear()  # else it keeps every page, if an empty one
            return stream.tell(), time.perf_counter() - begin
    except _DAMAGE as error:
        raise _damaged(path, error, "in a bare parse") from error


def _damaged(path: Path, error: Exception, read: str) -> CorpusError:
    cause = "the file is empty" if path.is_file() and not path.stat().st_size else error
    return CorpusError(f"{path}: {cause} ({read}); download the dump again")


def _checked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on the XML, once its head is seen to be harmless: a document type could define entities without end.

    Raises:
        ValueError: it declares a document type, or its root element is not a dump's.
    """
    roots: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type, which no dump has: refused, for its entities may expand")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: roots.append(name)
    for chunk in chunks:
        for i in range(0, 0 if roots else len(chunk), _HEAD):
            try:
                parser.Parse(chunk[i : i + _HEAD])
            except expat.ExpatError:
                if not roots:  # damage behind the root comes up again, after the pages before it
                    raise
            if roots:
                break
        if roots and roots[0].rpartition(":")[2] != "mediawiki":
            raise ValueError(f"its root element is {roots[0][:50]!r}, not 'mediawiki'")
        yield chunk


def _parse_pages(chunks: Iterable[bytes], is_whole: bool) -> Iterator[_Page]:
    """Yield the pages; `is_whole`: the XML must come to its end.

    Raises:
        ValueError: more than MAX_PAGE bytes between the ends of two pages.
    """
    parser: ET.XMLPullParser[ET.Element] = ET.XMLPullParser(("start", "end"))
    site, since_page = _Site(), 0
    root: ET.Element | None = None
    for chunk in chunks:
        since_page += len(chunk)
        if since_page > MAX_PAGE:
            raise ValueError(f"no page ends within {MAX_PAGE} bytes: not a pages-articles dump")
        parser.feed(chunk)
        for event, element in cast("Iterator[tuple[str, ET.Element]]", parser.read_events()):
            root = element if root is None else root
            name = element.tag.rpartition("}")[2] if event == "end" else ""
            if name == "siteinfo":
                site = _read_site(element)
            elif name == "page":
                since_page = 0
                page = _read_page(element, site)
                root.clear()  # else it keeps every page
                yield page
    if is_whole:
        parser.close()


def _read_site(head: ET.Element) -> _Site:
    names = {n.get("key", "0"): (n.text or "").lower() for n in head.iterfind("{*}namespaces/{*}namespace")}
    base = re.match(r"https?://[\w.:-]+/(?:[\w.~-]+/)*", head.findtext("{*}base") or "")
    return _Site(
        base=base[0] if base else "",
        namespaces=frozenset(name for key, name in names.items() if key != "0"),
        no_prose=NO_PROSE_NAMESPACES | {names[key] for key in ("-2", "6", "14") if key in names},
    )


def _read_page(element: ET.Element, site: _Site) -> _Page:
    page = {child.tag.rpartition("}")[2]: child for child in element}
    revision = {child.tag.rpartition("}")[2]: child.text or "" for child in page.get("revision", ())}
    given = {name: page[name].text or "" for name in ("title", "id", "ns") if name in page}
    title, text = given.get("title", ""), revision.get("text", "")
    elsewhere = ":" in title and title.partition(":")[0].lower() in site.namespaces
    namespace = given.get("ns") or ("unknown" if elsewhere else "0")
    redirect = page.get("redirect")
    return _Page(
        title=title,
        id=given.get("id", ""),
        revision=revision.get("id", ""),
        redirect=(redirect.get("title") if redirect is not None else None) or redirect_target(text),
        text=text,
        site=site,
        is_main=title != "" and namespace == "0" and revision.get("model", "wikitext") == "wikitext",
    )


def _article(page: _Page, file_name: str) -> Article:
    name = quote(page.title.replace(" ", "_"), safe=";@$!*(),/~:")  # as MediaWiki writes its addresses
    return Article(
        id=f"page:{page.id}",
        title=page.title,
        text=clean_wikitext(page.text, page.site.no_prose),
        source=f"dump:{file_name}",
        revision=page.revision,
        url=page.site.base + name if page.site.base else "",
        licence="CC BY-SA 4.0",
    )


def _is_disambiguation(page: _Page) -> bool:
    return page.title.lower().endswith("(disambiguation)") or is_disambiguation(page.text)
