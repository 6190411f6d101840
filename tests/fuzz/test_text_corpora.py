"""Files of strangers as corpora: text, Markdown, JSONL, dumps of a wiki with and without an index."""

import bz2
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from fuzzing import agrl, as_json_lines, bounded, damaged, documented, fuzz, mutated, only_in
from hypothesis import strategies as st

from attention_guided_rl.config import CorpusConfig, PairsConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.data.hygiene import CleanCorpus
from attention_guided_rl.data.pairs import cut_article
from attention_guided_rl.errors import CorpusError

pytestmark = pytest.mark.timeout(600)  # of the wall, which other work may hold up; each input has its own bound
CUTS = [PairsConfig(cut="tokens", key_tokens=3, value_tokens=4), PairsConfig(cut="sentences")]


def read(open_corpus: Callable[[CorpusConfig], Corpus], config: CorpusConfig) -> int:
    """Read a corpus and cut its articles, as training would; return the number of articles, −1 where it is refused."""
    count = 0
    try:
        for article in CleanCorpus(open_corpus(config), config).articles(0, 0):
            if article is None:
                continue
            count += 1
            for text in (article.id, article.title, article.text, article.url, article.licence, article.revision):
                assert "\0" not in text
                text.encode()
            for cut in CUTS:
                cut_article(article, lambda text: list(text.encode()), cut)
    except CorpusError as error:
        documented(error)
        return -1
    return count


# -- text, Markdown, JSONL ---------------------------------------------------------------------------------------------

LINES = [
    {"title": "Oak", "text": "A tree. It grows slowly.", "url": "https://example.org/oak", "licence": "CC0", "id": 7},
    {"key": "Who mills?", "value": "Ada.", "article": "Mill", "subject": 0},
    {"key": "Who bakes?", "value": "Ben.", "title": "Mill", "subject": None, "revision": 3, "source": "a book"},
    *({"title": f"T{i}", "text": f"Text number {i} says that the mill turns. Then it stops."} for i in range(9)),
]
PROSE = (
    b"---\nby: nobody\n---\n# The *Mill* #\n\nIt [stands](there) **by** the `river`.\n<!-- x -->\n> - one\n\n| a |\n"
)
MARKUP = (
    *(b"](" * 300, b"[" * 300, b"![](" * 100, b"<a " * 300, b"***" * 100, b"> " * 300, b"`" * 300, b"# " * 100),
    *(
        b"<!--" * 100,
        b"---\n" * 100,
        b"a.b." * 300,
        b"x" * 5000,
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b"\r",
        b"\\ud800",
        b"\\u0000",
    ),
    *(b"Mr. " * 300, b"'''" * 100, b"\xf0\x9f\x90\x9c" * 100, b"1." * 300, b"e\xcc\x81" * 200, b". " * 300),
)
JSONL = as_json_lines(LINES)


