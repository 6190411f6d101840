"""Replies of MediaWiki's Action API: of each, the part that is read, checked as it comes in."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from attention_guided_rl.data.plain_text import printable
from attention_guided_rl.data.wikitext import MAX_WIKITEXT
from attention_guided_rl.errors import RemoteError
from attention_guided_rl.network import Transient

MISSING = "no such page"
INVALID = "not a valid title"
ELSEWHERE = "not in the main namespace"
CIRCLE = "a redirect in a circle"
SEVERAL = "a disambiguation page"
NOT_WIKITEXT = "no wikitext"
TOO_LARGE = "too large"
EMPTY = "no text"


@dataclass(frozen=True, slots=True)
class Slot:
    """The text of a revision."""

    content: str = ""
    contentmodel: str = "wikitext"


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision of a page."""

    revid: int
    timestamp: str = ""
    slots: dict[str, Slot] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PageReply:
    """What one part of a reply says of a page."""

    title: str
    pageid: int = 0
    ns: int = 0
    missing: bool = False
    invalid: bool = False
    fullurl: str = ""
    pageprops: dict[str, Any] = field(default_factory=dict)
    revisions: tuple[Revision, ...] = ()

    def after(self, earlier: "PageReply | None") -> "PageReply":
        """Return the page with what an earlier part of the reply said of it."""
        if earlier is None:
            return self
        return replace(
            self,
            fullurl=self.fullurl or earlier.fullurl,
            pageprops=earlier.pageprops | self.pageprops,
            revisions=self.revisions or earlier.revisions,
        )

    @property
    def slot(self) -> Slot:
        """The main text of the newest revision; empty where it is hidden."""
        return self.revisions[0].slots.get("main", Slot()) if self.revisions else Slot()

    @property
    def is_disambiguation(self) -> bool:
        """Whether the wiki marks the page as a list of meanings."""
        return "disambiguation" in self.pageprops

    @property
    def problem(self) -> str:
        """Why the page is no article, or empty."""
        problems = {
            INVALID: self.invalid,
            MISSING: self.missing,
            ELSEWHERE: self.ns != 0,
            SEVERAL: self.is_disambiguation,
            NOT_WIKITEXT: self.slot.contentmodel != "wikitext",
            TOO_LARGE: len(self.slot.content) > MAX_WIKITEXT,
            EMPTY: not self.slot.content.strip(),
        }
        return next((problem for problem, holds in problems.items() if holds), "")


@dataclass(frozen=True, slots=True)
class Move:
    """A redirect, or a title written otherwise."""

    to: str
    source: Annotated[str, Field(validation_alias="from")]


@dataclass(frozen=True, slots=True)
class Listed:
    """A title of a list, and the number of its namespace."""

    title: str
    ns: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of the wiki, in its language and in English."""

    name: str
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class Rights:
    """The licence of a wiki."""

    text: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """What was asked for; each question has its own fields."""

    normalized: tuple[Move, ...] = ()
    redirects: tuple[Move, ...] = ()
    pages: tuple[PageReply, ...] = ()
    categorymembers: tuple[Listed, ...] = ()
    search: tuple[Listed, ...] = ()
    namespaces: dict[str, Namespace] = field(default_factory=dict)
    rightsinfo: Rights = Rights()


@dataclass(frozen=True, slots=True)
class Error:
    """Why the wiki did not answer."""

    code: str
    info: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; `further`: the parameters that ask for the next part."""

    query: Query = Query()
    error: Error | None = None
    further: Annotated[dict[str, str | int], Field(validation_alias="continue")] = field(default_factory=dict)


_REPLY = TypeAdapter(Reply)


def read_reply(text: str, host: str) -> Reply:
    """Read a reply.

    Raises:
        Transient: it is no JSON, as when a proxy answers.
        RemoteError: it is that of another service.
    """
    try:
        return _REPLY.validate_json(text)
    except ValidationError as error:
        if error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] == "json_invalid":
            raise Transient(f"not an API reply: {printable(text, 80)!r}") from None
        raise RemoteError(f"{host}: not a reply of MediaWiki: {printable(text, 80)!r}; correct corpus.site") from None
