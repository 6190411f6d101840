"""A MediaWiki pages-articles dump as a corpus: XML, plain or bz2, read as a stream.

In: the file that Wikipedia offers for download. Out: one Article of clean prose a page, in file order.
"""

import bz2
import difflib
import functools
import logging
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from urllib.parse import quote
from xml.parsers import expat

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.wikitext import clean_wikitext
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.records import Article

MAX_WIKITEXT = 2_000_000  # characters; MediaWiki itself refuses larger pages
MAX_PAGE = 2**25  # bytes of XML without the end of a page: a decompression bomb, or a dump with full history
MAX_REDIRECTS = 5  # each costs a pass over the file
NO_PROSE_NAMESPACES = frozenset(("file", "image", "media", "category"))

_REDIRECT = re.compile(r"\s*#redirect\b[^\[\n]*\[\[([^\]|\n]+)", re.IGNORECASE)
_DISAMBIGUATION = re.compile(
    r"\{\{(?:[a-z \n_-]*disambig(?:uation)?(?:[ _-](?:page|cleanup))?"
    r"|disamb|dab|hndis|geodis|numberdis|roaddis|schooldis|hospitaldis|mil-unit-dis|mathdab)[ \n]{0,9}[|}]",
    re.IGNORECASE,
)

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
    """A page of the main namespace; `redirect` is the title it points to."""

    title: str
    id: str
    revision: str
    redirect: str | None
    text: str
    site: _Site


class DumpCorpus:
    """The articles of a MediaWiki dump in file order; `corpus.shuffle` has no effect, for the file is a stream.

    Redirects, disambiguation pages, other namespaces and pages above MAX_WIKITEXT are left out. Places count articles,
    whatever is left of their text, so that going to place `start` converts no wikitext.
    """

    def __init__(self, config: CorpusConfig) -> None:
        """Check the path; raise CorpusError if it is no file that ends in .xml or .bz2."""
        if config.path is None:
            raise ConfigError("corpus.kind: dump needs corpus.path")
        self._path = config.path
        self._title = config.title
        if not self._path.is_file():
            raise CorpusError(f"{self._path}: no such file; set corpus.path to a pages-articles XML dump")
        if self._path.suffix.lower() not in (".xml", ".bz2"):
            raise CorpusError(f"{self._path}: neither .xml nor .bz2; set corpus.path to a pages-articles XML dump")

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield the dump's articles from place `start` on, in the same order in every epoch.

        Raises CorpusError where the file is damaged, has no article, or lacks the one with the configured title.
        """
        if self._title is not None:
            yield from (self._only,)[start:]
            return
        place = 0
        for page in self._pages():
            if len(page.text) > MAX_WIKITEXT:
                _log.warning("%s: skipped %r: %d characters of wikitext", self._path, page.title, len(page.text))
            elif page.text and page.redirect is None and not _is_disambiguation(page):
                if place >= start:
                    yield _article(page, self._path.name)
                place += 1
        if place == 0:
            raise CorpusError(f"{self._path}: only redirects or disambiguation pages; set corpus.path to another dump")

    @functools.cached_property
    def _only(self) -> Article:
        """The article with the configured title, behind any redirects; kept, for every epoch asks for it."""
        wanted = [_normal(self._title or "")]
        while (page := self._find(wanted)).redirect is not None:
            wanted.append(_normal(page.redirect))
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
            for page in self._pages():
                if _normal(page.title) == wanted[-1]:
                    found.append(page)
                    return
                yield page.title

        near = difflib.get_close_matches(wanted[-1], titles())
        if not found:
            hint = f"nearest: {', '.join(map(repr, near))}" if near else "none is near it; change corpus.title"
            raise CorpusError(f"{self._path}: no page {' → '.join(map(repr, wanted))}; {hint}")
        return found[0]

    def _open(self) -> BufferedIOBase:
        return bz2.open(self._path) if self._path.suffix.lower() == ".bz2" else self._path.open("rb")

    def _pages(self) -> Iterator[_Page]:
        count, last = 0, ""
        try:
            with self._open() as stream:
                _check_head(_Bounded(stream))
            with self._open() as stream:
                for page in _stream_pages(_Bounded(stream)):
                    count, last = count + 1, page.title
                    yield page
        except (ET.ParseError, expat.ExpatError, EOFError, OSError, ValueError, LookupError) as error:
            read = f"after {count} pages, the last {last!r}" if count else "before the first page"
            cause = "the file is empty" if self._path.is_file() and not self._path.stat().st_size else error
            raise CorpusError(f"{self._path}: {cause} ({read}); download the dump again") from error


class _Bounded:
    """A stream that refuses to give more than MAX_PAGE bytes between the ends of two pages."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self.since_page = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self.since_page += len(data)
        if self.since_page > MAX_PAGE:
            raise ValueError(f"no page ends within {MAX_PAGE} bytes: not a pages-articles dump")
        return data


