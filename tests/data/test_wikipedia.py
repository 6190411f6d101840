"""WikipediaCorpus: what it asks a wiki for, what it makes of the reply, what it keeps, and what it refuses."""

import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

import fake_mediawiki as fake
import pytest
from fake_mediawiki import FakeMediaWiki, Page, invented_article

from attention_guided_rl.config import CorpusConfig, NetworkConfig, PairsConfig
from attention_guided_rl.data import mediawiki, mediawiki_reply, open_corpus, wikipedia
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.data.wikipedia import WikipediaCorpus, read_address
from attention_guided_rl.errors import (
    AgrlError,
    CheckpointError,
    ConfigError,
    CorpusError,
    CredentialsError,
    RemoteError,
    StorageError,
    UnsafeError,
)
from attention_guided_rl.network import Network
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Article

PUBLIC = "93.184.215.14"
MILLS = {
    "Post mill": Page("A '''post mill''' turns on a [[post]].", revision=41, categories=("Mills",)),
    "Smock mill": Page("A smock mill has [[File:Cap.jpg|thumb]] a cap.", revision=42, categories=("Mills",)),
    "Tower mill": Page("{{Infobox mill}}\nA tower mill is built of brick.", revision=43, categories=("Mills",)),
    "Talk:Post mill": Page("Is it?", namespace=1, categories=("Mills",)),
    "Paltrok": Page("#REDIRECT [[Smock mill]]", redirect="Smock mill"),
    "Sokkelmolen": Page("#REDIRECT [[Paltrok]]", redirect="Paltrok"),
    "Mill": Page(
        "* [[Post mill]]\n* [[Tower mill|tower]]\n* [[Mill (tool), small]]\n* [[Post mill]]", disambiguation=True
    ),
    "Round": Page("#REDIRECT [[About]]", redirect="About"),
    "About": Page("#REDIRECT [[Round]]", redirect="Round"),
    "Talk about": Page("#REDIRECT [[Talk:Post mill]]", redirect="Talk:Post mill"),
    "Lost": Page("#REDIRECT [[Nowhere]]", redirect="Nowhere"),
    "Sails": Page("{}", model="json"),
    "Stub": Page("  \n"),
    "Frame": Page("{{Infobox mill}}"),
    "Secret": Page("Nobody reads this.", hidden=True),
    "Category:Mills": Page("All mills.", namespace=14),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path_factory):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path_factory.getbasetemp()))  # no certificates: nothing to load


@pytest.fixture
def mills() -> Iterator[FakeMediaWiki]:
    with FakeMediaWiki(dict(MILLS)) as wiki:
        yield wiki


@pytest.fixture
def network(tmp_path) -> Network:
    return make_network(tmp_path / "cache")


def make_network(cache: Path, **options) -> Network:
    """A network that does not wait; what it would have waited is in `sleep.__self__`."""
    made = Network(NetworkConfig(**{"cache": cache, "timeout_s": 0.3, "backoff_s": 0.001, "deadline_s": 60, **options}))
    made.sleep = [].append
    return made


def corpus(wiki: FakeMediaWiki, network: Network, **options) -> WikipediaCorpus:
    return WikipediaCorpus(
        CorpusConfig(**{"kind": "wikipedia", "site": wiki.url, "shuffle": False, **options}), network
    )


def read(wiki: FakeMediaWiki, network: Network, **options) -> list[Article]:
    return list(corpus(wiki, network, **options).articles(0, 0))


def offline(network: Network) -> Network:
    return Network(replace(network.config, offline=True))


def records(network: Network) -> dict[str, dict]:
    """What the cache has of each title."""
    paths = network.cache("wikipedia").glob("*.json")
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return {record["requested"]: {**record, "path": path} for path, record in found if "page_id" in record}


def test_article_has_all_fields(mills, network):
    made = corpus(mills, network, title="Smock mill")

    assert isinstance(made, Corpus)
    assert list(made.articles(0, 0)) == list(made.articles(7, 0)) == [
        Article(
            id="wikipedia:127.0.0.1:2",
            title="Smock mill",
            text="A smock mill has a cap.",
            source="wikipedia:127.0.0.1",
            revision="42",
            url="https://wiki.example/wiki/Smock_mill",
            licence="Invented Licence 1.0 (https://licence.example/1.0/)",
        )
    ]  # fmt: skip
    assert list(made.articles(0, 1)) == []


def test_one_article_costs_two_requests(mills, network):
    read(mills, network, title="Post mill")

    site, page = (request.query for request in mills.requests)
    common = {"action": "query", "format": "json", "formatversion": "2", "maxlag": "5"}
    assert site == {**common, "meta": "siteinfo", "siprop": "general|namespaces|rightsinfo"}
    assert page == {
        **common,
        "titles": "Post mill",
        "prop": "revisions|info|pageprops",
        "rvprop": "ids|timestamp|content",
        "rvslots": "main",
        "ppprop": "disambiguation",
        "inprop": "url",
        "redirects": "1",
    }


