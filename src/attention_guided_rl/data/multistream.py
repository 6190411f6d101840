"""A multistream dump: reading it from any place on, with the index that comes with it.

In: a dump that is many bz2 streams one after another (a head, then about a hundred pages in each, at last the end), and
its index, plain or bz2, with a line `offset:page id:title` for each page. Out: the streams, and what each unpacks to.
"""

import bz2
import difflib
import functools
import html
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from attention_guided_rl.errors import CorpusError
from attention_guided_rl.randomness import Purpose, generator

CHUNK = 2**20  # bytes unpacked at a time: bz2 is slow if other work takes the cache within its blocks of 900 kB
_PACKED = 2**16  # bytes read of a stream at a time; most streams have a few hundred thousand

_BLOCK = 2**20  # bytes of the index that are looked at together
_MAX_LINE = 2**12  # bytes; titles have at most 255, and a few more where `&` is written `&amp;`
# All neighbouring lines with the same offset. Of the 20 million lines of a large index none becomes a Python object.
_RUN = re.compile(rb"([1-9][0-9]{0,17}):[0-9]+:[^\n]+\n(?:\1:[0-9]+:[^\n]+\n)*")
_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # how a bz2 stream begins
_WRITTEN = {"&": "&(?:amp;)?", '"': '(?:"|&quot;)', "'": "(?:'|&#0?39;)"}  # indices take titles as the XML has them


@dataclass(frozen=True, slots=True)
class _Streams:
    """The streams that hold pages, in the order of visits."""

    offsets: Int64[np.ndarray, " N"]
    """First byte of each in the dump."""
    num_pages: Int64[np.ndarray, " N"]
    ends: Int64[np.ndarray, " N"]
    """Places up to the end of each."""


