"""The XML of a MediaWiki dump: its pages, one after another, and the damage it may have.

In: bytes of XML. Out: a DumpPage for each page, whatever it is. Memory holds a page at a time.
"""

import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from xml.parsers import expat

from attention_guided_rl.data.multistream import open_unpacked
from attention_guided_rl.data.wikitext import NO_PROSE_NAMESPACES, redirect_target
from attention_guided_rl.errors import CorpusError

MAX_PAGE = 2**25  # bytes of XML without the end of a page: a decompression bomb, or a dump with full history
MAX_ELEMENTS = 2**16  # begun without the end of a page; each takes about a hundred bytes, and a page has about twenty
DAMAGE = (ET.ParseError, expat.ExpatError, EOFError, OSError, ValueError, LookupError)
"""What unpacking and parsing raise where a file is damaged, cut off or no dump."""

_HEAD = 2**12  # bytes; most dumps need no more to be known for dumps
_MAX_HEAD = 2**18  # bytes before the first element has begun; expat reads what is unfinished again with each piece


@dataclass(frozen=True, slots=True)
class DumpSite:
    """What the head of a dump says about its wiki."""

    base: str = ""
    """Address that page names are appended to; empty if the dump names none."""
    namespaces: frozenset[str] = frozenset()
    """Names of all but the main one: old dumps have no `<ns>`, only these names in titles."""
    no_prose: frozenset[str] = NO_PROSE_NAMESPACES
    """Names of those whose links show no text."""


@dataclass(frozen=True, slots=True)
class DumpPage:
    """A page; `redirect` is the title it points to."""

    title: str
    id: str
    revision: str
    redirect: str | None
    text: str
    site: DumpSite
    is_main: bool
    """Whether it is wikitext of the main namespace."""


def parse_pages(chunks: Iterable[bytes], *, is_whole: bool) -> Iterator[DumpPage]:
    """Yield the pages; `is_whole`: the XML must come to its end.

    Raises:
        ValueError: as `_checked`, or there are more than MAX_PAGE bytes or MAX_ELEMENTS elements without a page's end.
        ParseError: it is not well-formed.
    """
    parser: ET.XMLPullParser[ET.Element] = ET.XMLPullParser(("start", "end"))
    site, since_page, elements = DumpSite(), 0, 0
    root: ET.Element | None = None
    for chunk in _checked(chunks):
        since_page += len(chunk)
        if since_page > MAX_PAGE:
            raise ValueError(f"no page ends within {MAX_PAGE} bytes: not a pages-articles dump")
        parser.feed(chunk)
        for event, element in cast("Iterator[tuple[str, ET.Element]]", parser.read_events()):
            root = element if root is None else root
            elements += event == "start"
            if elements > MAX_ELEMENTS:
                raise ValueError(f"no page ends within {MAX_ELEMENTS} elements: not a pages-articles dump")
            name = element.tag.rpartition("}")[2] if event == "end" else ""
            if name == "siteinfo":
                site = _read_site(element)
            elif name == "page":
                since_page = elements = 0
                page = _read_page(element, site)
                root.clear()  # else it keeps every page
                yield page
    if is_whole:
        parser.close()


def _checked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on the XML, once its head is seen to be harmless: a document type could define entities without end.

    Raises:
        ValueError: it declares a document type, or its root element is not a dump's, or does not come.
    """
    roots: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type, which no dump has: refused, for its entities may expand")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: roots.append(name)
    head = 0
    for chunk in chunks:
        for i in range(0, 0 if roots else len(chunk), _HEAD):
            head += _HEAD
            try:
                parser.Parse(chunk[i : i + _HEAD])
            except expat.ExpatError:
                if not roots:  # damage behind the root comes up again, after the pages before it
                    raise
            if roots:
                break
            if head > _MAX_HEAD:
                raise ValueError(f"no element begins within {_MAX_HEAD} bytes: not a dump")
        if roots and roots[0].rpartition(":")[2] != "mediawiki":
            raise ValueError(f"its root element is {roots[0][:50]!r}, not 'mediawiki'")
        yield chunk


def _read_site(head: ET.Element) -> DumpSite:
    names = {n.get("key", "0"): (n.text or "").lower() for n in head.iterfind("{*}namespaces/{*}namespace")}
    base = re.match(r"https?://[\w.:-]+/(?:[\w.~-]+/)*", head.findtext("{*}base") or "")
    return DumpSite(
        base=base[0] if base else "",
        namespaces=frozenset(name for key, name in names.items() if key != "0"),
        no_prose=NO_PROSE_NAMESPACES | {names[key] for key in ("-2", "6", "14") if key in names},
    )


def _read_page(element: ET.Element, site: DumpSite) -> DumpPage:
    page = {child.tag.rpartition("}")[2]: child for child in element}
    revision = {child.tag.rpartition("}")[2]: child.text or "" for child in page.get("revision", ())}
    given = {name: page[name].text or "" for name in ("title", "id", "ns") if name in page}
    title, text = given.get("title", ""), revision.get("text", "")
    elsewhere = ":" in title and title.partition(":")[0].lower() in site.namespaces
    namespace = given.get("ns") or ("unknown" if elsewhere else "0")
    redirect = page.get("redirect")
    return DumpPage(
        title=title,
        id=given.get("id", ""),
        revision=revision.get("id", ""),
        redirect=(redirect.get("title") if redirect is not None else None) or redirect_target(text),
        text=text,
        site=site,
        is_main=title != "" and namespace == "0" and revision.get("model", "wikitext") == "wikitext",
    )


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
    except DAMAGE as error:
        raise damaged(path, error, "in a bare parse") from error


def damaged(path: Path, error: Exception, read: str) -> CorpusError:
    """Return the error for a damaged file; `read`: how far it could be read."""
    cause = "the file is empty" if path.is_file() and not path.stat().st_size else error
    return CorpusError(f"{path}: {cause} ({read}); download the dump again")