TEXT = (
    "[[Datei:Cap.jpg|thumb|A cap]] A '''smock mill'''<ref>Page 3.</ref> has [[Dach|a cap]].\n\n"
    "[[Kategorie:Mills]]\n== Sails ==\nIts sails are {{convert|9|m}} long. [[Spezial:Sails]]\n\n"
    "== See also ==\n* [[Mill]]"
)


def test_article_reads_the_same_from_the_interface_and_from_a_dump(tmp_path, network):
    text = TEXT + invented_article("Smock mill", 200)
    names = "".join(f'<namespace key="{key}">{local}</namespace>' for key, (local, _) in fake.GERMAN.items())
    path = tmp_path / "dewiki.xml"
    path.write_text(
        f"<mediawiki><siteinfo><namespaces>{names}</namespaces></siteinfo><page><title>Smock mill</title><ns>0</ns>"
        f"<id>1</id><revision><id>7</id><text>{escape(text)}</text></revision></page></mediawiki>"
    )
    (from_dump,) = DumpCorpus(CorpusConfig(kind="dump", path=path)).articles(0, 0)
    with FakeMediaWiki({"Smock mill": Page(text)}, namespaces=fake.GERMAN) as wiki:
        (article,) = read(wiki, network, title="Smock mill")

    assert article.text == from_dump.text
    assert article.text.startswith("A smock mill has a cap.\n\nIts sails are 9 m long.")


@pytest.mark.parametrize("title", ["post mill", "Post_mill", " Post  mill ", "post_mill#Sails"])
def test_title_is_found_as_people_write_it(mills, network, title):
    assert [a.title for a in read(mills, network, title=title)] == ["Post mill"]


@pytest.mark.parametrize(
    ("stored", "title"),
    [("Caf\u00e9", "Cafe\u0301"), ("\u0645\u06cc\u200c\u0631\u0648", "\u0645\u06cc\u200c\u0631\u0648")],
    ids=["decomposed", "with a joiner, as Persian needs it"],
)
def test_title_in_other_letters_is_found_and_stays_as_it_is(network, stored, title):
    with FakeMediaWiki({stored: Page("A place.")}) as wiki:
        assert [a.title for a in read(wiki, network, title=title)] == [stored]


@pytest.mark.parametrize("title", ["Paltrok", "sokkelmolen"])
def test_redirects_are_followed(mills, network, title):
    assert [a.title for a in read(mills, network, title=title)] == ["Smock mill"]


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("Post mil", "'Post mil': no such page; nearest: 'Post mill'"),
        ("Zzz", "'Zzz': no such page; change corpus.title"),
        ("Lost", "'Lost': no such page; "),
        ("Post|mill", r"'Post\|mill': not a valid title; nearest: 'Post mill'"),
        ("[[Post mill]]", r"'\[\[Post mill\]\]': not a valid title; nearest: 'Post mill'"),
        ("M" * 256, "'M+': not a valid title; change corpus.title"),
        ("\ud800", "'.': not a valid title; change corpus.title"),
        ("#History", "'': not a valid title; change corpus.title"),
        ("Talk:Post mill", "'Talk:Post mill': not in the main namespace; change corpus.title"),
        ("Talk about", "'Talk about': not in the main namespace; change corpus.title"),
        ("Round", "'Round': a redirect in a circle; change corpus.title"),
        (
            "Mill",
            r"'Mill': a disambiguation page; set corpus.title to one of its meanings: "
            r"'Post mill', 'Tower mill', 'Mill \(tool\), small'$",
        ),
        ("Sails", "'Sails': no wikitext; change corpus.title"),
        ("Stub", "'Stub': no text; change corpus.title"),
        ("Frame", "'Frame': no text; change corpus.title"),
        ("Secret", "'Secret': no text; change corpus.title"),
    ],
)
def test_title_that_leads_to_no_article_is_an_error_with_a_hint(mills, network, title, message):
    with pytest.raises(CorpusError, match=rf"^127\.0\.0\.1: {message}") as caught:
        read(mills, network, title=title)
    assert caught.value.exit_code == 3


def test_a_hint_is_not_worth_a_second_error(mills, network):
    mills.faults = [None, None, fake.status(503)]

    with pytest.raises(CorpusError, match=r"'Post mil': no such page; change corpus\.title"):
        read(mills, network, title="Post mil")
    assert len(mills.requests) == 3


def test_too_large_page_is_refused(mills, network, monkeypatch):
    monkeypatch.setattr(mediawiki_reply, "MAX_WIKITEXT", 10)

    with pytest.raises(CorpusError, match="'Post mill': too large"):
        read(mills, network, title="Post mill")


SKIPPED = ["Paltrok", "Zzz", "Mill", "Round", "Nought", "a|b", "Talk:Post mill", "Smock mill", "Frame", "Stub", "Sails"]


