"""A dump with an index: reading from any place, in file order or shuffled, by title, and how it refuses bad indices."""

import bz2
import contextlib
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data import multistream
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.dump_xml import bare_parse
from attention_guided_rl.data.multistream import Multistream
from attention_guided_rl.errors import CorpusError

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo>
<base>https://nl.wikipedia.org/wiki/Hoofdpagina</base>
<namespaces><namespace key="0" /><namespace key="1">Overleg</namespace></namespaces></siteinfo>
"""


def page(title: str, text: str, *, ns: int = 0) -> str:
    revision = f"<revision><id>8</id><text>{text}</text></revision>"
    return f"<page><title>{title}</title><ns>{ns}</ns><id>7</id>{revision}</page>\n"


STREAMS = (
    (page("T0", "Nul."), page("R0", "#REDIRECT [[salt &amp; &quot;pepper&quot;#Taste]]")),
    (page("Mill: a story", "Molen."),),
    (page("Overleg:T0", "Praat.", ns=1), page("Salt &amp; \"pepper\"", "Zout."), page("T3", "Drie.")),
    (page("T4", "Vier."), page("R4", "#REDIRECT [[R0]]")),
)  # fmt: skip
PLACES = ["T0", None, "Mill: a story", None, 'Salt & "pepper"', "T3", "T4", None]
INDEX = ("T0", "R0"), ("Mill: a story",), ("Overleg:T0", "Salt &amp; &quot;pepper&quot;", "T3"), ("T4", "R4")


@dataclass(frozen=True)
class Wiki:
    """A dump of the four streams with its index, and the first byte of each stream."""

    dump: Path
    index: Path
    offsets: list[int]

    def config(self, **fields) -> CorpusConfig:
        given = {"path": self.dump, "index": self.index, "shuffle": False}
        return CorpusConfig(kind="dump", **{**given, **fields})

    def titles(self, start: int = 0, *, epoch: int = 0, **fields) -> list[str | None]:
        corpus = DumpCorpus(self.config(**fields))
        return [article and article.title for article in corpus.articles(epoch, start)]

    def rewrite(self, *lines: str) -> None:
        self.index.write_text("".join(f"{line}\n" for line in lines))

    def damage(self, stream: int) -> None:
        """Overwrite a stream with zeros."""
        content = bytearray(self.dump.read_bytes())
        content[self.offsets[stream] : self.offsets[stream + 1]] = bytes(
            self.offsets[stream + 1] - self.offsets[stream]
        )
        self.dump.write_bytes(content)


def make_wiki(folder: Path, *, suffix: str = ".txt", end_is_own_stream: bool = True) -> Wiki:
    streams = ["".join(pages) for pages in STREAMS]
    if end_is_own_stream:
        streams.append("</mediawiki>")
    else:
        streams[-1] += "</mediawiki>"
    content, offsets = bz2.compress(HEAD.encode()), []
    for stream in streams:
        offsets.append(len(content))
        content += bz2.compress(stream.encode())
    wiki = Wiki(folder / "nlwiki.xml.bz2", folder / f"nlwiki-index{suffix}", offsets)
    wiki.dump.write_bytes(content)
    lines = "".join(f"{offset}:7:{name}\n" for offset, names in zip(offsets, INDEX, strict=False) for name in names)
    wiki.index.write_bytes(bz2.compress(lines.encode()) if suffix.endswith(".bz2") else lines.encode())
    return wiki


@pytest.fixture
def wiki(tmp_path):
    return make_wiki(tmp_path)


@pytest.mark.parametrize("end_is_own_stream", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".txt.bz2"])
def test_reading_from_a_place_on_is_the_end_of_a_whole_pass(tmp_path, suffix, end_is_own_stream):
    wiki = make_wiki(tmp_path, suffix=suffix, end_is_own_stream=end_is_own_stream)
    assert wiki.titles(index=None) == PLACES
    for start in range(10):
        assert wiki.titles(start) == PLACES[start:]
        assert wiki.titles(start, index=None, shuffle=True) == PLACES[start:]


def test_articles_are_the_same_with_and_without_an_index(wiki):
    assert list(DumpCorpus(wiki.config()).articles(0, 0)) == list(DumpCorpus(wiki.config(index=None)).articles(0, 0))


def test_shuffling_visits_whole_streams_in_one_order_for_each_seed(wiki):
    streams = [PLACES[0:2], PLACES[2:3], PLACES[3:6], PLACES[6:8]]
    orders = set()
    for seed in range(6):
        whole = wiki.titles(shuffle=True, seed=seed)
        assert wiki.titles(shuffle=True, seed=seed, epoch=5) == whole
        for start in range(10):
            assert wiki.titles(start, shuffle=True, seed=seed) == whole[start:]
        order = sorted(range(4), key=lambda i: whole.index(streams[i][-1] or streams[i][0]))
        assert whole == [title for i in order for title in streams[i]]
        orders.add(tuple(order))

    assert len(orders) > 1


def test_nothing_before_the_place_is_read(wiki):
    for stream in range(3):
        wiki.damage(stream)

    assert wiki.titles(6) == ["T4", None]
    assert wiki.titles(title="T4") == ["T4"]
    with pytest.raises(CorpusError, match=f"no bz2 stream begins at byte {wiki.offsets[2]} of nlwiki"):
        wiki.titles(5)


def test_bytes_of_xml_are_those_of_the_streams_read(wiki):
    size = [len("".join(pages).encode()) for pages in STREAMS]
    for fields, start, expected in (
        ({}, 0, sum(size)),
        ({}, 5, size[2] + size[3]),
        ({"title": "T4"}, 0, size[3]),
        ({"title": "R4"}, 0, size[3] + size[0] + size[2]),  # R4 → R0 → Salt & "pepper"
    ):
        corpus = DumpCorpus(wiki.config(**fields))
        list(corpus.articles(0, start))
        assert corpus.bytes_read == expected


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("Mill: a story", "Mill: a story"),
        ("mill:_a__story#End", "Mill: a story"),
        ('Salt & "pepper"', 'Salt & "pepper"'),
        ("R0", 'Salt & "pepper"'),
        ("R4", 'Salt & "pepper"'),
        ("T3", "T3"),
    ],
)
def test_title_is_found_through_the_index_and_redirects(wiki, title, found):
    assert wiki.titles(title=title) == [found]
    assert wiki.titles(1, title=title) == []


@pytest.mark.parametrize("title", ["A'b", "A&b", "ÉÉ (1)", "$^.*"])
def test_title_with_signs_is_found(wiki, title):
    written = title.replace("&", "&amp;").replace("'", "&#039;")
    for form in (title, written):
        wiki.rewrite("40:1:Aa", f"50:1:{form}", f"60:1:{form}:b")
        assert Multistream(wiki.dump, wiki.index, None).find(title) == 50


def test_title_in_lower_case_is_found(wiki):
    wiki.rewrite("40:1:a", "50:1:molen", "60:1:MOLEN")
    assert Multistream(wiki.dump, wiki.index, None).find("Molen") == 50


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("Mill: a stori", "no page 'Mill: a stori'; nearest: 'Mill: a story'"),
        ("story", "no page 'Story'; none is near it"),
        ("Overleg:T0", "no page 'Overleg:T0'; none is near it"),
        ("#", "no page ''; none is near it"),
        ("a\udc80", "none is near it"),
    ],
)
def test_title_that_is_not_there_is_refused_with_suggestions(wiki, title, message):
    with pytest.raises(CorpusError) as caught:
        wiki.titles(title=title)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def no_index(wiki: Wiki) -> str:
    wiki.index.unlink()
    return "no such file; set corpus.index to the index of nlwiki.xml.bz2, or leave it out"


def empty_index(wiki: Wiki) -> str:
    wiki.rewrite()
    return f"{wiki.index}: empty"


def line_without_title(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[0]}:7:T0", f"{wiki.offsets[0]}:7", f"{wiki.offsets[1]}:7:T1")
    return f"{wiki.index}:2: '{wiki.offsets[0]}:7' is no `offset:page id:title`"


def line_without_offset(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[0]}:7:T0", "T1")
    return f"{wiki.index}:2: 'T1' is no `offset:page id:title`"


def line_of_the_head(wiki: Wiki) -> str:
    wiki.rewrite("0:7:T0")
    return f"{wiki.index}:1: '0:7:T0' is no `offset:page id:title`"


def endless_line(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[0]}:7:T0", "7" * 10_000)
    return f"{wiki.index}:2: '{'7' * 50}' is no"


def not_in_order(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[1]}:7:T1", f"{wiki.offsets[0]}:7:T0")
    return f"{wiki.index}:2: offset {wiki.offsets[0]} after {wiki.offsets[1]}"


def behind_the_end(wiki: Wiki) -> str:
    size = wiki.dump.stat().st_size
    wiki.rewrite(f"{size}:7:T0")
    return f"{wiki.index}: byte {size} is behind the end of nlwiki.xml.bz2; set corpus.index to the index of this very"


def within_a_stream(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[0] + 1}:7:T0")
    return f"{wiki.index}: no bz2 stream begins at byte {wiki.offsets[0] + 1} of nlwiki.xml.bz2; set corpus.index"


def a_page_too_few(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[2]}:7:T3", f"{wiki.offsets[2]}:7:T4")
    return f"{wiki.index}: 2 pages at byte {wiki.offsets[2]}, where nlwiki.xml.bz2 has 3; set corpus.index"


def a_page_too_many(wiki: Wiki) -> str:
    wiki.rewrite(f"{wiki.offsets[1]}:7:T1", f"{wiki.offsets[1]}:7:T2")
    return f"{wiki.index}: 2 pages at byte {wiki.offsets[1]}, where nlwiki.xml.bz2 has 1; set corpus.index"


def truncated_index(wiki: Wiki) -> str:
    packed = wiki.index.with_suffix(".bz2")
    packed.write_bytes(bz2.compress(wiki.index.read_bytes())[:-10])
    packed.rename(wiki.index.with_suffix(".txt.bz2"))
    return f"{wiki.index}.bz2: Compressed file ended before the end-of-stream marker"


def damaged_stream(wiki: Wiki) -> str:
    content = bytearray(wiki.dump.read_bytes())
    content[wiki.offsets[1] + 30] ^= 255
    wiki.dump.write_bytes(content)
    return f"{wiki.dump}: Invalid data stream (before the first page of the bz2 stream at byte {wiki.offsets[1]})"


def truncated_dump(wiki: Wiki) -> str:
    wiki.dump.write_bytes(wiki.dump.read_bytes()[: wiki.offsets[4] - 9])
    return (
        f"the file ends within a bz2 stream (after 2 pages of the bz2 stream at byte {wiki.offsets[3]}, the last 'R4'"
    )


def damaged_head(wiki: Wiki) -> str:
    wiki.dump.write_bytes(b"nothing" + wiki.dump.read_bytes()[7:])
    return f"{wiki.dump}: Invalid data stream (before the first page"


def document_type(wiki: Wiki) -> str:
    head = bz2.compress(b'<!DOCTYPE mediawiki [<!ENTITY a "b">]>' + HEAD.encode())
    wiki.dump.write_bytes(head + wiki.dump.read_bytes()[wiki.offsets[0] :])
    wiki.rewrite(f"{len(head)}:7:T0")
    return f"{wiki.dump}: it declares a document type"


def plain_dump(wiki: Wiki) -> str:
    wiki.dump.rename(wiki.dump.with_suffix(".xml"))
    return "nlwiki.xml.xml: corpus.index is for multistream dumps in bz2 alone"


ERRORS = (
    *(no_index, empty_index, line_without_title, line_without_offset, line_of_the_head, endless_line, not_in_order),
    *(behind_the_end, within_a_stream, a_page_too_few, a_page_too_many, truncated_index),
    *(damaged_stream, truncated_dump, damaged_head, document_type, plain_dump),
)


@pytest.mark.parametrize("block", [2**20, 64])
@pytest.mark.parametrize("make", ERRORS)
def test_unusable_index_or_dump_is_refused_in_one_line_that_names_it(wiki, monkeypatch, make, block):
    monkeypatch.setattr(multistream, "_BLOCK", block)
    message = make(wiki)
    dump = wiki.dump if wiki.dump.exists() else wiki.dump.with_suffix(".xml")
    index = wiki.index if make is not truncated_index else wiki.index.with_suffix(".txt.bz2")
    with pytest.raises(CorpusError) as caught:
        wiki.titles(path=dump, index=index)

    assert caught.value.exit_code == 3
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_title_in_the_index_of_another_dump_is_refused(wiki):
    wiki.rewrite(f"{wiki.offsets[1]}:7:T4")
    with pytest.raises(CorpusError, match=r"nlwiki-index\.txt: 'T4' is not where it should be in nlwiki\.xml\.bz2"):
        wiki.titles(title="T4")


def test_index_is_the_same_however_it_is_cut_into_blocks(wiki, monkeypatch):
    wiki.index.write_bytes(wiki.index.read_bytes().rstrip())
    for block in (1, 7, 50):
        monkeypatch.setattr(multistream, "_BLOCK", block)
        assert wiki.titles() == PLACES
        assert wiki.titles(title="T3") == ["T3"]


@contextlib.contextmanager
def peak_memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_index_takes_memory_for_streams_not_for_pages(wiki):
    with wiki.dump.open("ab") as file:
        file.truncate(10**9)
    wiki.rewrite(*(f"{1000 + i // 100 * 1000}:{i}:A title of the length that is usual {i}" for i in range(200_000)))
    with peak_memory_below(5_000_000):  # bytes; the index has 10 million
        skip, streams = Multistream(wiki.dump, wiki.index, 1).streams_from(123_456)

    assert skip == 56
    assert len(list(streams)) == 2000 - 1234


def test_endless_line_of_an_index_takes_no_memory(wiki):
    wiki.rewrite("7" * 20_000_000)
    with peak_memory_below(5_000_000), pytest.raises(CorpusError, match=r"nlwiki-index\.txt:1: '7{50}' is no"):
        wiki.titles()


def test_reading_takes_memory_for_a_page_not_for_the_dump(tmp_path):
    path = tmp_path / "nlwiki.xml"
    large = page("R", "#REDIRECT [[T0]] " + "mill " * 60_000)
    path.write_text(HEAD + page("T0", "Nul.") + large * 60 + "</mediawiki>")
    with peak_memory_below(6_000_000):  # bytes; the dump has 18 million
        assert sum(1 for _ in DumpCorpus(CorpusConfig(kind="dump", path=path)).articles(0, 0)) == 61


def test_bare_parse_takes_no_memory_for_pages(tmp_path):
    path = tmp_path / "nlwiki.xml"
    path.write_text(HEAD + "<page/>\n" * 20_000 + "</mediawiki>")
    with peak_memory_below(500_000):  # bytes; an element takes about a hundred
        num_bytes, _ = bare_parse(path)
    assert num_bytes == path.stat().st_size
