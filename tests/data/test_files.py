"""FilesCorpus: what it reads from text, Markdown and JSONL, in which order, and how it refuses the rest."""

import gzip
import json
import logging
import zipfile
from pathlib import Path

import pytest

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data import text_files
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.errors import CorpusError
from attention_guided_rl.records import Article, PairText


def read(path: Path, *, epoch: int = 0, start: int = 0, title: str | None = None, shuffle: bool = False, seed: int = 1):
    config = CorpusConfig(kind="files", path=path, title=title, shuffle=shuffle, seed=seed)
    return list(FilesCorpus(config).articles(epoch, start))


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_text_file_is_one_article(tmp_path):
    path = write(tmp_path / "Tides.txt", "The sea rises twice a day.\r\nIt falls again.")

    assert read(path) == [
        Article(
            id="files:0fed5ac52e42437b",  # printf 'Tides.txt\0Tides' | sha256sum
            title="Tides",
            text="The sea rises twice a day.\nIt falls again.",
            source="files:Tides.txt",
            revision="84e6f1594158",  # printf 'The sea rises twice a day.\nIt falls again.' | sha256sum
            url="",
            licence="",
        )
    ]


def test_text_keeps_what_only_looks_like_markup(tmp_path):
    assert read(write(tmp_path / "a.txt", "# 2 * 3 is _six_"))[0].text == "# 2 * 3 is _six_"


def test_nul_and_lone_surrogates_go(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"title": "A\u0000nt", "text": "An a\ud800nt \ud83d\udc1c walks.\u0000"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfA b\x00ee flies.\x00")

    assert [(a.title, a.text) for a in read(path)] == [("Ant", "An ant \U0001f41c walks.")]
    assert read(tmp_path / "b.txt")[0].text == "A bee flies."


MARKDOWN = """---
author: nobody
---
Before the title.

# The *Old* Mill #

It stands by the [river](https://example.org/a_(b) "title"), **far** from _any_ town.
![a picture](mill.png)
<!-- to do:
more -->
## Its wheel

> The wheel has 2 * 3 * 4 = 24 blades of `oak_wood`, \\*not\\* elm<sup>2</sup>.

- first [note][1]
* [x] second note
1. third note
***

```python
# kept_as_it_is *here*
```

| a | b |
|---|---|
See <https://example.org>.

[1]: https://example.org/note
"""

PROSE = """Before the title.

The Old Mill

It stands by the river, far from any town.


Its wheel

The wheel has 2 * 3 * 4 = 24 blades of oak_wood, *not* elm2.

first note
second note
1. third note

# kept_as_it_is *here*

| a | b |
See https://example.org."""


def test_markdown_becomes_prose_with_its_heading_as_title(tmp_path):
    article = read(write(tmp_path / "mill.md", MARKDOWN))[0]

    assert article.title == "The Old Mill"
    assert article.text == PROSE.replace("\n\n\n", "\n\n")


def test_markdown_without_heading_is_titled_by_its_name(tmp_path):
    path = write(tmp_path / "Wells.md", "## Depth\n```\n# no heading in code\n```\nDeep.")

    assert [(a.title, a.text) for a in read(path)] == [("Wells", "Depth\n# no heading in code\nDeep.")]


def test_jsonl_articles_keep_the_fields_they_give(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"title": "Oak", "text": "A tree.", "url": "https://example.org/oak", "licence": "CC0", "revision": 7},
        {"title": "Elm", "text": "Another tree.", "source": "a book", "url": None, "id": "elm-1"},
    )
    oak, elm = read(path)

    assert (oak.url, oak.licence, oak.revision, oak.source) == ("https://example.org/oak", "CC0", "7", "files:a.jsonl")
    assert (elm.id, elm.source, elm.url, elm.pairs) == ("elm-1", "a book", "", None)