def test_list_keeps_its_order_and_counts_what_is_skipped(mills, network, caplog):
    titles = ("Tower mill", *SKIPPED, "Post mill", "tower mill", "Tower mill")

    assert [a.title for a in read(mills, network, titles=titles)] == ["Tower mill", "Smock mill", "Post mill"]
    assert caplog.messages == [  # the last title is the first, word for word
        "127.0.0.1: skipped 11 of 14 titles: 1 a disambiguation page, 1 a redirect in a circle, 2 named twice, "
        "2 no such page, 2 no text, 1 no wikitext, 1 not a valid title, 1 not in the main namespace"
    ]


def test_list_without_any_article_is_an_error(mills, network):
    with pytest.raises(CorpusError, match=r"skipped 2 of 2 titles: 1 a disambiguation page, 1 no such page; set other"):
        read(mills, network, titles=("Mill", "Zzz"))


def test_long_list_is_asked_for_in_parts(network, caplog):
    titles = tuple(f"Mill {i}" for i in range(120))
    with FakeMediaWiki({title: Page(f"The text of {title}.") for title in titles}) as wiki:
        with caplog.at_level(logging.INFO):
            articles = read(wiki, network, titles=titles)
        batches = [asked.split("|") for asked in wiki.asked("titles")]

    assert [a.text for a in articles] == [f"The text of {title}." for title in titles]
    assert list(map(len, batches)) == [50, 50, 20]
    assert [m for m in caplog.messages if "pages" in m] == [
        "127.0.0.1: 50 of 120 pages",
        "127.0.0.1: 100 of 120 pages",
        "127.0.0.1: 120 of 120 pages",
    ]


def test_long_titles_go_in_short_requests(network):
    titles = tuple(f"{'風車' * 30} {i}" for i in range(20))  # 180 bytes each, 540 characters when they are sent
    with FakeMediaWiki({title: Page(f"Text {i}.") for i, title in enumerate(titles)}) as wiki:
        assert len(read(wiki, network, titles=titles, drop_near_duplicates=False)) == 20
        assert max(len(request.target) for request in wiki.requests) < 5000


@pytest.mark.parametrize("max_text", [1, 60, 120])
def test_reply_in_several_parts_is_put_together(network, max_text):
    pages = {f"Mill {i}": Page(f"Mill {i} stands on the hill, and nothing else does.") for i in range(5)}
    pages["Mill 1"] = replace(pages["Mill 1"], disambiguation=True)
    with FakeMediaWiki(pages, max_text=max_text) as wiki:
        articles = read(wiki, network, titles=tuple(pages), drop_near_duplicates=False)
        parts = len(wiki.asked("titles"))

    assert [a.text for a in articles] == [f"Mill {i} stands on the hill, and nothing else does." for i in (0, 2, 3, 4)]
    assert {a.url for a in articles} == {f"https://wiki.example/wiki/Mill_{i}" for i in (0, 2, 3, 4)}
    assert parts == {1: 5, 60: 5, 120: 3}[max_text]  # 50 characters a page


@pytest.mark.parametrize(("moves", "num_requests"), [(True, 7), (False, 2)])
def test_reply_without_end_is_refused(mills, network, monkeypatch, moves, num_requests):
    monkeypatch.setattr(mediawiki, "MAX_REPLIES", 7)

    def answer(handler):
        place = len(mills.requests) if moves else 1
        handler.send_json({"continue": {"cmcontinue": f"page|{place}", "continue": "-||"}, "query": {}})

    mills.faults = [None, *[answer] * 20]
    with pytest.raises(RemoteError, match=r"^127\.0\.0\.1: its reply has no end"):
        read(mills, network, category="Mills")
    assert len(mills.requests) == 1 + num_requests


@pytest.mark.parametrize("category", ["Mills", "Category:Mills", "Kategorie:Mills", "mills"])
def test_category_gives_its_articles(network, category):
    with FakeMediaWiki(dict(MILLS), namespaces=fake.GERMAN) as wiki:
        wiki.max_listed = 2
        titles = [a.title for a in read(wiki, network, category=category)]
        assert wiki.asked("cmcontinue") == ["page|2"]

    assert titles == ["Post mill", "Smock mill", "Tower mill"]


def test_category_ends_at_the_limit(mills, network):
    assert len(read(mills, network, category="Mills", limit=2)) == 2
    assert mills.asked("cmlimit") == ["2"]


def test_empty_category_is_an_error_with_a_hint(mills, network):
    with pytest.raises(CorpusError, match=r"category 'Category:Mill', 500: no articles; nearest: 'Category:Mills'"):
        read(mills, network, category="Category:Mill")


@pytest.fixture
def thirty(network) -> Iterator[FakeMediaWiki]:
    with FakeMediaWiki({f"Mill {i}": Page(f"Word{i} " * 9) for i in range(30)}) as wiki:
        yield wiki


def test_random_articles_are_drawn_once(thirty, network):
    first = read(thirty, network, random=7)
    num_requests = len(thirty.requests)

    assert len({a.title for a in first}) == 7
    assert read(thirty, network, random=7) == read(thirty, offline(network), random=7) == first
    assert len(thirty.requests) == num_requests
    assert read(thirty, network, random=7, seed=2) != first


