"""The pages on corpora and embedders: every command runs, every example is the file it names, every field exists."""

import bz2
import csv
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_embeddings import KEY, EmbeddingServer
from fake_mediawiki import FakeMediaWiki, Page, invented_article

from attention_guided_rl.cli import main
from attention_guided_rl.config import CorpusConfig, EmbedderConfig, ModelConfig, NetworkConfig
from attention_guided_rl.config_files import dotted_fields, load_config
from attention_guided_rl.data import open_corpus
from attention_guided_rl.errors import CheckpointError, ConfigError, CorpusError
from attention_guided_rl.loading import load_tokenizer
from attention_guided_rl.network import Network

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = ("corpora", "embedders")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^agrl (?:.*\\\n)*.*$", re.MULTILINE)
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
FIELD = re.compile(r"(?<![\w./])(?:--)?((?:evaluation\.)?(?:corpus|embedder|network|selection)\.[a-z][a-z_-]*)")
SMALL = (
    *("--model.dtype", "float32", "--model.lora-rank", "2", "--training.device", "cpu"),
    *("--training.updates", "1", "--rollout.articles", "1", "--rollout.trajectories", "2", "--rollout.steps", "2"),
    *("--rollout.query-tokens", "2", "--rollout.context-tokens", "128", "--pairs.key-tokens", "6"),
    *("--pairs.value-tokens", "6", "--selection.temperature", "0.1", "--evaluation.articles", "0"),
    *("--network.cache", "cache", "--network.backoff-s", "0.001", "--log.trajectories-every", "1"),
)
TITLES = ("Post mill", "Tide mill")


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def blocks(language: str) -> list:
    """The fenced blocks of a language, as parameters named by page and number."""
    found = [(page, one[2]) for page in PAGES for one in BLOCK.finditer(text(page)) if one[1] == language]
    return [pytest.param(block, id=f"{page}-{number}") for number, (page, block) in enumerate(found, 1)]


def prose(title: str) -> str:
    """Plain words: an invented article of its own under each title."""
    return re.sub(r"<ref>.*?</ref>|\{\{.*?\}\}|[\[\]'=*|]", "", invented_article(title, 120))


def dump_pages() -> tuple[bytes, bytes, bytes]:
    """Head, pages and end of a dump."""
    head = "<mediawiki><siteinfo><base>https://wiki.example/wiki/Main_Page</base></siteinfo>\n"
    pages = "".join(
        f"<page><title>{title}</title><ns>0</ns><id>{number}</id><revision><id>{number}</id><model>wikitext</model>"
        f"<text>{prose(title)}</text></revision></page>\n"
        for number, title in enumerate(TITLES, 1)
    )
    return head.encode(), pages.encode(), b"</mediawiki>"