def test_consecutive_pairs_of_a_title_are_one_article(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"key": "Who mills?", "value": "Ada.", "article": "Mill", "subject": 0, "licence": "CC0"},
        {"key": "Who bakes?", "value": "Ben.", "title": "Mill"},
        "",
        {"key": "Who sails?", "value": "Cleo.", "title": "Ship", "subject": 2},
        {"title": "Ship", "text": "A vessel."},
        {"key": "Who mills now?", "value": "Dora.", "title": "Mill"},
    )
    articles = read(path)

    assert [a.title for a in articles] == ["Mill", "Ship", "Ship", "Mill"]
    assert articles[0].pairs == (PairText("Who mills?", "Ada.", 0), PairText("Who bakes?", "Ben.", None))
    assert articles[0].text == "Who mills? Ada.\nWho bakes? Ben."
    assert articles[0].licence == "CC0"
    assert articles[1].pairs == (PairText("Who sails?", "Cleo.", 2),)
    assert articles[2].pairs is None
    assert len({a.id for a in articles}) == 4


def test_pairs_without_title_are_one_article_named_after_the_file(tmp_path):
    path = write(tmp_path / "quiz.jsonl", {"key": "One?", "value": "Yes."}, {"key": "Two?", "value": "No."})

    assert [(a.title, a.text) for a in read(path)] == [("quiz", "One? Yes.\nTwo? No.")]


def test_folder_is_read_by_relative_path_and_namesakes_stay_apart(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "Fog.txt", "Fog in the valley.")
    write(tmp_path / "c.MD", "# Fog\nFog at sea.")
    write(tmp_path / "a.jsonl", {"title": "Rain", "text": "Rain on the hill."})
    write(tmp_path / "skipped.csv", "1,2")
    articles = read(tmp_path)

    assert [a.source for a in articles] == ["files:a.jsonl", "files:b/Fog.txt", "files:c.MD"]
    assert [a.title for a in articles] == ["Rain", "Fog", "Fog"]
    assert articles[1].id != articles[2].id
    assert read(tmp_path, title="Fog") == articles[1:]


def test_ids_do_not_depend_on_where_the_folder_lies_nor_on_its_other_files(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "Fog.txt", "Fog in the valley.")
    write(tmp_path / "there" / "Dew.txt", "Dew in the grass.")

    assert read(tmp_path / "here")[0] == read(tmp_path / "there")[1]


@pytest.mark.parametrize("name", ["Mill.txt", "Mill.md", "a.jsonl"])
def test_packed_file_is_read_like_the_plain_one(tmp_path, name):
    plain = write(tmp_path / name, {"title": "Mill", "text": "It grinds *corn*."})
    packed = tmp_path / "packed" / f"{name}.gz"
    packed.parent.mkdir()
    half = len(plain.read_bytes()) // 2
    packed.write_bytes(gzip.compress(plain.read_bytes()[:half]) + gzip.compress(plain.read_bytes()[half:]))

    (article,) = read(packed.parent)
    assert (article.title, article.text) == ("Mill", read(plain)[0].text)
    assert article.source == f"files:{name}.gz"
    assert read(packed) == [article]


def test_what_a_folder_has_besides_is_counted_once(tmp_path, caplog):
    for name in ("a.csv", "b.CSV", "notes/c.pdf", "d.csv.gz", "README", ".git/config", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "1,2")
    write(tmp_path / "e.txt", "Something.")
    with caplog.at_level(logging.WARNING):
        assert [a.title for a in read(tmp_path) + read(tmp_path)] == ["e", "e"]

    kinds = "2 .csv, 1 no suffix, 1 .gz, 1 .pdf"  # the most first, then by name in the folder
    assert caplog.messages == [f"{tmp_path}: passed over 5 files that are not .txt, .md, .jsonl: {kinds}"]


@pytest.fixture
def ten(tmp_path):
    return write(tmp_path / "ten.jsonl", *({"title": f"T{i}", "text": f"Text {i}."} for i in range(10)))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("start", [0, 1, 7, 10, 11])
def test_start_is_a_slice_of_the_pass(ten, shuffle, start):
    assert read(ten, epoch=3, start=start, shuffle=shuffle) == read(ten, epoch=3, shuffle=shuffle)[start:]


def test_shuffle_permutes_anew_in_every_epoch_and_for_every_seed(ten):
    ordered = read(ten)
    orders = [read(ten, shuffle=True, epoch=e, seed=s) for e, s in ((0, 1), (1, 1), (0, 2))]

    assert [a.title for a in ordered] == [f"T{i}" for i in range(10)]
    assert all(sorted(a.title for a in order) == [f"T{i}" for i in range(10)] for order in orders)
    assert len({tuple(a.title for a in order) for order in [ordered, *orders]}) == 4
    assert read(ten, shuffle=True, epoch=1) == orders[1]