def test_random_articles_come_in_several_parts_until_there_are_enough(thirty, network):
    thirty.max_listed = 4

    assert len({a.title for a in read(thirty, network, random=9)}) == 9


def test_disambiguation_pages_are_not_drawn(thirty, network, caplog):
    thirty.pages |= {f"Mill of {i}": Page("* [[Mill 1]]", disambiguation=True) for i in range(60)}
    thirty.max_listed = 9

    titles = [a.title for a in read(thirty, network, random=12)]

    assert len(set(titles)) == 12
    assert not any("of" in title for title in titles)
    assert not [m for m in caplog.messages if "skipped" in m]


def test_a_wiki_with_too_few_articles_gives_all(mills, network):
    mills.pages = {"Post mill": MILLS["Post mill"]}

    assert [a.title for a in read(mills, network, random=9)] == ["Post mill"]


def test_order_is_shuffled_anew_in_each_pass(thirty, network):
    titles = tuple(thirty.pages)
    made = corpus(thirty, network, titles=titles, shuffle=True)
    first, second = ([a.title for a in made.articles(epoch, 0)] for epoch in (0, 1))

    assert sorted(first) == sorted(second) == sorted(titles)
    assert len({tuple(first), tuple(second), titles}) == 3
    assert [a.title for a in made.articles(1, 28)] == second[28:]
    assert [a.title for a in corpus(thirty, network, titles=titles).articles(0, 0)] == list(titles)


def test_near_duplicates_of_the_whole_list_are_left_out(network, caplog):
    text = invented_article("Mill", 300)
    pages = {"A": Page(text), "B": Page(invented_article("Sea", 300)), "C": Page(text + "\n\nOne more line of words.")}
    with FakeMediaWiki(pages) as wiki:
        assert [a.title for a in read(wiki, network, titles=("A", "B", "C"))] == ["A", "B"]
        assert caplog.messages == ["127.0.0.1: 1 near-duplicates left out"]
        assert len(read(wiki, network, titles=("A", "B", "C"), drop_near_duplicates=False)) == 3


def test_second_run_asks_for_nothing_and_reads_the_same(mills, network):
    first = read(mills, network, title="Paltrok")
    mills.pages["Smock mill"] = Page("Somebody has edited this.", revision=99)
    mills.requests.clear()

    assert read(mills, network, title="Paltrok") == read(mills, offline(network), title="Paltrok") == first
    assert mills.requests == []


def test_second_run_of_a_list_does_not_ask_for_what_was_missing(mills, network):
    titles = ("Post mill", "Zzz", "a|b", "Mill")
    first = read(mills, network, titles=titles)
    mills.requests.clear()

    assert read(mills, offline(network), titles=titles) == first
    assert mills.requests == []
    mills.pages["Zzz"] = Page("It is there now.")
    assert read(mills, network, title="Zzz")[0].text == "It is there now."


def test_title_that_was_mistaken_is_not_kept(mills, network):
    with pytest.raises(CorpusError, match="no such page"):
        read(mills, network, title="Zzz")
    mills.pages["Zzz"] = Page("It is there now.")

    assert [a.text for a in read(mills, network, titles=("Zzz",))] == ["It is there now."]


def test_category_is_kept(mills, network):
    first = read(mills, network, category="Mills")
    mills.pages["Zaan mill"] = Page("A new mill.", categories=("Mills",))

    assert read(mills, offline(network), category="Mills") == first
    assert len(read(mills, network, category="Mills", limit=499)) == 4  # another question


@pytest.mark.parametrize("options", [{"title": "Post mill"}, {"titles": ("Post mill",)}, {"category": "Mills"}])
def test_offline_what_is_not_in_the_cache_is_an_error(mills, network, options):
    with pytest.raises(
        RemoteError, match=r"^127\.0\.0\.1: .* is not in the cache, and --offline allows no connection$"
    ):
        read(mills, offline(network), **options)
    assert mills.requests == []


def test_record_says_where_the_text_is_from(mills, network):
    read(mills, network, title="paltrok")
    record = records(network)["paltrok"]
    text = "A smock mill has [[File:Cap.jpg|thumb]] a cap."
    retrieved, path = record.pop("retrieved"), record.pop("path")

    assert record == {
        "site": mills.url,
        "requested": "paltrok",
        "title": "Smock mill",
        "page_id": 2,
        "revision": 42,
        "timestamp": "2026-01-02T03:04:05Z",
        "url": "https://wiki.example/wiki/Smock_mill",
        "licence": "Invented Licence 1.0 (https://licence.example/1.0/)",
        "wikitext": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "problem": "",
    }
    assert retrieved.endswith("+00:00")
    assert path.name == hashlib.sha256(f"{mills.url}\npaltrok".encode()).hexdigest() + ".json"


