"""The original experiment end to end: articles from a MediaWiki and vectors from a service, both on this machine."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from accelerate import PartialState
from fake_embeddings import KEY, TRANSIENT, EmbeddingServer, Request
from fake_mediawiki import FakeMediaWiki, Page, reset, status
from pyarrow import parquet
from transformers import LlamaConfig, LlamaForCausalLM
from verified import main

from attention_guided_rl import runs
from attention_guided_rl.arms import run_arms
from attention_guided_rl.config_files import load_config
from attention_guided_rl.embedders.text import CANARIES
from attention_guided_rl.evaluation import evaluation_records
from attention_guided_rl.summary import summarise

UPDATES = 3
SMALL = (
    *("--model.dtype", "float32", "--model.lora-rank", "2", "--training.device", "cpu"),
    *("--rollout.context-tokens", "520", "--rollout.query-tokens", "4", "--training.updates", str(UPDATES)),
    *("--pairs.key-tokens", "24", "--pairs.value-tokens", "24", "--selection.calibration-queries", "4"),
    *("--objective.filter.warmup", "2", "--objective.filter.min-zscore", "-1", "--optimizer.learning-rate", "1e-2"),
    *(
        "--evaluation.articles",
        "1",
        "--evaluation.oracle",
        "false",
        "--log.trajectories-every",
        "1",
        "--network.backoff-s",
        "0.001",
    ),
)
TEXT = "\n\n".join(
    f"'''Elmbrook''' has {n} mills{{{{ref|{n}}}}} on the [[river]] road. The miller of number {n} grinds oats and rye."
    for n in range(2, 6)
)


class Quiet(EmbeddingServer):
    """The service without noise, so that two runs can be compared bit for bit; it can be stopped at a text."""

    held: frozenset[str] = frozenset()
    """Who asks for one of these texts gets no answer until `go`."""

    def noise(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        if self.held & set(self.requests[number].texts):
            self.reached.set()
            self.go.wait(60)
        return np.zeros(shape)

    def reset(self) -> None:
        self.key, self.faults, self.probability, self.seed, self.script = KEY, TRANSIENT, 0.0, 0, []
        self.requests, self.billed_tokens, self.billed_usd, self.hang_s = [], 0, 0.0, 0.6
        self.held, self.reached, self.go = frozenset(), threading.Event(), threading.Event()


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, chat_tokenizer) -> Path:
    """A Llama-shaped model with a chat template that prints a date and trims contents."""
    folder = tmp_path_factory.mktemp("chat-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer) + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers():
    pages = {"Elmbrook": Page(TEXT, revision=77), "Elm Brook": Page(redirect="Elmbrook")}
    with FakeMediaWiki(pages) as wiki, Quiet() as service:
        yield wiki, service


@pytest.fixture
def wiki(servers):
    servers[0].requests.clear()
    servers[0].faults[:] = []
    return servers[0]


@pytest.fixture
def service(servers, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers[1].reset()
    return servers[1]


@pytest.fixture(scope="module")
def arguments(chat_model, servers):
    """Return the command `agrl train` with the preset `original`: name, cache, further arguments."""

    def make(name: str, cache: Path, *more: str) -> list[str]:
        return [
            *("train", "--preset", "original", "--run", name, "--corpus.title", "Elm Brook", *SMALL),
            *("--model.name", str(chat_model), "--corpus.site", servers[0].url, "--embedder.base-url", servers[1].url),
            *("--network.cache", str(cache), "--corpus.requests-per-second", "100", *more),
        ]

    return make


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed, and all that it asked."""

    folder: Path
    cache: Path
    requests: list[Request]
    num_pages: int


@pytest.fixture(scope="module")
def whole(arguments, servers, tmp_path_factory) -> Whole:
    wiki, service = servers
    folder = tmp_path_factory.mktemp("whole")
    service.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert main(arguments("whole", folder / "cache", "--runs-folder", str(folder))) == 0
    return Whole(folder / "whole", folder / "cache", list(service.requests), len(wiki.requests))