BAD_LINES = {
    "not JSON": "{not json",
    "list": "[1, 2]",
    "nested": "[" * 100_000,
    "number": "1" * 5000,
    "no title": '{"text": "a"}',
    "empty text": '{"title": "a", "text": " \\u0000"}',
    "text is a number": '{"title": "a", "text": 1}',
    "title is true": '{"title": true, "text": "a"}',
    "key alone": '{"key": "a"}',
    "empty value": '{"key": "a", "value": ""}',
    "subject is text": '{"key": "a", "value": "b", "subject": "c"}',
    "subject is true": '{"key": "a", "value": "b", "subject": true}',
    "subject is negative": '{"key": "a", "value": "b", "subject": -1}',
    "subject is huge": '{"key": "a", "value": "b", "subject": 99999999999999999999}',
    "url is a list": '{"title": "a", "text": "b", "url": []}',
}
GOOD_LINES = ['{"title": "Good", "text": "Good text."}'] * 9


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_skipped_and_counted(tmp_path, caplog, line):
    path = write(tmp_path / "a.jsonl", "", *GOOD_LINES[:4], line, *GOOD_LINES[4:])  # 1 of 10: not more than 10 %
    with caplog.at_level(logging.WARNING):
        assert len(read(path)) == 9

    (message,) = caplog.messages
    assert f"{path}:6: " in message
    assert "1 of 10 lines" in message
    assert "\n" not in message


def test_more_than_a_tenth_of_bad_lines_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *GOOD_LINES, "nonsense", "[]")

    with pytest.raises(CorpusError, match=r"a\.jsonl:10: not JSON .*; 2 of 11 lines are unusable"):
        read(path)


def test_pairs_around_a_bad_line_stay_one_article(tmp_path):
    pair = '{"key": "a", "value": "b"}'

    assert [len(a.pairs or ()) for a in read(write(tmp_path / "a.jsonl", *[pair] * 5, "nonsense", *[pair] * 5))] == [10]


def missing(folder: Path) -> Path:
    return folder / "nowhere"


def no_file_of_use(folder: Path) -> Path:
    write(folder / "a.csv", "1,2")
    return folder


def empty(folder: Path) -> Path:
    return write(folder / "a.txt", " \n\n")


def empty_lines(folder: Path) -> Path:
    return write(folder / "a.jsonl", "", " ", "")


def only_markup(folder: Path) -> Path:
    return write(folder / "a.md", "---\n\n![picture](a.png)")


def other_type(folder: Path) -> Path:
    return write(folder / "a.pdf", "text")


def not_utf8(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"caf\xe9 au lait")
    return folder


def zip_file(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.txt", "Something.")
    return folder / "a.zip"


def zip_among_others(folder: Path) -> Path:
    write(folder / "b.txt", "Something else.")
    return zip_file(folder).parent


def tar_gz(folder: Path) -> Path:
    return write(folder / "a.tar.gz", "text")


def dump_of_a_wiki(folder: Path) -> Path:
    return write(folder / "nlwiki.xml.bz2", "text")


def packed_file_of_another_type(folder: Path) -> Path:
    return write(folder / "a.csv.gz", "text")


def not_gzip(folder: Path) -> Path:
    return write(folder / "a.txt.gz", "text")


def truncated_gzip(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(GOOD_LINES).encode())[:-12])
    return folder / "a.jsonl.gz"


def damaged_gzip(folder: Path) -> Path:
    packed = gzip.compress("\n".join(GOOD_LINES).encode())
    (folder / "a.jsonl.gz").write_bytes(packed[:10] + b"damage" + packed[16:])
    return folder


def wrong_checksum(folder: Path) -> Path:
    packed = gzip.compress(b"Something.")
    (folder / "a.txt.gz").write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    return folder


def bomb(folder: Path) -> Path:
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a" * (2**20 + 1)))  # about 1 kB
    return folder