@pytest.mark.parametrize("title", ["../../../etc/passwd", "/etc/passwd", "A/B", "con.txt", "..", "A:B*C?"])
def test_title_is_never_the_name_of_a_file(tmp_path, network, title):
    with FakeMediaWiki({fake.normal(title): Page("A page.")}) as wiki:
        assert len(read(wiki, network, title=title)) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]

    assert {path.parent for path in files} == {tmp_path / "cache" / "wikipedia"}
    assert {path.suffix for path in files if path.name not in (".lock", ".asked")} == {".json"}


@pytest.mark.parametrize("damage", ["cut", "changed", "other page", "empty", "no text"])
def test_damaged_record_is_fetched_again(mills, network, caplog, damage):
    first = read(mills, network, titles=("Post mill", "Tower mill"))
    path = records(network)["Post mill"]["path"]
    text = path.read_text()
    damaged = {
        "cut": text[:100],
        "changed": text.replace("turns on", "turns in"),
        "other page": records(network)["Tower mill"]["path"].read_text(),
        "empty": "",
        "no text": text.replace('"wikitext"', '"words"'),
    }
    path.write_text(damaged[damage])
    mills.requests.clear()
    caplog.clear()

    with pytest.raises(RemoteError, match="'Post mill' is not in the cache"):
        read(mills, offline(network), titles=("Post mill", "Tower mill"))
    assert read(mills, network, titles=("Post mill", "Tower mill")) == first
    asked = (mills.asked("titles"), mills.asked("revids"))
    assert asked == (([], ["41"]) if damage in ("changed", "no text") else (["Post mill"], []))
    assert path.read_text().replace("wikitext", "") != damaged[damage]
    (message,) = caplog.messages
    assert "'Post mill' was damaged or no article; fetched again" in message


@pytest.mark.parametrize(("earlier", "text"), [(True, "Boats pass."), (False, "Ships pass.")])
def test_damaged_record_comes_back_in_its_revision_where_the_wiki_still_has_it(network, caplog, earlier, text):
    with FakeMediaWiki({"Lock": Page("Boats pass.", revision=5)}) as wiki:
        read(wiki, network, titles=("Lock",))
        path = records(network)["Lock"]["path"]
        path.write_text(path.read_text().replace("Boats", "Goats"))
        wiki.pages["Lock"] = Page("Ships pass.", revision=9, earlier=((5, "Boats pass."),) if earlier else ())
        (article,) = read(wiki, network, titles=("Lock",))
    assert (article.text, article.revision) == (text, "5" if earlier else "9")
    lost = [message for message in caplog.messages if "no longer shows that revision" in message]
    assert len(lost) == (0 if earlier else 1)
    assert all("'Lock' in revision 5 is damaged" in message and "start a new run" in message for message in lost)


@pytest.mark.parametrize("changed", [True, False])
def test_a_run_goes_on_only_with_the_revisions_that_it_began_with(network, tmp_path, changed):
    """Although the article that was read last has not changed."""
    texts = {name: invented_article(name, 60) for name in ("Lock", "Weir", "Sluice")}
    titles = tuple(texts)

    def stream(wiki: FakeMediaWiki, network: Network) -> PoolStream:
        config = CorpusConfig(kind="wikipedia", site=wiki.url, titles=titles, requests_per_second=100, shuffle=False)
        pairs = PairsConfig(key_tokens=8, value_tokens=8)
        sizes = {"num_pairs": 2, "num_probes": 0, "seed": 0, "purpose": Purpose.POOL}
        return PoolStream(open_corpus(config, network), lambda text: list(text.encode()), pairs, **sizes)

    with FakeMediaWiki({title: Page(text, revision=5) for title, text in texts.items()}) as wiki:
        begun = stream(wiki, network)
        begun.next_pool(2)
        wiki.pages["Lock"] = Page("Ships pass. " * 20, revision=9 if changed else 5)
        again = stream(wiki, network)
        again.resume(begun.position)  # from the same cache
        assert again.next_pool(1).pair_ids == begun.next_pool(1).pair_ids
        assert again.position == begun.position
        if changed:
            other = stream(wiki, make_network(tmp_path / "other"))
            with pytest.raises(CheckpointError, match=r"revisions.*network\.cache") as caught:
                other.resume(begun.position)
            assert caught.value.exit_code == 7


def test_cache_that_cannot_be_written_is_an_error_of_the_disk(mills, network):
    network.cache("wikipedia").write_text("a file where the folder should be")

    with pytest.raises(StorageError, match="wikipedia: cannot write"):
        read(mills, network, title="Post mill")


def test_interrupted_list_is_taken_up_where_it_ended(tmp_path, network):
    titles = tuple(f"Mill {i}" for i in range(70))
    with FakeMediaWiki({title: Page(f"The text of {title}.") for title in titles}) as wiki:
        wiki.faults = [None, None, fake.status(403)]  # the wiki itself, fifty pages, and then
        with pytest.raises(RemoteError, match="403"):
            read(wiki, network, titles=titles)
        wiki.requests.clear()

        assert len(read(wiki, network, titles=titles)) == 70
        assert [len(asked.split("|")) for asked in wiki.asked("titles")] == [20]
        assert wiki.asked("meta") == []