@st.composite
def text_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a name and its contents."""
    name = draw(
        st.sampled_from(("a.jsonl", "a.jsonl", "a.txt", "a.md", "a.jsonl.gz", "a.md.gz", "a\udcff.txt", "-.md"))
    )
    if "jsonl" in name and draw(st.booleans()):
        data = as_json_lines(draw(mutated([LINES[:3], LINES])))
    else:
        data = draw(damaged([JSONL if "jsonl" in name else PROSE], MARKUP))
    if name.endswith(".gz"):
        data = gzip.compress(data, 1, mtime=0)
        data = draw(damaged([data])) if draw(st.booleans()) else data
    return name, data


TEXTS = [
    *(("a.jsonl", b"\n".join([b"x"] * 3 + [JSONL])), ("a.jsonl", b"\0" * 10**6), ("a.jsonl", b"{" * 10**6)),
    *(("a.txt", b"\xff\xfe" + "text".encode("utf-16")), ("a.txt", b"word. " * 10**4), ("a.md", b"*" * 10**6)),
    *(
        ("a.txt", b"a" * 10**5),
        ("a.txt", b"." * 10**5),
        ("a.txt", b"A. " * 10_000),
        ("a.txt", "\u0301".encode() * 10**5),
    ),
]


def test_text_files_are_read_or_refused_in_one_line(tmp_path):
    def check(file: tuple[str, bytes]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        read(FilesCorpus, CorpusConfig(kind="files", path=path))
        assert os.listdir(tmp_path) == [file[0]]
        path.unlink()

    fuzz("text files", text_files(), check, tmp_path, TEXTS)


def survey(kind: str, path: Path) -> int:
    return agrl("corpus", "--corpus.kind", kind, "--corpus.path", path, "--evaluation.articles", "0")[0]


def test_a_damaged_corpus_ends_the_command_in_one_line(tmp_path):
    name_that_no_configuration_holds = ("a\udcff.txt", b"a b c d e f g")
    for (name, data), code in [(TEXTS[0], 3), (name_that_no_configuration_holds, 2), (("a.xml", b"<a>"), 3)]:
        (tmp_path / name).write_bytes(data)
        kind = "dump" if name.endswith("xml") else "files"
        assert survey(kind, tmp_path / name) == code
        (tmp_path / name).unlink()


def test_a_folder_with_links_pipes_and_odd_names_is_read_where_it_can_be(tmp_path):
    folder = tmp_path / "corpus"
    deep = folder.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    for path in (deep / "deep.txt", folder / ("n" * 250 + ".txt"), folder / "\udcff \x1b[31m\n.txt", folder / "..txt"):
        path.write_text(f"The mill of {len(path.name)} turns in the wind.")
    (folder / "up").symlink_to(tmp_path)  # a folder that holds itself
    (folder / "circle.txt").symlink_to("circle.txt")
    (folder / "nowhere.txt").symlink_to("nowhere else")
    os.mkfifo(folder / "pipe.txt")
    with bounded(), only_in(folder):
        assert read(FilesCorpus, CorpusConfig(kind="files", path=folder, drop_near_duplicates=False)) == 4
    assert survey("files", folder) == 3  # of too little text


# -- dumps -------------------------------------------------------------------------------------------------------------

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="nl"><siteinfo>
<base>https://nl.wikipedia.org/wiki/Hoofdpagina</base><namespaces><namespace key="0" /><namespace key="6">Bestand
</namespace></namespaces></siteinfo>
"""
ENDING = b"</mediawiki>"
WIKITEXT = (
    *(
        "{{",
        "}}",
        "[[",
        "]]",
        "{|",
        "|}",
        "|",
        "\n",
        "''",
        "'''",
        "==",
        "<ref>",
        "</ref>",
        "<nowiki>",
        "</nowiki>",
        "<!--",
    ),
    *(
        "-->",
        "&#55296;",
        "&#xD800;",
        "&#0;",
        "&#x110000;",
        "&#99999999999999999999;",
        "&nbsp;",
        "&x;",
        "[http://a b]",
        "<a",
    ),
    *(
        "#REDIRECT [[Molen]]",
        "{{convert|5|km}}",
        "{{lang|nl|x}}",
        "{{{x|y}}}",
        "[[Bestand:x|y]]",
        "Een molen. ",
        "maalt ",
        ":",
        "*",
    ),
    *("{{" * 200, "[[" * 200, "&amp;" * 50, "<b" * 200, "__TOC__", "\u2028", "<math>", "{{dp|", "é", "🐜", "http://x"),
)
XML = (
    *(
        b"<!DOCTYPE a [<!ENTITY b 'bb'>]>",
        b"&b;",
        b"&#xD800;",
        b"&#0;",
        b"&#55296;",
        b"<![CDATA[",
        b"]]>",
        b"<?x y?>",
        b"<!--",
    ),
    *(
        b"<page>",
        b"</page>",
        b"<a>" * 2000,
        b"</a>" * 9,
        b"<title>",
        b"</title>",
        b"<ns>x</ns>",
        b"<ns>99999999999999</ns>",
    ),
    *(b"<redirect/>", b'<redirect title=""/>', b"<revision>", b"<id/>", b"</text>", b"<mediawiki>", b"</mediawiki>"),
    *(
        b'<?xml version="1.0" encoding="x-unknown"?>',
        b'<?xml version="1.0" encoding="utf-16"?>',
        b' a="' * 50,
        b"xmlns:b='c' ",
    ),
)


def page(title: str, text: str, number: int = 1) -> str:
    revision = f"<revision><id>{number}</id><model>wikitext</model><text>{escape(text)}</text></revision>"
    return f"<page><title>{escape(title)}</title><ns>0</ns><id>{number}</id>{revision}</page>\n"