@pytest.fixture
def agrl(arguments, whole, wiki, service, tmp_path, monkeypatch, capfd):
    """Return what runs that command here: name, cache, further arguments; its exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def train(name: str, cache: Path | str, *more: str) -> tuple[int, str]:
        code = main(arguments(name, tmp_path / cache, *more))
        out, err = capfd.readouterr()
        return code, out + err

    return train


def forked(arguments: list[str], **environment: str) -> int:
    """Start the command in a copy of this process, which has imported everything; return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the server's threads stay behind, where they are wanted
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update(environment, OMP_NUM_THREADS="1")  # or the processes fight for the cores
        PartialState._reset_state()
        code = main(arguments)
    finally:
        os._exit(code)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(run: Path) -> tuple:
    """All that a run computed, down to the bits of its weights; only the clock is left out."""
    metrics = [
        {k: v for k, v in record.items() if not k.startswith("time/")} for record in lines(run / "metrics.jsonl")
    ]
    weights = sorted(run.glob(f"checkpoints/update-{UPDATES:06d}/adapter/*.safetensors"))
    return (
        metrics,
        (run / "trajectories.jsonl").read_bytes(),
        (run / "pairs.jsonl").read_bytes(),
        (run / "evaluation.jsonl").read_bytes(),
        [path.read_bytes() for path in weights],
    )