def test_processes_started_together_do_not_both_fetch(thirty, tmp_path):
    networks = [make_network(tmp_path / "cache", timeout_s=5) for _ in range(4)]
    results: list[list[Article]] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(read(thirty, n, titles=tuple(thirty.pages))))
        for n in networks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 4
    assert all(result == results[0] and len(result) == 30 for result in results)
    assert len(thirty.requests) == 2  # the wiki itself, and all pages


PASSING = {
    "maxlag": fake.api_error("maxlag", "Waiting for a database: 7 seconds lagged.", retry_after="5"),
    "rate": fake.api_error("ratelimited", "You have exceeded your rate limit.", retry_after="5"),
    "readonly": fake.api_error("readonly", "The wiki is in read-only mode.", retry_after="5"),
    "internal": fake.api_error("internal_api_error_DBQueryError", "A database query error.", retry_after="5"),
    "429": fake.status(429, retry_after="5"),
    "503": fake.status(503, retry_after="5"),
    "429 without": fake.status(429),
    "429 absurd": fake.status(429, retry_after="-1 fortnight"),
    "500": fake.status(500),
    "502": fake.status(502),
    "504": fake.status(504),
    "reset": fake.reset,
    "cut": fake.cut,
    "silence": fake.silence,
    "html": fake.body(b"<!DOCTYPE html><p>Back soon", {"Content-Type": "text/html"}),
    "nothing": fake.body(b""),
    "half": fake.body(b'{"query": {"pages": ['),
    "deep": fake.body(b"[" * 10**5),
    "surrogate": fake.body(b'{"query": {"pages": [{"title": "\\ud800"}]}}'),  # cannot be written
    "damaged": fake.body(b"no gzip", {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(mills, network, name):
    mills.faults = [None, PASSING[name], PASSING[name]]
    assert [a.title for a in read(mills, network, title="Post mill")] == ["Post mill"]

    assert len(mills.requests) == 4
    waits = network.sleep.__self__
    assert (5.0 in waits) is (name in ("maxlag", "rate", "readonly", "internal", "429", "503"))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("surrogate", r"not an API reply: '{\"query\": {\"pages\": .*'"),
        ("maxlag", "maxlag: Waiting for a database: 7 seconds lagged.; it asks to wait 5 s"),
        ("500", "HTTP 500"),
        ("html", r"not an API reply: '<!DOCTYPE html><p>Back soon'"),
        ("reset", ".*"),
    ],
)
def test_what_does_not_pass_is_an_error_in_the_end(mills, tmp_path, name, cause):
    mills.always = PASSING[name]

    with pytest.raises(RemoteError, match=rf"^127\.0\.0\.1: gave up after \d+ attempts: {cause}$") as caught:
        read(mills, make_network(tmp_path, deadline_s=4.0), title="Post mill")  # that much of waits, not of seconds
    assert caught.value.exit_code == 5


def test_absurd_wait_is_not_begun(mills, network):
    mills.always = fake.status(429, retry_after="86400")

    with pytest.raises(RemoteError, match="it asks to wait 86400 s"):
        read(mills, network, title="Post mill")
    assert len(mills.requests) == 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (fake.status(401), CredentialsError, "HTTP 401"),
        (fake.status(403), RemoteError, r"HTTP 403.*User-Agent.*network\.contact"),
        (fake.status(404), RemoteError, r"HTTP 404; is http://127.* the address of its api\.php\?"),
        (fake.status(418), RemoteError, "HTTP 418"),
        (
            fake.api_error("badvalue", "Unrecognized value."),
            RemoteError,
            r"refused the request: badvalue: Unrecognized",
        ),
        (fake.body(b'{"results": [1]}'), CorpusError, "no such page"),
        (fake.body(b"[1, 2]"), RemoteError, r"not a reply of MediaWiki: '\[1, 2\]'; correct corpus\.site"),
        (fake.body(b"null"), RemoteError, "not a reply of MediaWiki"),
        (fake.body(b'{"query": {"pages": {"1": {}}}}'), RemoteError, "not a reply of MediaWiki"),
        (fake.redirect("http://169.254.169.254/"), UnsafeError, r"redirects to http://169\.254\.169\.254; refused"),
        (fake.redirect("https://evil.example/"), UnsafeError, r"redirects to https://evil\.example; refused"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(mills, network, fault, error, message):
    mills.faults = [None, fault]

    with pytest.raises(error, match=message):
        read(mills, network, title="Post mill")
    assert len(mills.requests) <= 3  # with the search for a hint


def test_redirect_in_a_circle_is_an_error_at_once(mills, network):
    mills.always = fake.redirect("/w/api.php")

    with pytest.raises(RemoteError, match="redirects in a circle"):
        read(mills, network, title="Post mill")
    assert len(mills.requests) == 6


@pytest.mark.parametrize(
    "fault", [fake.api_error("x\x1b[2J", "\x1b]0;owned\x07\n\r more" * 99), fake.body(b"\x1b[31mred\n")]
)
def test_what_a_server_says_cannot_move_the_cursor(mills, tmp_path, fault):
    mills.always = fault

    with pytest.raises(RemoteError) as caught:
        read(mills, make_network(tmp_path, deadline_s=0.05), title="Post mill")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_article_of_a_hostile_wiki_is_only_text(network):
    page = {"pageid": 1, "ns": 0, "title": "A\x1b[2J\nB", "fullurl": "javascript:alert(1)"}
    slot = {"content": "A mill\0 grinds.", "contentmodel": "wikitext"}
    body = {"query": {"normalized": [{"from": "A", "to": page["title"]}], "pages": [page]}}
    page["revisions"] = [{"revid": 5, "slots": {"main": slot}}]
    with FakeMediaWiki({}, rights=("Free\x1b[2J", "")) as wiki:
        wiki.faults = [None, fake.body(json.dumps(body).encode())]
        (article,) = read(wiki, network, title="A")

    assert (article.title, article.text, article.url) == ("A\ufffd[2J B", "A mill grinds.", "")
    assert article.licence == "Free\ufffd[2J"


@pytest.mark.parametrize(("rate", "interval"), [(1.0, 1.0), (4.0, 0.25)])
def test_requests_keep_the_pace(mills, network, rate, interval):
    mills.faults = [fake.status(500)]
    read(mills, network, category="Mills", requests_per_second=rate)
    pauses = [wait for wait in network.sleep.__self__ if wait > 0.01]  # what is shorter is the wait to repeat

    assert len(mills.requests) == 4  # the wiki itself, twice, the category, and its pages
    assert len(pauses) == 3
    assert all(interval - 0.1 < pause <= interval for pause in pauses)


def test_the_pace_is_kept_from_one_corpus_and_process_to_the_next(mills, network):
    """What another process has is a network of its own, over the same cache."""
    read(mills, network, title="Tower mill")
    other = make_network(network.config.cache)
    read(mills, other, title="Post mill")

    assert len(mills.requests) == 3
    waits = [*network.sleep.__self__, *other.sleep.__self__]
    assert len(waits) == 2
    assert all(0.9 < wait <= 1.0 for wait in waits)


def test_a_clock_that_was_set_back_stops_nobody(mills, network):
    asked = network.cache("wikipedia") / ".asked"
    asked.parent.mkdir()
    asked.touch()
    os.utime(asked, (2e9, 2e9))  # in 2033
    read(mills, network, title="Post mill")

    assert len(mills.requests) == 2
    assert all(wait <= 1.0 for wait in network.sleep.__self__)


def test_titles_are_read_from_a_file(mills, network, tmp_path):
    path = tmp_path / "titles.txt"
    path.write_bytes("\ufeff# Mills\r\nTower mill\r\n\r\n  Post_mill  \n".encode())

    assert [a.title for a in read(mills, network, path=path)] == ["Tower mill", "Post mill"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"# none\n\n", "no title in it"), (b"M\xfchle", "byte 1 is not valid UTF-8"), (None, "cannot be read")],
)
def test_file_without_titles_is_refused(mills, network, tmp_path, content, message):
    path = tmp_path / "titles.txt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(CorpusError, match=rf"titles\.txt: {message}"):
        read(mills, network, path=path)