def _check_head(stream: _Bounded) -> None:
    """Read up to the root element: a document type could define entities that expand without end."""
    roots: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type, which no dump has: refused, for its entities may expand")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: roots.append(name)
    try:
        while not roots and (chunk := stream.read(2**14)):
            parser.Parse(chunk)
    except expat.ExpatError:
        if not roots:  # damage behind the root comes up again, after the pages before it
            raise
    if roots and roots[0].rpartition(":")[2] != "mediawiki":
        raise ValueError(f"its root element is {roots[0][:50]!r}, not 'mediawiki'")


def _stream_pages(stream: _Bounded) -> Iterator[_Page]:
    site = _Site()
    root: ET.Element | None = None
    for event, element in ET.iterparse(stream, events=("start", "end")):
        root = element if root is None else root
        name = element.tag.rpartition("}")[2]
        if event == "end" and name == "siteinfo":
            site = _read_site(element)
        elif event == "end" and name == "page":
            stream.since_page = 0
            page = _read_page(element, site)
            root.clear()  # else it keeps every page
            if page is not None:
                yield page


def _read_site(head: ET.Element) -> _Site:
    names = {n.get("key", "0"): (n.text or "").lower() for n in head.iterfind("{*}namespaces/{*}namespace")}
    base = re.match(r"https?://[\w.:-]+/(?:[\w.~-]+/)*", head.findtext("{*}base") or "")
    return _Site(
        base=base[0] if base else "",
        namespaces=frozenset(name for key, name in names.items() if key != "0"),
        no_prose=NO_PROSE_NAMESPACES | {names[key] for key in ("-2", "6", "14") if key in names},
    )


def _read_page(element: ET.Element, site: _Site) -> _Page | None:
    """Return the page, or None if it is not wikitext of the main namespace."""
    title = element.findtext("{*}title") or ""
    text = element.findtext("{*}revision/{*}text") or ""
    elsewhere = ":" in title and title.partition(":")[0].lower() in site.namespaces
    namespace = element.findtext("{*}ns") or ("unknown" if elsewhere else "0")
    if not title or namespace != "0" or element.findtext("{*}revision/{*}model") not in (None, "wikitext"):
        return None
    target, marked = element.find("{*}redirect"), _REDIRECT.match(text)
    redirect = (target.get("title") if target is not None else None) or (marked[1] if marked else None)
    revision = element.findtext("{*}revision/{*}id") or ""
    return _Page(title, element.findtext("{*}id") or "", revision, redirect, text, site)


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


def _normal(title: str) -> str:
    """A title as MediaWiki compares it: without section, underscores as spaces, the first letter in upper case."""
    title = " ".join(title.partition("#")[0].replace("_", " ").split())
    return title[:1].upper() + title[1:]


def _is_disambiguation(page: _Page) -> bool:
    return page.title.lower().endswith("(disambiguation)") or _DISAMBIGUATION.search(page.text) is not None