PAGES = [
    page(f"Molen {i}", "'''Een''' [[molen|Molen]] maalt {{nowrap|veel}} graan.<ref>x</ref> " * 3, i) for i in range(4)
]
DUMP = (HEAD + "".join(PAGES)).encode() + ENDING


@st.composite
def dumps(draw: st.DrawFn) -> tuple[str, bytes]:
    how = draw(st.sampled_from(("wikitext", "xml", "xml", "bz2")))
    if how == "wikitext":
        text = "".join(draw(st.lists(st.sampled_from(WIKITEXT), min_size=3, max_size=60)))
        return "wiki.xml", (HEAD + page("Molen", text)).encode() + ENDING
    if how == "xml":
        return "wiki.xml", draw(damaged([DUMP], XML))
    return "wiki.xml.bz2", draw(damaged([bz2.compress(DUMP, 1), bz2.compress(DUMP[:300]) + bz2.compress(DUMP[300:])]))


DUMPS = [
    *(("wiki.xml", (HEAD + page("Molen", text * 5)).encode() + ENDING) for text in WIKITEXT),
    *(("wiki.xml", HEAD.encode() + piece) for piece in XML),
    *(("wiki.xml", b"<!--" + b" " * 2**20), ("wiki.xml", b" " * 2**20), ("wiki.xml", HEAD.encode() + b"<a>" * 2**18)),
    *(("wiki.xml", HEAD.encode() + b"<a/>" * 2**18), ("wiki.xml", HEAD.encode() + b'<a b="' + b"c" * 2**23)),
    ("wiki.xml.bz2", bz2.compress(HEAD.encode() + b"<page><title>" + b"a" * 2**26)),
    ("wiki.xml", DUMP.decode().encode("utf-16")),
]


@pytest.mark.parametrize("title", [None, "Molen 2"])
def test_dumps_are_read_or_refused_in_one_line(tmp_path, title):
    def check(file: tuple[str, bytes]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        read(DumpCorpus, CorpusConfig(kind="dump", path=path, title=title))
        path.unlink()

    fuzz(
        "dumps" if title is None else "dumps by title", dumps(), check, tmp_path, DUMPS if title is None else DUMPS[::3]
    )


STREAMS = [bz2.compress(part.encode()) for part in (HEAD, "".join(PAGES[:2]), "".join(PAGES[2:]))] + [
    bz2.compress(ENDING)
]
OFFSETS = [len(STREAMS[0]), len(STREAMS[0]) + len(STREAMS[1])]
INDEX = "".join(f"{OFFSETS[i // 2]}:{i}:Molen {i}\n" for i in range(4)).encode()
OFFS = [
    b"0:",
    b"-1:",
    b"1:",
    b"9" * 18 + b":",
    b"9" * 30 + b":",
    b"::",
    b"1:2:3\n" * 300,
    b"\r\n",
    *(b"%d:5:x\n" % o for o in OFFSETS),
]


@st.composite
def multistreams(draw: st.DrawFn) -> tuple[bytes, bytes, bool, str | None]:
    """Draw a dump, its index, whether it is shuffled, and a title."""
    dump, index = b"".join(STREAMS), INDEX
    if draw(st.booleans()):
        index = draw(damaged([INDEX], OFFS))
    else:
        dump = draw(damaged([dump, b"".join(STREAMS[i] for i in (0, 2, 1, 3))]))
    if draw(st.booleans()):
        index = bz2.compress(index) if draw(st.booleans()) else draw(damaged([bz2.compress(index)]))
    return dump, index, draw(st.booleans()), draw(st.sampled_from((None, None, "Molen 3", "Zaag", "#", "\ud800")))


def test_multistream_dumps_are_read_or_refused_in_one_line(tmp_path):
    def check(given: tuple[bytes, bytes, bool, str | None]) -> None:
        dump, index, shuffle, title = given
        paths = tmp_path / "wiki.xml.bz2", tmp_path / ("i.txt.bz2" if index.startswith(b"BZh") else "i.txt")
        for path, data in zip(paths, (dump, index), strict=True):
            path.write_bytes(data)
        read(DumpCorpus, CorpusConfig(kind="dump", path=paths[0], index=paths[1], shuffle=shuffle, title=title))

    whole = b"".join(STREAMS)
    found = [(whole, b"x" * 2**21, False, None), (whole, INDEX * 5000, True, None), (whole, b"", True, "Molen 1")]
    fuzz("multistream", multistreams(), check, tmp_path, found)
