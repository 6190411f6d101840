"""Article cache: what a wiki replied, kept on disk and pinned by revision.

In: replies, each with its question. Out: the same to the same question for as long as the folder is there, so that a
second run asks for nothing and a resumed one reads the same text.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from attention_guided_rl.errors import StorageError
from attention_guided_rl.storage import write_text

CACHE_FOLDER = "wikipedia"  # in the cache

_REVISION = re.compile(rb'\n "page_id": (\d{1,18}),\n "revision": (\d{1,18}),\n')  # in no text: JSON escapes its lines

_log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound="CachedReply")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedReply:
    """What a wiki replied, and to which question."""

    kind: ClassVar[str] = ""
    """Part of what its file is named by; empty for pages."""
    site: str
    requested: str
    retrieved: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Time in UTC."""

    def is_sound(self) -> bool:
        """Return whether it is as it was written."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSite(CachedReply):
    """What its reply about itself says of a wiki."""

    kind = "site"
    no_prose: tuple[str, ...]
    """Prefixes of the links that show no text."""
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTitles(CachedReply):
    """The titles of a category, or those drawn at random."""

    kind = "titles"
    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPage(CachedReply):
    """One revision of the page that a title led to; or, with `problem`, why there is no article."""

    title: str
    page_id: int
    revision: int
    timestamp: str
    url: str
    licence: str
    wikitext: str
    sha256: str
    """Of the wikitext."""
    problem: str

    def is_sound(self) -> bool:
        """Return whether the text is as it was written."""
        return self.sha256 == digest(self.wikitext)


_ADAPTERS: dict[type[CachedReply], TypeAdapter[Any]] = {
    shape: TypeAdapter(shape) for shape in (CachedSite, CachedTitles, CachedPage)
}


class ArticleCache:
    """The files of one wiki in the cache. Their names are hashes: a title is never a name of a file."""

    def __init__(self, folder: Path, site: str) -> None:
        self._folder, self._site = folder, site

    def read(self, shape: type[Reply], requested: str) -> Reply | None:
        """Return what is kept, or None; what is damaged counts as not there."""
        try:
            kept: Reply = _ADAPTERS[shape].validate_json(self._path(shape, requested).read_bytes())
        except (OSError, ValidationError):
            return None
        return kept if (kept.site, kept.requested) == (self._site, requested) and kept.is_sound() else None

    def damaged_revision(self, requested: str) -> tuple[int, int] | None:
        """Return the number and revision of the page that a damaged file had, or None where that cannot be known."""
        try:
            text = self._path(CachedPage, requested).read_bytes()
        except OSError:
            return None
        found = _REVISION.search(text)
        is_its_own = f'\n "requested": {json.dumps(requested, ensure_ascii=False)},\n'.encode() in text
        if found is None or not is_its_own or self.read(CachedPage, requested) is not None:
            return None
        return int(found[1]), int(found[2])

    def write(self, kept: CachedReply) -> None:
        """Keep what was not there; raise StorageError where the disk refuses."""
        path = self._path(type(kept), kept.requested)
        if path.exists():
            _log.warning("%s: what the cache had of %r was damaged or no article; fetched again", path, kept.requested)
        write_text(path, json.dumps(asdict(kept), ensure_ascii=False, indent=1) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time look up again and fetch, so that those started together do not all ask."""
        try:
            self._folder.mkdir(exist_ok=True)
            acquired = FileLock(self._folder / ".lock").acquire()
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot write: {error.strerror or error}") from error
        with acquired:
            yield

    def _path(self, shape: type[CachedReply], requested: str) -> Path:
        name = "\n".join(filter(None, (self._site, shape.kind, requested)))
        return self._folder / f"{digest(name)}.json"


def digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
