"""HubCorpus: which rows it reads, in which order, from which place on, and how it refuses the rest."""

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attention_guided_rl.config import CorpusConfig, NetworkConfig, PairsConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.hub import HubCorpus
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.errors import AgrlError, CorpusError, RemoteError, UnsafeError
from attention_guided_rl.network import Network
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Article

LENGTHS = (7, 2500, 1)  # rows of each file
ROW_GROUPS = (3, 700, 1)  # rows of each group: none divides a block of 1,000
TOTAL = sum(LENGTHS)
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "url", "title", "text")])  # as wikimedia/wikipedia


def row(number: int) -> dict[str, str]:
    return {
        "id": str(9 * number),
        "url": f"https://example.org/wiki/Lighthouse_{number}",
        "title": f"Lighthouse {number}",
        "text": f"Lighthouse {number} has {number + 3} steps.\n\nIts keeper counts them twice a day.",
    }


def write(path: Path, rows: list[dict], row_group_size: int = 1000, schema: pa.Schema | None = SCHEMA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


def write_subset(folder: Path) -> Path:
    first = 0
    for file, (length, group) in enumerate(zip(LENGTHS, ROW_GROUPS, strict=True)):
        rows = [row(number) for number in range(first, first + length)]
        write(folder / f"train-{file:05}-of-{len(LENGTHS):05}.parquet", rows, group)
        first += length
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set with one subset, `20231101.xx`, of three files."""
    folder = tmp_path_factory.mktemp("hub") / "lighthouses"
    write_subset(folder / "20231101.xx")
    return folder


@pytest.fixture
def network(tmp_path_factory) -> Network:
    network = Network(NetworkConfig(cache=tmp_path_factory.mktemp("cache"), deadline_s=5.0, backoff_s=0.01))
    network.sleep = lambda seconds: None
    return network


def corpus(name: Path | str, network: Network, **settings) -> HubCorpus:
    return HubCorpus(CorpusConfig(**{"kind": "hub", "name": str(name), "shuffle": False, **settings}), network)


def read(name: Path | str, network: Network, *, epoch: int = 0, start: int = 0, **settings) -> list[Article | None]:
    return list(corpus(name, network, **settings).articles(epoch, start))


def titles(articles: list[Article | None]) -> list[str | None]:
    return [article and article.title for article in articles]


def slow_order(seed: int) -> list[int]:
    """Row numbers by the rule: files permuted, then the rows of each thousand of a file."""

    def permutation(length: int, *coordinates: int) -> list[int]:
        counter = [0, *reversed(coordinates)]
        key = [seed, 6]  # 6: the purpose "shuffle"
        return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(length).tolist()

    first_rows = [0, 7, 2507]
    order = []
    for file in permutation(3, 0, 0, 2):
        rows = list(range(first_rows[file], first_rows[file] + LENGTHS[file]))
        for block in range(len(rows) // 1000 + 1):
            members = rows[1000 * block : 1000 * block + 1000]
            order += [members[i] for i in permutation(len(members), file, block, 1)]
    return order


# -- order and places --------------------------------------------------------------------------------------------------


def test_rows_come_as_they_stand(folder, network):
    articles = read(folder, network, subset="20231101.xx")

    assert titles(articles) == [f"Lighthouse {number}" for number in range(TOTAL)]
    assert articles[1234] == Article(
        id="hub:lighthouses:11106",
        title="Lighthouse 1234",
        text="Lighthouse 1234 has 1237 steps.\n\nIts keeper counts them twice a day.",
        source="hub:lighthouses",
        revision="20231101.xx@local",
        url="https://example.org/wiki/Lighthouse_1234",
        licence="",
    )


@pytest.mark.parametrize("seed", [1, 2, 2**63 - 1])
def test_shuffled_order_is_the_rule(folder, network, seed):
    found = titles(read(folder, network, subset="20231101.xx", shuffle=True, seed=seed))

    assert found == [f"Lighthouse {number}" for number in slow_order(seed)]
    assert sorted(slow_order(seed)) == list(range(TOTAL))


def test_another_seed_is_another_order(folder, network):
    assert len({tuple(slow_order(seed)) for seed in range(5)}) == 5
    one, two = (read(folder, network, subset="20231101.xx", shuffle=True, seed=seed) for seed in (3, 4))
    assert one != two


def test_every_pass_and_every_process_has_the_same_order(folder, network):
    one, two = (corpus(folder, network, subset="20231101.xx", shuffle=True) for _ in range(2))

    assert list(one.articles(0, 0)) == list(two.articles(0, 0)) == list(one.articles(5, 0))


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_start_is_the_tail_of_the_whole(folder, network, shuffle):
    whole = read(folder, network, subset="20231101.xx", shuffle=shuffle)
    reused = corpus(folder, network, subset="20231101.xx", shuffle=shuffle)
    for start in (1, 0, 7, 8, 1000, 1007, 2000, 2500, 2507, 2508, 9999):  # at the edges of files and blocks
        fresh = corpus(folder, network, subset="20231101.xx", shuffle=shuffle)
        assert list(itertools.islice(fresh.articles(0, start), 20)) == whole[start : start + 20]
        if start % 500 == 0:  # until then it has read parts of files, from then on it knows how long they are
            assert list(reused.articles(0, start)) == whole[start:]


def test_what_is_before_the_start_is_not_read(tmp_path, network, monkeypatch):
    batches, num_rows = pq.ParquetFile.iter_batches, 0

    def iter_batches(*arguments, **options) -> Iterator[pa.RecordBatch]:
        nonlocal num_rows
        for batch in batches(*arguments, **options):
            num_rows += batch.num_rows
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    for file, numbers in enumerate((range(3000), range(3000, 6000))):
        write(tmp_path / f"train-{file}.parquet", [row(number) for number in numbers], 500)
    (last,) = read(tmp_path, network, start=5999)

    assert last.title == "Lighthouse 5999"
    assert num_rows == 1000


def test_second_and_third_resume_go_on_where_the_one_before_stopped(folder, network):
    whole = read(folder, network, subset="20231101.xx", shuffle=True)
    place, pieces = 0, []
    for length in (300, 1100, 5, 1103):
        again = corpus(folder, network, subset="20231101.xx", shuffle=True).articles(0, place)
        pieces += [next(again) for _ in range(length)]
        place += length

    assert pieces == whole
    assert place == TOTAL


def test_blocks_do_not_depend_on_row_groups(tmp_path, network):
    rows = [row(number) for number in range(2100)]
    found = []
    for group in (17, 1000, 1001):
        write(tmp_path / f"by {group}" / "train.parquet", rows, group)
        found.append(titles(read(tmp_path / f"by {group}", network, shuffle=True)))
        assert titles(read(tmp_path / f"by {group}", network, shuffle=True, start=2050)) == found[-1][2050:]

    assert all(order == found[0] for order in found)
    assert len(set(found[0])) == 2100


def test_jsonl_is_read_by_the_same_rule(folder, tmp_path, network):
    for file, path in enumerate(sorted((folder / "20231101.xx").iterdir())):
        rows = [json.dumps(cells) for cells in pq.read_table(path).to_pylist()]
        (tmp_path / f"train-{file}.jsonl").write_text("\n".join(rows))
    order = [f"Lighthouse {number}" for number in slow_order(1)]

    assert titles(read(tmp_path, network, shuffle=True)) == order
    assert titles(read(tmp_path, network, shuffle=True, start=1500)) == order[1500:]


def test_pools_go_on_at_their_position(folder, network):
    def stream() -> PoolStream:
        config = PairsConfig(num_pairs=2, key_tokens=3, value_tokens=4)
        source: Corpus = corpus(folder, network, subset="20231101.xx", shuffle=True)
        return PoolStream(
            source, lambda text: [ord(c) for c in text], config, num_pairs=2, num_probes=1, seed=0, purpose=Purpose.POOL
        )

    before = stream()
    before.next_pool(1100)
    wanted = [before.position, before.next_pool(30).pair_ids, before.position, before.next_pool(30).pair_ids]
    for position, pairs in (wanted[:2], wanted[2:]):
        after = stream()
        after.resume(position)
        assert after.next_pool(30).pair_ids == pairs


@pytest.mark.parametrize("row_group_size", [1000, 100_000])
def test_memory_stays_flat(tmp_path, network, row_group_size):
    rows = [{**row(number), "text": f"{number} " * 300} for number in range(10_000)]  # 15 MB of text
    write(tmp_path / "train.parquet", rows, row_group_size)
    del rows
    start, peak = pa.total_allocated_bytes(), 0
    for place, _ in enumerate(corpus(tmp_path, network, shuffle=True).articles(0, 0)):
        if place % 1000 == 0:
            time.sleep(0.01)  # what is read ahead is read while others work
            peak = max(peak, pa.total_allocated_bytes() - start)

    assert peak < 10e6


# -- what a row becomes ------------------------------------------------------------------------------------------------


def test_other_columns_and_missing_ones(tmp_path, network):
    schema = pa.schema([("body", pa.large_string()), ("id", pa.int64()), ("other", pa.float64())])
    rows = [{"body": "One.", "id": 7, "other": 0.5}, {"body": "Two.", "id": None, "other": None}]
    write(tmp_path / "notes" / "train.parquet", rows, schema=schema)
    one, two = read(tmp_path / "notes", network, text_column="body")

    assert (one.id, one.title, one.text, one.url) == ("hub:notes:7", "row 0 of file 0", "One.", "")
    assert (two.id, two.title, two.revision) == ("hub:notes:0-1", "row 1 of file 0", "default@local")


def test_names_of_rows_do_not_depend_on_the_order(tmp_path, network):
    for file in range(2):
        write(tmp_path / f"train-{file}.parquet", [{"text": f"{file}, {i}"} for i in range(4)], schema=None)
    straight = {article.text: article for article in read(tmp_path, network)}
    mixed = {article.text: article for article in read(tmp_path, network, shuffle=True, seed=5)}

    assert straight == mixed
    assert straight["1, 2"].title == "row 2 of file 1"
    assert len({article.id for article in straight.values()}) == 8


def test_rows_without_text_are_empty_places_and_reported_once(tmp_path, network, caplog):
    texts = ["First.", None, "", " \n", "\x00", "Last."]
    write(tmp_path / "d" / "train.parquet", [{**row(i), "text": text} for i, text in enumerate(texts)])
    reader = corpus(tmp_path / "d", network)
    with caplog.at_level(logging.WARNING):
        articles = list(reader.articles(0, 0))

    assert titles(articles) == ["Lighthouse 0", None, None, None, None, "Lighthouse 5"]
    assert reader.num_empty == 4
    assert len(caplog.messages) == 1
    assert "without text" in caplog.messages[0]


def test_what_cannot_be_tokenised_goes(tmp_path, network):
    text = pa.array([b"A\x00n a\xed\xa0\x80nt\r\nwalks.\xff"]).cast(pa.string(), safe=False).view(pa.string())
    table = pa.table({"title": ["The\x00 \n ant"], "text": text})
    pq.write_table(table, tmp_path / "train.parquet")

    assert [(a.title, a.text) for a in read(tmp_path, network)] == [("The ant", "An ant\nwalks.")]


def test_one_title_is_read_again_and_again(folder, network):
    reader = corpus(folder, network, subset="20231101.xx", title="Lighthouse 2400", shuffle=True)

    assert titles(list(reader.articles(0, 0))) == titles(list(reader.articles(1, 0))) == ["Lighthouse 2400"]
    assert list(reader.articles(0, 1)) == []


def test_unknown_title_names_the_nearest(folder, network):
    with pytest.raises(CorpusError, match=r"no article 'Lighthouse 12345'.*; nearest: 'Lighthouse 2345', "):
        read(folder, network, subset="20231101.xx", title="Lighthouse 12345")
    with pytest.raises(CorpusError, match=r"no article 'xyz'.*; none is near it"):
        read(folder, network, subset="20231101.xx", title="xyz")


# -- folders -----------------------------------------------------------------------------------------------------------

CARD = """---
license: [cc-by-sa-4.0, gfdl]
configs:
- config_name: far
  data_files: {0}
- config_name: near
  data_files:
  - split: train
    path: two/*
---
About towers.
"""


def test_the_card_names_subsets_and_licence(tmp_path, network, monkeypatch):
    write(tmp_path / "towers" / "one" / "a.parquet", [row(1)])
    write(tmp_path / "towers" / "two" / "b.parquet", [row(2)])
    (tmp_path / "towers" / "README.md").write_text(CARD.format("one/*"))
    monkeypatch.chdir(tmp_path)
    for subset, number in (("far", 1), ("near", 2), ("one", 1)):  # the last is a folder that the card does not name
        (article,) = read("towers", network, subset=subset)
        assert article.title == f"Lighthouse {number}"
        assert article.licence == "cc-by-sa-4.0, gfdl"
        assert article.revision == f"{subset}@local"


@pytest.mark.parametrize("elsewhere", ["/etc/*", "../*", "https://example.org/a.parquet", "zip://*::a.zip", "~/*"])
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_files_elsewhere_is_refused(tmp_path, network, no_sockets, elsewhere, name):
    write(tmp_path / "train.parquet", [row(1)])
    card = CARD.format(elsewhere)
    (tmp_path / name).write_text(card if name == "README.md" else card.split("---")[1])

    with pytest.raises(UnsafeError, match="names files elsewhere"):
        read(tmp_path, network, subset="near")


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_inside_a_subset_is_looked_at_too(tmp_path, network, no_sockets, name):
    """The library follows it, to any file of this machine."""
    write(tmp_path / "towers" / "one" / "train.parquet", [row(1)])
    write(tmp_path / "diary.parquet", [row(2)])
    card = CARD.format(tmp_path / "diary.parquet")
    (tmp_path / "towers" / "one" / name).write_text(card if name == "README.md" else card.split("---")[1])

    with pytest.raises(UnsafeError, match="names files elsewhere"):
        read(tmp_path / "towers", network, subset="one")


def no_file(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    return {}


def no_usable_file(folder: Path) -> dict:
    (folder / "a.exe").write_bytes(b"1")
    return {}


def no_subset(folder: Path) -> dict:
    write(folder / "train.parquet", [row(1)])
    return {"subset": "nowhere"}


def no_named_subset(folder: Path) -> dict:
    write(folder / "one" / "a.parquet", [row(1)])
    (folder / "README.md").write_text(CARD.format("one/*"))
    return {"subset": "fart"}


def several_subsets(folder: Path) -> dict:
    return {**no_named_subset(folder), "subset": None}


def no_split(folder: Path) -> dict:
    write(folder / "test.parquet", [row(1)])
    return {}


def no_column(folder: Path) -> dict:
    write(folder / "train.parquet", [row(1)])
    return {"text_column": "body"}


def no_column_in_jsonl(folder: Path) -> dict:
    (folder / "train.jsonl").write_text('{"title": "a", "body": "b"}')
    return {}


def column_of_numbers(folder: Path) -> dict:
    write(folder / "train.parquet", [{"text": 7}], schema=None)
    return {}


def damaged_from_the_beginning(folder: Path) -> dict:
    write(folder / "train-0.parquet", [row(1)])
    (folder / "train-1.parquet").write_bytes(b"PAR1 and nothing that follows")
    return {}


def damaged_first(folder: Path) -> dict:
    (folder / "train-0.parquet").write_bytes(b"no Parquet at all")
    write(folder / "train-1.parquet", [row(1)])
    return {}


def damaged_inside(folder: Path) -> dict:
    path = write(folder / "train.parquet", [row(number) for number in range(3000)], 500)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    return {}


def other_columns_in_the_second(folder: Path) -> dict:
    write(folder / "train-0.parquet", [row(1)])
    write(folder / "train-1.parquet", [{"words": "no"}], schema=None)
    return {}


def broken_card(folder: Path) -> dict:
    write(folder / "train.parquet", [row(1)])
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    return {}


REFUSED = {
    no_file: "cannot be read as a data set",
    no_usable_file: "cannot be read as a data set",
    no_subset: "no subset 'nowhere'",
    no_named_subset: "no subset 'fart'; set corpus.subset to another, such as far",
    several_subsets: "it has several subsets; set corpus.subset to one, such as far, near",
    no_split: "no split 'train', only test",
    no_column: "no column 'body'; set corpus.text_column to one of id, url, title, text",
    no_column_in_jsonl: "no column 'text'; set corpus.text_column to one of title, body",
    column_of_numbers: "column 'text' holds int64, not text",
    damaged_from_the_beginning: "train-1.parquet: cannot be read",
    damaged_first: "train-0.parquet: cannot be read",
    damaged_inside: "train.parquet: cannot be read",
    other_columns_in_the_second: "train-1.parquet: no column 'text'",
    broken_card: "cannot be read as a data set",
}


@pytest.mark.parametrize(("make", "message"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unusable_folder_is_refused_in_one_line(tmp_path, network, make, message):
    (tmp_path / "d").mkdir()
    with pytest.raises(AgrlError) as caught:
        read(tmp_path / "d", network, **make(tmp_path / "d"))

    assert caught.value.exit_code == 3
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_loading_script_is_refused(tmp_path, network):
    write(tmp_path / "towers" / "train.parquet", [row(1)])
    (tmp_path / "towers" / "towers.py").write_text("raise SystemExit")

    with pytest.raises(UnsafeError, match="needs code from its repository"):
        read(tmp_path / "towers", network)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere.parquet"])
def test_a_missing_folder_is_not_looked_for_elsewhere(tmp_path, network, no_sockets, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.parquet").write_bytes(b"")
    with pytest.raises(CorpusError, match="there is no folder"):
        read(name, network)


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*arguments: object):
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def offline(tmp_path_factory) -> Network:
    return Network(NetworkConfig(offline=True, cache=tmp_path_factory.mktemp("cache")))


SHA = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The hub's own cache, as `hf download` leaves it: the subset `two` of two data sets, and the card of another."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone--towers", "someone--bridges", "wikimedia--wikipedia"):
        repository = tmp_path / f"datasets--{name}"
        snapshot = repository / "snapshots" / SHA
        (snapshot / "two").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(SHA)
        if name != "wikimedia--wikipedia":
            (snapshot / "README.md").write_text(CARD.format("one/*"))
        if name != "someone--bridges":
            write(repository / "blobs" / "b10b", [row(3), row(4)])
            (snapshot / "two" / "train.parquet").symlink_to("../../../blobs/b10b")
    return tmp_path


def test_a_folder_is_read_without_a_connection(folder, offline, no_sockets):
    assert len(read(folder, offline, subset="20231101.xx")) == TOTAL


def test_the_cache_is_read_without_a_connection(hub_cache, offline, no_sockets):
    articles = read("someone/towers", offline, subset="two")

    assert [article.id for article in articles] == ["hub:someone/towers:27", "hub:someone/towers:36"]
    assert articles[0].revision == "two@0123456789ab"
    assert articles[0].source == "hub:someone/towers"


def test_the_licence_of_wikipedia_is_known_without_its_card(hub_cache, offline, no_sockets):
    assert read("wikimedia/wikipedia", offline, subset="two")[0].licence == "CC BY-SA 3.0, GFDL"


@pytest.mark.parametrize("name", ["someone/else", "someone/bridges", "json"])
def test_what_is_not_in_the_cache_needs_a_connection(hub_cache, offline, no_sockets, name):
    with pytest.raises(RemoteError, match=rf"data set {name}.* is not in the cache, and --offline"):
        read(name, offline)


@pytest.fixture
def breaking_off(monkeypatch):
    """Return what lets reading break off each time that so many rows in all have come."""

    def install(error: Exception, after: list[int]) -> None:
        batches, left, num_rows = pq.ParquetFile.iter_batches, [*after], 0

        def iter_batches(*arguments, **options) -> Iterator[pa.RecordBatch]:
            nonlocal num_rows
            for batch in batches(*arguments, **options):
                if left and num_rows >= left[0]:
                    del left[0]
                    raise error
                num_rows += batch.num_rows
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)

    return install


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (ConnectionError("Server Disconnected"), [0, 0, 0]),
        (TimeoutError("read timed out"), [1, 8, 900]),
        (httpx2.ReadError("reset by peer"), [1008, 1500, 1500, 2500]),
    ],
)
def test_a_lost_connection_is_taken_up_where_it_was(folder, network, breaking_off, error, after):
    waits: list[float] = []
    network.sleep = waits.append
    whole = read(folder, network, subset="20231101.xx", shuffle=True)
    breaking_off(error, after)

    assert read(folder, network, subset="20231101.xx", shuffle=True) == whole
    assert len(waits) == len(after)


def test_a_connection_that_stays_lost_ends_the_run(folder, network, monkeypatch, breaking_off):
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))  # the deadline is 5 s
    breaking_off(ConnectionError("Server Disconnected"), [1007] * 10_000)
    reader = corpus(folder, network, subset="20231101.xx").articles(0, 0)

    assert titles([next(reader) for _ in range(1007)])[-1] == "Lighthouse 1006"
    with pytest.raises(RemoteError, match=r"train-00001-of-00003\.parquet: gave up after .* Server Disconnected"):
        next(reader)


def test_files_that_the_library_reads_are_taken_up_as_well(folder, tmp_path, network, monkeypatch):
    import datasets

    rows = [json.dumps(row(number)) for number in range(2500)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    batches, left = datasets.IterableDataset.iter, [2]

    def iterate(dataset, batch_size: int) -> Iterator[pa.Table]:
        for number, batch in enumerate(batches(dataset, batch_size=batch_size)):
            if number == 1 and left[0]:
                left[0] -= 1
                raise ConnectionError("Server Disconnected")
            yield batch

    monkeypatch.setattr(datasets.IterableDataset, "iter", iterate)
    assert titles(read(tmp_path, network)) == [f"Lighthouse {number}" for number in range(2500)]
    assert left == [0]


COMMIT = "feedface" * 5
HUB_CARD = f"""---
license: cc0-1.0
configs:
- config_name: xx
  data_files: xx/train-*
- config_name: yy
  data_files: yy/train-*
---
{"A card. " * 10}
"""


class FakeHub(BaseHTTPRequestHandler):
    """What the library asks of the hub, for the data set someone/lighthouses and some that cannot be had."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        paths = json.loads(body)["paths"] if body.startswith(b"{") else []
        self.send(200, json.dumps([entry for entry in self.entries() if entry["path"] in paths]).encode())

    def entries(self) -> list[dict]:
        found = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "xx"}]
        for path in sorted(self.folder.rglob("*.*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file():
                found.append({"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": name})
        return found

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if "gated" in parts:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "refused" in parts:
            self.send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif "lighthouses" not in parts and "script" not in parts:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "v9" in parts:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif parts[:2] == ["api", "datasets"] and "tree" in parts:
            inside = path.partition(f"/tree/{COMMIT}")[2].strip("/")
            found = [entry for entry in self.entries() if entry["path"].rpartition("/")[0].startswith(inside)]
            self.send(200, json.dumps(found).encode())
        elif parts[:2] == ["api", "datasets"]:
            self.send(200, json.dumps({"id": "someone/lighthouses", "sha": COMMIT}).encode())
        else:
            self.send_file(path.partition("/resolve/")[2].partition("/")[2])

    def send_file(self, name: str) -> None:
        file = self.folder / name
        if not file.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, about = file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": '"e7a6"'}
        asked = self.headers.get("Range")
        if asked is None:
            self.send(200, data, about)
            return
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        last = min(last, len(data) - 1)
        about["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, data[first : last + 1], about)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


ASK = """
import dataclasses, json, sys
from pathlib import Path
from attention_guided_rl.config import CorpusConfig, NetworkConfig
from attention_guided_rl.data.hub import HubCorpus
from attention_guided_rl.errors import AgrlError
from attention_guided_rl.network import Network

network = Network(NetworkConfig(cache=Path(sys.argv[1])))
for settings in json.loads(sys.argv[2]):
    start = settings.pop("start", 0)
    try:
        reader = HubCorpus(CorpusConfig(kind="hub", **settings), network)
        found = [dataclasses.asdict(article) for article in reader.articles(0, start)]
    except AgrlError as error:
        found = [error.exit_code, str(error)]
    print(json.dumps(found))
"""


def test_the_hub(folder, tmp_path, network):
    hub = tmp_path / "hub"
    write_subset(hub / "xx")
    (hub / "README.md").write_text(HUB_CARD)
    (hub / "script.py").write_text("raise SystemExit")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"folder": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lighthouses = {"name": "someone/lighthouses", "subset": "xx"}
    questions = [
        lighthouses,
        {**lighthouses, "start": 1500},
        {**lighthouses, "subset": "zz"},
        {**lighthouses, "revision": "v9"},
        {"name": "someone/nowhere"},
        {"name": "someone/gated"},
        {"name": "someone/refused"},
        {"name": "someone/script"},
        {"name": "not a name"},
    ]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK, str(tmp_path / "cache"), json.dumps(questions)],
        env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    whole, tail, *refused = map(json.loads, result.stdout.splitlines())

    local = read(folder, network, subset="20231101.xx", shuffle=True)
    assert [article["text"] for article in whole] == [article.text for article in local]
    assert whole[0]["revision"] == "xx@feedfacefeed"
    assert whole[0]["licence"] == "cc0-1.0"
    assert whole[0]["source"] == "hub:someone/lighthouses"
    assert tail == whole[1500:]
    assert [code for code, _ in refused] == [3, 3, 3, 4, 4, 13, 3]
    words = ["subset 'zz'", "revision 'v9'", "no data set", "is gated", "refuses access", "needs code", "no data set"]
    for (_, message), expected in zip(refused, words, strict=True):
        assert expected in message
        assert "\n" not in message