def write_corpora(folder: Path) -> None:
    """Write what the commands name: a folder of text, a CSV file, dumps, and a data set with a subset."""
    import pyarrow
    from pyarrow import parquet

    (folder / "articles").mkdir()
    for title in TITLES:
        (folder / "articles" / f"{title}.txt").write_text(prose(title), encoding="utf-8")
    with (folder / "articles.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("title", "text"), *((title, prose(title)) for title in TITLES), ("Blank", " ")])
    head, pages, end = map(bz2.compress, dump_pages())
    (folder / "pages-articles.xml.bz2").write_bytes(bz2.compress(b"".join(dump_pages())))
    (folder / "multistream.xml.bz2").write_bytes(head + pages + end)
    index = "".join(f"{len(head)}:{number}:{title}\n" for number, title in enumerate(TITLES, 1))
    (folder / "multistream-index.txt.bz2").write_bytes(bz2.compress(index.encode()))
    (folder / "titles.txt").write_text("# mills\n" + "\n".join(TITLES), encoding="utf-8")
    (folder / "data" / "20231101.en").mkdir(parents=True)
    table = pyarrow.table({"title": TITLES, "text": [prose(title) for title in TITLES]})
    parquet.write_table(table, folder / "data" / "20231101.en" / "rows.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with all that the commands name."""
    write_corpora(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # --offline sets it; set here, it is put back afterwards
    yield tmp_path
    for name in ("my_corpus", "my_embedder"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory, causal_lm, byte_tokenizer) -> Path:
    """A model of bytes, the smallest that reads any text."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    causal_lm("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides(words: list[str], number: int, wiki: str, service: str) -> list[str]:
    """What makes a command of the pages small, and keeps it on this machine."""
    own = [*SMALL, *(["--run", f"run-{number}"] if words[1] == "train" else [])]
    if "original" not in words:  # there, the article decides
        own += ["--pairs.num-pairs", "3"]
    if "hub" in words:
        own += ["--corpus.name", "data"]
    if "wikipedia" in words or "original" in words:
        title = words[words.index("--corpus.title") + 1] if "--corpus.title" in words else ""
        own += [] if title.startswith("https:") else ["--corpus.site", wiki]  # the address names the wiki
        own += ["--corpus.requests-per-second", "100"]
    if "original" in words or ("openai" in words and "https://embeddings.example/v1" not in words):
        own += ["--embedder.base-url", service]
    return own


def test_the_overrides_leave_no_command_a_way_out():
    """Whatever names a machine elsewhere in the pages is refused before a connection is opened."""
    for page in PAGES:
        commands = " ".join(c for one in BLOCK.finditer(text(page)) for c in COMMANDS.findall(one[2]))
        assert set(re.findall(r"https?://[\w.:/]+", commands)) <= {
            "https://wiki.example/wiki/Post_mill",  # not of Wikipedia: exit 13
            "https://embeddings.example/v1",  # no consent: exit 13
            "http://localhost:8080/v1",
        }


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands(block, folder, model, capfd):
    commands = COMMANDS.findall(block)
    assert commands
    pages = {title: Page(invented_article(title, 120), revision=number) for number, title in enumerate(TITLES, 1)}
    with FakeMediaWiki(pages) as wiki, EmbeddingServer(narrow=True) as service:
        for number, command in enumerate(commands):
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            wiki.requests.clear()
            service.requests.clear()
            code = main([*words[1:], *overrides(words, number, wiki.url, service.url), "--model.name", str(model)])
            shown = "".join(capfd.readouterr())
            stated = re.search(r"# exit (\d+)(?:: (.+))?$", command)
            assert code == (int(stated[1]) if stated else 0), f"{command}\n{shown}"
            assert not stated or (stated[2] or "") in shown
            if "--dry-run" in words or "--offline" in words:
                assert (wiki.requests, service.requests) == ([], [])


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_load(block, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(block, encoding="utf-8")
    config = load_config("demo", [file])
    for section, fields in yaml.safe_load(block).items():
        for name, value in fields.items():
            if not isinstance(value, dict):
                assert getattr(getattr(config, section), name) == value


def test_every_block_is_of_a_kind_that_is_tested():
    assert {one[1] for page in PAGES for one in BLOCK.finditer(text(page))} == {"bash", "yaml", "python"}


@pytest.mark.parametrize(("page", "example"), [("corpora", "my_corpus"), ("embedders", "my_embedder")])
def test_the_examples_are_quoted_whole(page, example):
    quoted = [one[2] for one in BLOCK.finditer(text(page)) if one[1] == "python"]
    assert quoted == [(EXAMPLES / f"{example}.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES)
def test_fields_that_are_mentioned_exist(page):
    words = "".join(re.sub(r"https?://\S+", "", BLOCK.sub(lambda b: b[2] * (b[1] != "python"), text(page))))
    mentioned = {name.replace("-", "_") for name in FIELD.findall(words)}
    assert len(mentioned) > 10
    assert mentioned - {"evaluation.corpus"} <= set(dotted_fields())


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


# -- the examples, by themselves


def csv_corpus(path: Path | None):
    return open_corpus(CorpusConfig(kind="my_corpus:CsvCorpus", path=path), Network(NetworkConfig()))


def test_my_corpus_has_the_same_article_at_a_place_whatever_the_start(folder):
    corpus = csv_corpus(folder / "articles.csv")
    whole = list(corpus.articles(0, 0))
    assert [article and article.title for article in whole] == ["Post mill", "Tide mill", None]
    assert [list(corpus.articles(epoch, start)) for epoch, start in ((0, 1), (3, 2), (0, 3))] == [
        whole[1:],
        whole[2:],
        [],
    ]


@pytest.mark.parametrize("content", [b"", b"title,text\n", b"a,b\n1,2\n", b"title,text\n\xff,x\n", None])
def test_my_corpus_refuses_what_is_no_such_file(content, folder):
    path = folder / "other.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"other\.csv"):
        csv_corpus(path)
    with pytest.raises(ConfigError, match=r"corpus\.path"):
        csv_corpus(None)


@pytest.fixture
def my_embedder(folder):
    import my_embedder

    return my_embedder


def test_trigrams_by_hand(my_embedder):
    vectors = my_embedder.trigrams(["ab", "AB ", "abc", "xyz", " "], 4096)
    products = (vectors @ vectors[0]).tolist()
    assert products == pytest.approx([1.0, 1.0, 6**-0.5, 0.0, 0.0])  # " ab", "ab "; " ab", "abc", "bc "


def test_my_embedders_agree_and_the_store_remembers(my_embedder, folder):
    """Both give the vectors of the same texts; another encoder under the same name is noticed."""

    tokenizer = load_tokenizer(ModelConfig())

    class Decoder:
        decode = staticmethod(tokenizer.decode)

    network, config = Network(NetworkConfig(cache=folder / "cache")), EmbedderConfig(dimensions=512)
    ids = torch.tensor([[300, 301, 302], [400, 300, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    plain = my_embedder.TrigramEmbedder(config, network, Decoder())
    stored = my_embedder.stored_trigrams(config, network, Decoder())
    assert plain.embed_queries(ids, mask).shape == (2, 1, 512)
    assert torch.equal(plain.embed_queries(ids, mask), stored.embed_queries(ids, mask))
    assert torch.equal(plain.embed_keys(ids, mask), stored.embed_keys(ids, mask))
    my_embedder.trigrams = lambda texts, dimensions: torch.eye(len(texts), dimensions).numpy()
    with pytest.raises(CheckpointError, match="stored-trigrams"):
        my_embedder.stored_trigrams(config, network, Decoder())