ERRORS = {
    missing: "no such file or folder",
    no_file_of_use: "no .txt, .md, .jsonl file",
    empty: "empty",
    empty_lines: "empty",
    only_markup: "empty",
    other_type: "'.pdf' files are not supported",
    not_utf8: "byte 3 is not valid UTF-8",
    zip_file: "archives are not read; unpack it",
    zip_among_others: "a.zip: archives are not read; unpack it",
    tar_gz: "archives are not read; unpack it",
    dump_of_a_wiki: "set corpus.kind: dump",
    packed_file_of_another_type: "'.gz' files are not supported",
    not_gzip: "a.txt.gz: damaged or cut off",
    truncated_gzip: "a.jsonl.gz: damaged or cut off",
    damaged_gzip: "a.jsonl.gz: damaged or cut off",
    wrong_checksum: "a.txt.gz: damaged or cut off",
    bomb: "a.txt.gz: unpacks to more than 1,048,576 bytes",
}


@pytest.mark.parametrize(("make", "message"), ERRORS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unusable_path_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(text_files, "MAX_UNPACKED", 2**20)
    path = make(tmp_path)
    with pytest.raises(CorpusError) as caught:
        read(path)

    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_file_among_others_is_skipped_with_a_warning(tmp_path, caplog):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "Something.")
    with caplog.at_level(logging.WARNING):
        assert [a.title for a in read(tmp_path)] == ["b"]

    assert caplog.messages == [f"{tmp_path / 'a.txt'}: skipped, the file is empty"]


def test_unknown_title_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"title": t, "text": "Text."} for t in ("Windmill", "Windmills", "Harbour")))
    with pytest.raises(CorpusError, match=r"no article 'Windmil'.*; nearest: 'Windmill', 'Windmills'"):
        read(path, title="Windmil")
    with pytest.raises(CorpusError, match=r"no article 'xyz'.*; the first is 'Windmill'"):
        read(path, title="xyz")


@pytest.mark.timeout(20)  # about half a second
def test_line_of_10_mb_is_an_article_and_takes_bounded_time(tmp_path):
    text = "The sea rises twice a day and falls again. " * 250_000
    path = write(tmp_path / "a.jsonl", *GOOD_LINES, {"title": "Sea", "text": text}, '{"title": "' + "[" * 10_000_000)

    assert [(a.title, len(a.text)) for a in read(path)][-1] == ("Sea", len(text) - 1)


def test_titles_are_no_names_of_files(tmp_path):
    hostile = ("../../etc/passwd", "/tmp/a", "CON", "a\u0000b\n# c", "a" * 5000, "\ud800 name")
    path = write(tmp_path / "a.jsonl", *({"title": title, "text": f"Text of {title}."} for title in hostile))
    articles = read(path)

    assert [a.title for a in articles] == ["../../etc/passwd", "/tmp/a", "CON", "ab # c", "a" * 5000, "name"]
    assert all(a.id.startswith("files:") and a.id[6:].isalnum() for a in articles)
    assert list(tmp_path.iterdir()) == [path]


def test_hostile_markup_takes_bounded_time(tmp_path):
    pieces = ("[a](", "![", "*a ", "_", "> ", "- ", "<a ", "`", "[a]:", "\\", "<!--", "| --- ", "#")
    for number, piece in enumerate(pieces):
        write(tmp_path / f"{number}.md", "word " + piece * 20_000)

    assert all(article.text.startswith("word") for article in read(tmp_path))


def test_what_is_about_the_folder_is_no_article(tmp_path, caplog):
    (tmp_path / "mills").mkdir()
    for name in ("README.md", "licence.txt", "One.txt", "mills/README.md"):
        (tmp_path / name).write_text(f"# {name}\nA mill turns.", encoding="utf-8")
    read = FilesCorpus(CorpusConfig(kind="files", path=tmp_path, drop_near_duplicates=False)).articles(0, 0)
    assert sorted(article.source for article in read) == ["files:One.txt", "files:mills/README.md"]
    assert "read 2 files, and passed over README.md, licence.txt" in caplog.text
    named = FilesCorpus(CorpusConfig(kind="files", path=tmp_path / "README.md")).articles(0, 0)
    assert [article.title for article in named] == ["README.md"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "README").with_suffix(".md").write_text("A mill.", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"no .* file in this folder besides README\.md"):
        FilesCorpus(CorpusConfig(kind="files", path=tmp_path / "only"))