def test_the_original_experiment_over_loopback_services(agrl, whole, wiki, service, tmp_path):
    run, first = whole.folder, whole.requests
    pairs, trajectories = lines(run / "pairs.jsonl"), lines(run / "trajectories.jsonl")

    keys = [pair["key"] for pair in pairs]
    assert keys[0] == " Elmbrook has 2 mills on"  # 24 bytes of the first sentence, its markup gone
    assert {pair["revision"] for pair in pairs} == {"77"}
    assert {pair["title"] for pair in pairs} == {"Elmbrook"}  # behind the redirect
    training = [t for t in trajectories if t["phase"] == "train"]
    assert [t["update"] for t in training] == list(range(1, UPDATES + 1))
    steps = len(training[0]["picks"])
    assert steps == len(pairs) >= 4
    assert all(sorted(t["picks"]) == list(range(steps)) for t in training)
    assert "01 Jan 2026" in (run / "prompt.txt").read_text(encoding="utf-8")
    assert "Elmbrook (wikipedia:127.0.0.1" in (run / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "revision 77" in (run / "ATTRIBUTION.md").read_text(encoding="utf-8")

    texts = [text for request in first for text in request.texts]
    assert len(texts) == len(set(texts))  # nothing was asked for twice
    assert {query for t in training for query in t["queries"] if query.strip()} <= set(texts)
    assert set(keys) <= set(texts)
    one_a_step = UPDATES * steps + 6 * steps  # five arms write queries, and nearest_key looks up values besides
    assert len(first) <= 1 + 2 + one_a_step  # and canaries, keys, calibration

    assert whole.num_pages > 0
    assert agrl("b", whole.cache)[0] == 0
    assert wiki.requests == []
    again = [request.texts for request in service.requests]
    assert again == [first[0].texts]  # the canaries, asked for at every start
    assert outcome(tmp_path / "runs" / "b") == outcome(run)

    assert agrl("c", whole.cache, "--offline", "--training.updates", "1", "--evaluation.articles", "0")[0] == 0
    assert len(service.requests) == 1
    assert lines(tmp_path / "runs" / "c" / "trajectories.jsonl") == training[:1]


def split_by_hand(title: str) -> str:
    share = int(hashlib.sha256(title.lower().encode()).hexdigest()[:16], 16) / 2**64
    return "train" if share < 0.9 else "dev" if share < 0.95 else "test"


def test_the_preset_wikipedia_trains_on_one_split_of_a_stream_and_is_measured_on_another(
    chat_model, service, tmp_path, monkeypatch
):
    """Parquet files as of wikimedia/wikipedia, the model with a chat template, and the service over HTTP."""
    titles = [f"Mill {number}" for number in range(60)]
    (tmp_path / "wikipedia" / "20231101.en").mkdir(parents=True)
    words = ["grinds", "oats", "and", "rye", "on", "the", "river", "road", "near", "the", "old", "stone", "bridge"]
    table = pyarrow.table(
        {
            "id": [str(number) for number in range(60)],
            "url": [f"https://en.wikipedia.org/wiki/Mill_{number}" for number in range(60)],
            "title": titles,
            "text": [" ".join(f"{words[i % 13]} {title[5:]}.{i}" for i in range(30)) for title in titles],
        }
    )
    parquet.write_table(table, tmp_path / "wikipedia" / "20231101.en" / "train-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    sizes = {
        "model.name": chat_model,
        "model.dtype": "float32",
        "model.lora-rank": 2,
        "training.device": "cpu",
        "corpus.name": "wikipedia",
        "evaluation.corpus.name": "wikipedia",
        "training.updates": 2,
        "pairs.num-pairs": 5,
        "pairs.key-tokens": 12,
        "pairs.value-tokens": 12,
        "rollout.query-tokens": 4,
        "rollout.articles": 2,
        "rollout.trajectories": 2,
        "rollout.steps": 3,
        "evaluation.articles": 1,
        "evaluation.num-probes": 1,
        "evaluation.oracle": "false",
        "selection.calibration-queries": 4,
        "embedder.base-url": service.url,
        "network.cache": "cache",
        "log.trajectories-every": 1,
    }
    command = ["train", "--preset", "wikipedia", *(str(part) for k, v in sizes.items() for part in (f"--{k}", v))]
    assert main([*command, "--run", "a"]) == 0

    title_of = {pair["pair"]: pair["title"] for pair in lines(tmp_path / "runs" / "a" / "pairs.jsonl")}
    read = {"train": set(), "evaluation": set()}
    for t in lines(tmp_path / "runs" / "a" / "trajectories.jsonl"):
        read[t["phase"]] |= {title_of[pair] for pair in t["pairs"]}
    assert {split_by_hand(title) for title in read["train"]} == {"train"}
    assert {split_by_hand(title) for title in read["evaluation"]} == {"dev"}
    assert len(read["train"]) == 4
    assert "https://en.wikipedia.org/wiki/Mill_" in (tmp_path / "runs" / "a" / "ATTRIBUTION.md").read_text()
    texts = [text for request in service.requests for text in request.texts]
    assert len(texts) == len(set(texts))


def test_faults_of_both_services_change_no_bit_and_the_cap_holds(agrl, whole, wiki, service, tmp_path):
    batches = len(whole.requests)
    service.probability, service.seed = 0.3, 6
    wiki.faults[:] = [status(503), None, reset]
    code, shown = agrl(
        *("faulty", "cache-2", "--network.timeout-s", "0.3", "--embedder.usd-per-million-tokens", "0.1"),
        *("--embedder.max-usd", "0.05"),
    )
    assert code == 0, shown
    assert outcome(tmp_path / "runs" / "faulty") == outcome(whole.folder)
    assert len(service.requests) <= 1.6 * batches
    assert sum(request.fault is not None for request in service.requests) > 0.2 * batches
    spent = float(re.search(r"embeddings of this run: ([\d.]+) USD", shown)[1])
    assert service.billed_usd <= spent <= 0.05


def test_a_cap_stops_the_run_before_it_is_passed_and_raising_it_goes_on(agrl, whole, service, tmp_path):
    service.faults, service.probability = ("no_usage",), 1.0  # so that a byte counts as a token
    price = ("--embedder.usd-per-million-tokens", "0.1", "--training.checkpoint-every", "1")
    code, shown = agrl("capped", "cache-2", *price, "--embedder.max-usd", "0.00014")
    assert code == 6, shown
    assert "embedder.max_usd" in shown.splitlines()[-1]
    assert 0 < service.billed_usd <= 0.00014
    assert "agrl train --run capped --resume" in shown
    code = main(["train", "--run", "capped", "--resume", "--embedder.max-usd", "1"])
    assert code == 0
    assert outcome(tmp_path / "runs" / "capped") == outcome(whole.folder)


def test_the_cap_holds_over_caches_and_a_new_run_of_the_same_name_has_its_own(service, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    small = ("--rollout.articles", "1", "--rollout.trajectories", "2", "--rollout.steps", "2", "--pairs.num-pairs", "4")
    sizes = ("--selection.temperature", "0.1", "--evaluation.articles", "0", "--training.device", "cpu")
    price = ("--embedder.usd-per-million-tokens", "1000", "--embedder.max-usd", "2", "--network.cache", "one")
    embedder = ("--embedder.kind", "openai", "--embedder.base-url", service.url, *price)
    first = ["train", "--preset", "demo", *small, *sizes, *embedder, "--training.updates", "1", "--run", "a"]
    again = ["train", "--run", "a", "--resume", "--training.updates", "2"]

    def spent(command: list[str]) -> tuple[float, float]:
        """What a run says it has spent, and what was billed meanwhile."""
        before = service.billed_tokens
        assert main(command) == 0
        said = float(re.search(r"embeddings of this run: ([\d.]+) USD", capfd.readouterr().out)[1])
        return said, pytest.approx((service.billed_tokens - before) / 1000)

    said, billed = spent(first)
    assert said == billed
    before = len(service.requests)
    assert main([*again, "--network.cache", "two"]) == 2
    assert "network.cache: two does not know what this run has spent" in capfd.readouterr().err
    assert main(["evaluate", "runs/a", "--network.cache", "two"]) == 2
    assert len(service.requests) == before
    more, billed_more = spent(again)
    assert more - said == billed_more
    shutil.rmtree("runs/a")
    said, billed = spent([*first, "--training.seed", "7"])
    assert said == billed


def test_a_run_that_is_killed_while_it_waits_for_vectors_goes_on_as_if_nothing_had_happened(
    agrl, arguments, whole, service, tmp_path, capfd
):
    """Killed twice, in training and in evaluation, each time with a request under way, which is then answered."""
    written = lines(whole.folder / "trajectories.jsonl")
    training = {query for t in written if t.get("update") == 2 and t["phase"] == "train" for query in t["queries"]}
    evaluation = {query for t in written if t["phase"] == "evaluation" for query in t["queries"]}
    known = {query for t in written if t["phase"] == "train" for query in t["queries"]}
    price = ("--embedder.usd-per-million-tokens", "0.1", "--embedder.max-usd", "0.01")
    command = arguments("killed", tmp_path / "cache", *price, "--training.checkpoint-every", "1")
    resume = ["train", "--run", "killed", "--resume"]
    under_way = []
    for held in (training, evaluation - known):
        service.held, service.reached, service.go = frozenset(held), threading.Event(), threading.Event()
        child = forked(command)
        assert service.reached.wait(60)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        under_way += service.requests[-1].texts
        service.held = frozenset()
        service.go.set()
        command = resume
    began = time.monotonic()
    assert main(resume) == 0
    assert time.monotonic() - began < 20  # a claim lasts 20 minutes, if its owner lives
    shown = capfd.readouterr().out
    assert outcome(tmp_path / "runs" / "killed") == outcome(whole.folder)
    asked = Counter(text for request in service.requests for text in request.texts if text not in CANARIES)
    assert {text for text, times in asked.items() if times > 1} == set(under_way)
    assert max(asked.values()) == 2
    assert set(asked) == {text for request in whole.requests for text in request.texts} - set(CANARIES)
    spent = float(re.search(r"embeddings of this run: ([\d.]+) USD", shown)[1])
    assert 0 < service.billed_usd <= spent <= 0.01


TWO_ARTICLES = ("--rollout.articles", "2", "--evaluation.articles", "0", "--training.updates", "2")


def together(*commands: list[str]) -> list[int]:
    """Run a command in each of several processes of one run; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = [forked(command, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank, command in enumerate(commands)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.timeout(60)
def test_two_processes_share_what_they_fetch_and_read_as_one_and_one_s_failure_ends_both(
    agrl, arguments, wiki, service, tmp_path, monkeypatch, capfd
):
    command = arguments("two", tmp_path / "cache-2", *TWO_ARTICLES)
    assert together(command, command) == [0, 0]
    texts = [text for request in service.requests for text in request.texts]
    assert len(texts) == len(set(texts))
    assert len(wiki.requests) == len({json.dumps(request.query) for request in wiki.requests})
    assert agrl("one", "cache-1", *TWO_ARTICLES)[0] == 0
    one, two = (lines(tmp_path / "runs" / name / "trajectories.jsonl") for name in ("one", "two"))
    assert [(t["ids"], t["picks"]) for t in one] == [(t["ids"], t["picks"]) for t in two]

    (tmp_path / "file").touch()
    begin = arguments("three", tmp_path / "cache-2", *TWO_ARTICLES)
    assert together(begin, [*begin, "--network.cache", str(tmp_path / "file" / "cache")]) == [8, 8]
    said = "".join(capfd.readouterr())
    assert said.count("network.cache: cannot make") == 2
    assert "process 1: network.cache" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs" / "three").exists()

    shutil.copytree(tmp_path / "cache-2", tmp_path / "other", ignore=shutil.ignore_patterns("wikipedia", "*.owners"))
    monkeypatch.setitem(wiki.pages, "Elmbrook", Page(TEXT, revision=78))
    resume = ["train", "--run", "two", "--resume", "--training.updates", "3"]
    assert together(resume, [*resume, "--network.cache", str(tmp_path / "other")]) == [7, 7]
    said = "".join(capfd.readouterr())
    assert said.count("the corpus has changed") == 2
    assert "process 1: the corpus has changed" in said
    assert "Traceback" not in said


def test_no_key_is_in_any_file_or_on_the_screen(agrl, service, tmp_path):
    service.key = "another"  # refused, with the whole key in the message
    code, refused = agrl("bad", "cache")
    assert code == 4
    assert KEY not in refused
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_refused_key_is_noticed_before_the_model_loads(agrl, service, tmp_path):
    service.key = "another"
    shown = agrl("a", "cache", "--model.revision", "x")[1]
    assert "OPENAI_API_KEY" in shown.splitlines()[-1]
    assert len(service.requests) == 1
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_what_would_be_sent_and_sends_nothing(agrl, service):
    price = ("--embedder.usd-per-million-tokens", "1000")
    code, shown = agrl("a", "cache", "--dry-run", *price, "--evaluation.articles", "0")
    assert code == 0
    assert service.requests == []
    row = re.search(r"queries of the training +(\d+) +([\d,]+) +3 updates × 1 rows × (\d+) steps × 4 tokens", shown)
    assert int(row[1]) == UPDATES * int(row[3])
    assert int(row[2].replace(",", "")) == UPDATES * 4 * int(row[3])
    keys = re.search(r"keys +(\d+) +(\d+) +\d+ keys × 24 tokens", shown)
    canaries = int(re.search(r"canaries +8 +([\d,]+) ", shown)[1].replace(",", ""))
    total = int(row[2].replace(",", "")) + int(keys[2]) + 4 * 4 + canaries  # and the calibration's 4 queries
    assert f"{total * 1000 / 1e6:.4f} USD" in shown
    assert "127.0.0.1" in shown


PROMPTS = ("--embedder.query-prompt", "Find the passage: ", "--embedder.key-prompt", "A passage: ")
SHAPES = {
    "calibration reads more than training": ("--evaluation.articles", "0", "--selection.calibration-queries", "64"),
    "prompts and evaluation": ("--evaluation.articles", "1", *PROMPTS),
    "probes": ("--evaluation.articles", "0", "--reward.kind", "held_out", "--selection.temperature", "0.1", *PROMPTS),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dry_run_is_never_exceeded(service, tmp_path, monkeypatch, capsys, shape):
    monkeypatch.chdir(tmp_path)
    small = ("--rollout.articles", "1", "--rollout.trajectories", "2", "--rollout.steps", "2", "--pairs.num-pairs", "6")
    sizes = (
        *("--training.updates", "1", "--selection.calibration-queries", "8", "--training.device", "cpu"),
        *("--evaluation.oracle", "false"),
    )
    embedder = ("--embedder.kind", "openai", "--embedder.base-url", service.url, "--network.cache", "cache")
    command = ["train", "--preset", "demo", *small, *sizes, *embedder, *SHAPES[shape]]
    assert main([*command, "--dry-run"]) == 0
    planned = re.search(r"together +([\d,]+) +([\d,]+)", capsys.readouterr().out)
    most_texts, most_tokens = (int(number.replace(",", "")) for number in planned.groups())
    assert service.requests == []
    assert main([*command, "--run", "a"]) == 0
    num_texts = sum(len(request.texts) for request in service.requests)
    assert most_texts / 3 < num_texts <= most_texts
    assert service.billed_tokens <= most_tokens


def test_a_dry_run_without_a_service_says_that_nothing_is_sent(capsys):
    assert main(["train", "--dry-run"]) == 0
    assert "no text is sent anywhere" in capsys.readouterr().out


def test_files_of_this_machine_are_not_sent_without_consent(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "diary.txt").write_text("Dear diary. " * 200, encoding="utf-8")
    arguments = ["train", "--preset", "text", "--corpus.path", str(tmp_path), "--embedder.kind", "openai"]
    assert main([*arguments, "--run", "a", "--runs-folder", str(tmp_path / "runs")]) == 13
    said = capfd.readouterr().err
    assert "api.openai.com" in said
    assert "embedder.send_local_text" in said


def test_narrow_vectors_warn_at_temperature_1_and_calibration_restores_steering(tmp_path, capfd):
    """Inner products from 0.75 to 1, as of ADA: the bare softmax cannot be steered, the calibrated one teaches."""
    base = {
        "embedder.kind": "narrow:NarrowEmbedder",
        "corpus.subjects": 4,
        "corpus.pairs_per_subject": 3,
        "evaluation.corpus.subjects": 4,
        "evaluation.corpus.pairs_per_subject": 3,
        "evaluation.num_probes": 0,
        "evaluation.articles": 0,
        "pairs.num_pairs": 12,
        "rollout.articles": 4,
        "rollout.steps": 3,
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_updates": 1,
        "training.updates": 4,
        "training.device": "cpu",
        "log.trajectories_every": 0,
    }
    with pytest.warns(UserWarning, match="steerability"):
        session = runs.open_untrained(load_config("demo", overrides={**base, "selection.temperature": 1.0}))
    assert session.temperature == 1.0
    runs.train(load_config("demo", overrides=base), tmp_path / "run")
    first, *_, last = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["selection/steerability"] > 0.3
    assert first["selection/temperature"] < 0.1
    assert last["reward/mean"] > first["reward/mean"]
    session, update = runs.open_run(tmp_path / "run", {"evaluation.articles": 16})
    batches = run_arms(session, ["trained", "untrained"])
    records = [record for batch in batches for record in evaluation_records(session, batch, update)]
    assert summarise(records, held_out=True)["contrasts"]["trained-untrained"]["low"] > 0