def test_file_that_is_no_list_is_refused_unread(mills, network, tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "MAX_TITLE_FILE", 5)
    (tmp_path / "dump.xml").write_text("<mediawiki>")

    with pytest.raises(CorpusError, match="too large for a list of titles"):
        read(mills, network, path=tmp_path / "dump.xml")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://en.wikipedia.org/wiki/Albert_Einstein", ("en", "Albert Einstein")),
        ("https://de.m.wikipedia.org/wiki/M%C3%BChle#Bau", ("de", "M\u00fchle")),
        ("https://en.wikipedia.org/wiki/M\u00fchle", ("en", "M\u00fchle")),
        ("https://en.wikipedia.org/w/index.php?title=C%2B%2B&oldid=5", ("en", "C++")),
        ("https://en.m.wikipedia.org/w/index.php?title=Post_mill&action=history", ("en", "Post mill")),
        ("https://zh-min-nan.wikipedia.org/wiki/A/B?action=raw", ("zh-min-nan", "A/B")),
        ("https://EN.WIKIPEDIA.ORG:443/wiki/Mill%3F", ("en", "Mill?")),
        ("HTTPS://simple.wikipedia.org/wiki/Mill%23Sails", ("simple", "Mill")),
    ],
)
def test_address_names_language_and_title(address, expected):
    assert read_address(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "http://en.wikipedia.org/wiki/Mill",
        "ftp://en.wikipedia.org/wiki/Mill",
        "file:///etc/passwd",
        "https://127.0.0.1/wiki/Mill",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/wiki/Mill",
        "https://[::ffff:127.0.0.1]/wiki/Mill",
        "https://2130706433/wiki/Mill",
        "https://localhost/wiki/Mill",
        "https://wikipedia.org/wiki/Mill",
        "https://wikipedia.org.evil.example/wiki/Mill",
        "https://evil.example/en.wikipedia.org/wiki/Mill",
        "https://en.wikipedia.org.evil.example/wiki/Mill",
        "https://evil-wikipedia.org/wiki/Mill",
        "https://en.wikipedia.org@evil.example/wiki/Mill",
        "https://me:hunter2@en.wikipedia.org/wiki/Mill",
        "https://evil.example\\@en.wikipedia.org/wiki/Mill",
        "https://en.wikipedia.org:8443/wiki/Mill",
        "https://en.wikipedia.org:x/wiki/Mill",
        "https://en.wikipedia.org%2eevil.example/wiki/Mill",
        "https://a.b.wikipedia.org/wiki/Mill",
        "https://[bad/wiki/Mill",
        "https:///wiki/Mill",
    ],
)
def test_address_elsewhere_is_refused(network, monkeypatch, address):
    monkeypatch.setattr(socket, "getaddrinfo", None)  # nothing is even looked up

    with pytest.raises(UnsafeError, match=r"^corpus\.title: refused an address") as caught:
        WikipediaCorpus(CorpusConfig(kind="wikipedia", title=address), network)
    assert caught.value.exit_code == 13
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"title": "https://en.wikipedia.org/"},
        {"title": "https://en.wikipedia.org/wiki/"},
        {"title": "https://en.wikipedia.org/wiki/Mill", "site": "http://127.0.0.1/api.php"},
        {"titles": ("https://en.wikipedia.org/wiki/Mill", "https://de.wikipedia.org/wiki/Mill")},
        {"titles": ("Mill", "https://de.wikipedia.org/wiki/Mill")},
        {"title": "Mill", "site": "wiki.example"},
    ],
)
def test_contradictory_addresses_are_refused(network, options):
    with pytest.raises(ConfigError):
        WikipediaCorpus(CorpusConfig(kind="wikipedia", **options), network)