class Multistream:
    """A multistream dump with its index; places are pages, stream after stream in file order or in one random order."""

    def __init__(self, dump: Path, index: Path, shuffle_seed: int | None) -> None:
        """Check the paths; `shuffle_seed`: None for file order.

        Raises:
            CorpusError: there is no such index, or the dump is not bz2.
        """
        self._dump, self._index, self._seed = dump, index, shuffle_seed
        if dump.suffix.lower() != ".bz2":
            raise CorpusError(f"{dump}: corpus.index is for multistream dumps in bz2 alone; leave it out")
        if not index.is_file():
            raise CorpusError(f"{index}: no such file; set corpus.index to the index of {dump.name}, or leave it out")

    def streams_from(self, start: int) -> tuple[int, Iterator[tuple[int, int]]]:
        """Return how many pages to skip, and (offset, number of pages) of the stream with place `start` and all after.

        Raises:
            CorpusError: the index is damaged, empty or of another dump.
        """
        streams = self._streams
        first = int(np.searchsorted(streams.ends, start, side="right"))
        skipped = int(streams.ends[first - 1]) if first else 0
        places = range(first, len(streams.ends))
        return start - skipped, ((int(streams.offsets[i]), int(streams.num_pages[i])) for i in places)

    def read(self, offset: int) -> Iterator[bytes]:
        """Yield what one stream unpacks to, CHUNK bytes at most at a time; the first stream holds the dump's head.

        Raises:
            CorpusError: no stream begins at `offset`.
            OSError, EOFError: the stream is damaged or cut off.
        """
        with self._dump.open("rb") as file:
            file.seek(offset)
            packed = file.read(_PACKED)
            if offset and not _STREAM.match(packed):
                raise self.mismatch(f"no bz2 stream begins at byte {offset} of {self._dump.name}")
            unpacker = bz2.BZ2Decompressor()
            while not unpacker.eof:
                if unpacker.needs_input and not packed:
                    raise EOFError("the file ends within a bz2 stream")
                yield unpacker.decompress(packed, CHUNK)
                packed = file.read(_PACKED) if unpacker.needs_input else b""

    def find(self, title: str) -> int | None:
        """Return the offset of the stream that holds the page with this title, written as by `normal_title`."""
        if not title:
            return None
        first, *others = (_WRITTEN.get(sign) or re.escape(sign) for sign in title)
        pattern = f"(?:{first}|{re.escape(title[0].lower())}){''.join(others)}"
        line = re.compile(rb"\n([1-9][0-9]{0,17}):[0-9]+:" + pattern.encode(errors="surrogatepass") + rb"\r?\n")
        found = (line.search(b"\n" + lines) for lines in self._blocks())
        return next((int(match[1]) for match in found if match), None)

    def nearest(self, title: str) -> list[str]:
        """Return up to three other titles that resemble this one and begin with the same letter."""
        line = re.compile(rb"\n[0-9]+:[0-9]+:(" + re.escape(title[:1]).encode(errors="surrogatepass") + rb"[^\r\n]*)")
        names = (name.decode(errors="replace") for lines in self._blocks() for name in line.findall(b"\n" + lines))
        return difflib.get_close_matches(title, (other for name in names if (other := html.unescape(name)) != title))

    def mismatch(self, what: str) -> CorpusError:
        """Return the error for an index and a dump that do not agree."""
        return CorpusError(f"{self._index}: {what}; set corpus.index to the index of this very dump")

    @functools.cached_property
    def _streams(self) -> _Streams:
        offsets, num_pages = array("q"), array("q")
        size = self._dump.stat().st_size
        for offset, count in self._runs():
            if offset >= size:
                raise self.mismatch(f"byte {offset} is behind the end of {self._dump.name}")
            if offsets and offsets[-1] == offset:
                num_pages[-1] += count
            else:
                offsets.append(offset)
                num_pages.append(count)
        if not offsets:
            raise CorpusError(f"{self._index}: empty; download the index again")
        order = np.arange(len(offsets))
        if self._seed is not None:
            order = generator(self._seed, Purpose.SHUFFLE).permutation(len(offsets))
        counts = np.array(num_pages, np.int64)[order]
        return _Streams(np.array(offsets, np.int64)[order], counts, counts.cumsum())

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield offset and number of neighbouring lines with the same offset."""
        line, last = 1, 0
        for lines in self._blocks():
            position = 0
            while position < len(lines):
                run = _RUN.match(lines, position)
                if run is None:
                    bad = lines[position : position + 50].partition(b"\n")[0].decode(errors="replace")
                    raise CorpusError(
                        f"{self._index}:{line}: {bad!r} is no `offset:page id:title`; download the index again"
                    )
                if int(run[1]) < last:
                    raise CorpusError(
                        f"{self._index}:{line}: offset {int(run[1])} after {last}; download the index again"
                    )
                last, count = int(run[1]), run[0].count(b"\n")
                yield last, count
                position, line = run.end(), line + count

    def _blocks(self) -> Iterator[bytes]:
        """Yield the index in blocks of whole lines."""
        rest = b""
        try:
            with open_unpacked(self._index) as file:
                while block := file.read(_BLOCK):
                    lines = rest + block
                    end = lines.rfind(b"\n") + 1
                    if len(lines) - end > _MAX_LINE:
                        end = len(lines)  # this is no line, and must not pile up in memory
                    yield lines[:end]
                    rest = lines[end:]
        except (OSError, EOFError) as error:
            raise CorpusError(f"{self._index}: {error}; download the index again") from error
        if rest:
            yield rest + b"\n"


def open_unpacked(path: Path) -> BufferedIOBase:
    """Open a file that is plain or, by its name, bz2 of any number of streams."""
    return bz2.open(path) if path.suffix.lower() == ".bz2" else path.open("rb")


def unpack(path: Path) -> Iterator[bytes]:
    """Yield what a whole file unpacks to, CHUNK bytes at most at a time."""
    with open_unpacked(path) as file:
        while chunk := file.read1(CHUNK):  # `read` would lose what is before damage
            yield chunk


def normal_title(title: str) -> str:
    """Return a title as MediaWiki compares it: no section, underscores as spaces, the first letter in upper case."""
    title = " ".join(title.partition("#")[0].replace("_", " ").split())
    return title[:1].upper() + title[1:]
