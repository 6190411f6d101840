"""What holds for every corpus of the package: several passes are read side by side, from one opened corpus."""

import bz2
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_mediawiki import FakeMediaWiki, Page

from attention_guided_rl.config import CorpusConfig, NetworkConfig
from attention_guided_rl.data import CORPORA, open_corpus
from attention_guided_rl.network import Network

TITLES = [f"Mill {number}" for number in range(7)]


def text_of(title: str) -> str:
    return f"{title} grinds corn of its own kind, as the {title} of another town did before it."


def dump(folder: Path) -> dict[str, object]:
    """A multistream dump of two streams with its index."""
    pages = [
        f"<page><title>{title}</title><ns>0</ns><id>{number}</id><revision><id>1</id><text>{text_of(title)}</text>"
        "</revision></page>"
        for number, title in enumerate(TITLES)
    ]
    content, lines = bz2.compress(b"<mediawiki>"), []
    for some in (range(4), range(4, 7)):
        lines += [f"{len(content)}:{number}:{TITLES[number]}\n" for number in some]
        content += bz2.compress("".join(pages[number] for number in some).encode())
    (folder / "wiki.xml.bz2").write_bytes(content + bz2.compress(b"</mediawiki>"))
    (folder / "index.txt").write_text("".join(lines))
    return {"kind": "dump", "path": folder / "wiki.xml.bz2"}


def files(folder: Path) -> dict[str, object]:
    rows = [json.dumps({"title": title, "text": text_of(title)}) for title in TITLES]
    (folder / "mills.jsonl").write_text("\n".join(rows))
    return {"kind": "files", "path": folder / "mills.jsonl"}


MAKERS = {
    "encyclopedia": lambda folder, wiki: {"kind": "encyclopedia"},
    "files": lambda folder, wiki: files(folder),
    "dump": lambda folder, wiki: dump(folder),
    "dump by its index": lambda folder, wiki: dump(folder) | {"index": folder / "index.txt"},
    "dump, one title": lambda folder, wiki: dump(folder) | {"title": TITLES[5]},
    "hub": lambda folder, wiki: {"kind": "hub", "name": str(files(folder)["path"].parent)},
    "wikipedia": lambda folder, wiki: {"kind": "wikipedia", "site": wiki.url, "titles": tuple(TITLES)},
}


@pytest.fixture
def wiki() -> Iterator[FakeMediaWiki]:
    with FakeMediaWiki({title: Page(text_of(title)) for title in TITLES}) as wiki:
        yield wiki


def test_no_corpus_is_left_out():
    assert {name.split()[0].strip(",") for name in MAKERS} == set(CORPORA)


@pytest.mark.parametrize("name", MAKERS)
def test_passes_are_read_side_by_side(name, tmp_path, wiki):
    network = Network(NetworkConfig(cache=tmp_path / "cache", deadline_s=2.0, backoff_s=0.01))
    network.sleep = lambda seconds: None
    folder = tmp_path / "corpus"
    folder.mkdir()
    config = CorpusConfig(**MAKERS[name](folder, wiki))
    starts = ((0, 0), (0, 0), (1, 0), (0, 2))

    def alone(epoch: int, start: int) -> list[str]:
        passed = itertools.islice(open_corpus(config, network).articles(epoch, start), 7)
        return [article.title for article in passed if article]

    opened = open_corpus(config, network)
    passes = [itertools.islice(opened.articles(epoch, start), 7) for epoch, start in starts]
    found: list[list[str]] = [[] for _ in passes]
    for places in itertools.zip_longest(*passes):
        for titles, article in zip(found, places, strict=True):
            titles += [article.title] if article else []

    assert found == [alone(*start) for start in starts]
    assert found[0]