def test_wikipedia_at_a_private_address_is_refused(network, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.0.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with pytest.raises(UnsafeError, match=r"en\.wikipedia\.org leads to the private address 192\.168\.0\.7; refused"):
        WikipediaCorpus(CorpusConfig(kind="wikipedia", title="Post mill"), network)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    """A certificate for Wikipedia that only this module trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=*.wikipedia.org", "-addext", "subjectAltName=DNS:*.wikipedia.org"]
    files = (str(folder / "cert.pem"), str(folder / "key.pem"))
    options = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([openssl, *options, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture
def wikipedia_server(certificate, monkeypatch) -> Iterator[FakeMediaWiki]:
    """Wikipedia, as far as name service, routing and certificates can tell."""
    meant = []

    def connect(address, *_, **__):
        meant.append(address)
        connection = socket.socket()
        connection.connect(("127.0.0.1", wiki.port))
        return connection

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 0))]
    with FakeMediaWiki(dict(MILLS), tls=certificate, rights=("", "")) as wiki:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        monkeypatch.setattr(socket, "create_connection", connect)
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        yield wiki
        assert set(meant) == {(PUBLIC, 443)}


def test_address_of_an_article_is_read_from_its_wikipedia(wikipedia_server, network):
    address = "https://de.m.wikipedia.org/wiki/Post_mill"
    (article,) = WikipediaCorpus(CorpusConfig(kind="wikipedia", title=address), network).articles(0, 0)

    assert (article.id, article.source) == ("wikipedia:de:1", "wikipedia:de")
    assert article.licence == "CC BY-SA 4.0"
    assert {request.server_name for request in wikipedia_server.requests} == {"de.wikipedia.org"}
    assert {request.headers["host"] for request in wikipedia_server.requests} == {"de.wikipedia.org"}


def test_wikipedia_is_known_by_its_certificate(wikipedia_server, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")

    with pytest.raises(RemoteError, match="CERTIFICATE_VERIFY_FAILED"):
        WikipediaCorpus(CorpusConfig(kind="wikipedia", title="Mill"), make_network(tmp_path, deadline_s=0.05))
    assert wikipedia_server.requests == []


VALUES = [None, 1, "x", [], {}, [None], {"a": None}, [{"title": 1}], [{"title": "Post mill"}]]
REPLIES = [
    *({key: value} for key in ("query", "continue", "error") for value in VALUES),
    *({"query": {key: value}} for key in ("pages", "normalized", "redirects") for value in VALUES),
    *({"query": {"pages": [{"title": "Post mill", "revisions": value}]}} for value in VALUES),
]


def test_whatever_a_reply_holds_the_error_is_one_with_an_exit_code(mills, tmp_path):
    read(mills, make_network(tmp_path), title="Tower mill")  # what the wiki says of itself is in the cache
    network = make_network(tmp_path, deadline_s=0.05)
    for reply in REPLIES:
        mills.always = fake.body(json.dumps(reply).encode())
        with pytest.raises(AgrlError) as caught:
            read(mills, network, title="Post mill")
        assert caught.value.exit_code in (3, 5), reply
