"""The original experiment end to end: articles from a MediaWiki and vectors from a service, both on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_embeddings import KEY, TRANSIENT, EmbeddingServer
from fake_mediawiki import FakeMediaWiki, Page, reset, status
from transformers import LlamaConfig, LlamaForCausalLM

from attention_guided_rl import runs
from attention_guided_rl.cli import main
from attention_guided_rl.config_files import load_config

UPDATES = 4
SMALL = (
    *("--model.dtype", "float32", "--model.lora-rank", "2", "--training.device", "cpu"),
    *("--rollout.context-tokens", "520", "--rollout.query-tokens", "6", "--training.updates", str(UPDATES)),
    *("--pairs.key-tokens", "24", "--pairs.value-tokens", "24", "--selection.calibration-queries", "4"),
    *("--objective.filter.warmup", "2", "--objective.filter.min-zscore", "-1", "--optimizer.learning-rate", "1e-2"),
    *("--evaluation.articles", "2", "--log.trajectories-every", "1", "--network.backoff-s", "0.001"),
)
TEXT = "\n\n".join(
    f"'''Elmbrook''' has {n} mills{{{{ref|{n}}}}} on the [[river]] road. The miller of number {n} grinds oats and rye."
    for n in range(2, 9)
)


class Quiet(EmbeddingServer):
    """The service without noise, so that two runs can be compared bit for bit."""

    def noise(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


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


@pytest.fixture
def wiki():
    pages = {"Elmbrook": Page(TEXT, revision=77), "Elm Brook": Page(redirect="Elmbrook")}
    with FakeMediaWiki(pages) as server:
        yield server


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Quiet() as server:
        server.hang_s = 0.6
        yield server


@pytest.fixture
def agrl(chat_model, wiki, service, tmp_path, monkeypatch, capfd):
    """Return the command `agrl train` with the preset `original`: name, cache, further arguments."""
    monkeypatch.chdir(tmp_path)

    def arguments(name: str, cache: str, *more: str) -> list[str]:
        return [
            *("train", "--preset", "original", "--run", name, "--corpus.title", "Elm Brook", *SMALL),
            *("--model.name", str(chat_model), "--corpus.site", wiki.url, "--embedder.base-url", service.url),
            *("--network.cache", str(tmp_path / cache), "--corpus.requests-per-second", "100", *more),
        ]

    def train(name: str, cache: str, *more: str) -> tuple[int, str]:
        code = main(arguments(name, cache, *more))
        out, err = capfd.readouterr()
        return code, out + err

    train.arguments = arguments
    return train


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


def test_the_original_experiment_over_loopback_services(agrl, wiki, service, tmp_path):
    code, shown = agrl("a", "cache")
    assert code == 0, shown
    run, first = tmp_path / "runs" / "a", list(service.requests)
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
    one_a_step = UPDATES * steps + 7 * steps  # six arms write queries, and nearest_key looks up values besides
    assert len(first) <= 1 + 2 + one_a_step  # and canaries, keys, calibration

    asked = len(wiki.requests)
    assert agrl("b", "cache")[0] == 0
    assert len(wiki.requests) == asked
    again = service.requests[len(first) :]
    assert [request.texts for request in again] == [first[0].texts]  # the canaries, asked for at every start
    assert outcome(tmp_path / "runs" / "b") == outcome(run)

    assert agrl("c", "cache", "--offline")[0] == 0
    assert len(service.requests) == len(first) + 1
    assert outcome(tmp_path / "runs" / "c") == outcome(run)


def test_faults_of_both_services_change_no_bit_and_the_cap_holds(agrl, wiki, service, tmp_path):
    assert agrl("quiet", "cache-1")[0] == 0
    batches = len(service.requests)
    service.requests.clear()
    service.faults, service.probability, service.seed, service.billed_usd = TRANSIENT, 0.3, 3, 0.0
    wiki.faults[:] = [status(503), None, reset]
    code, shown = agrl(
        *("faulty", "cache-2", "--network.timeout-s", "0.3", "--embedder.usd-per-million-tokens", "0.1"),
        *("--embedder.max-usd", "0.05"),
    )
    assert code == 0, shown
    assert outcome(tmp_path / "runs" / "faulty") == outcome(tmp_path / "runs" / "quiet")
    assert len(service.requests) <= 1.6 * batches
    assert sum(request.fault is not None for request in service.requests) > 0.2 * batches
    spent = float(re.search(r"embeddings of this run: ([\d.]+) USD", shown)[1])
    assert service.billed_usd <= spent <= 0.05


def test_a_cap_stops_the_run_before_it_is_passed_and_raising_it_goes_on(agrl, service, tmp_path):
    assert agrl("whole", "cache-1")[0] == 0
    service.billed_usd = 0.0
    service.faults, service.probability = ("no_usage",), 1.0  # so that a byte counts as a token
    price = ("--embedder.usd-per-million-tokens", "0.1", "--training.checkpoint-every", "1")
    code, shown = agrl("capped", "cache-2", *price, "--embedder.max-usd", "0.00014")
    assert code == 6, shown
    assert "embedder.max_usd" in shown.splitlines()[-1]
    assert 0 < service.billed_usd <= 0.00014
    assert "agrl train --run capped --resume" in shown
    code = main(["train", "--run", "capped", "--resume", "--embedder.max-usd", "1"])
    assert code == 0
    assert outcome(tmp_path / "runs" / "capped") == outcome(tmp_path / "runs" / "whole")


def test_two_processes_share_what_they_fetch_and_read_as_one(agrl, wiki, service, tmp_path):
    two_articles = ("--rollout.articles", "2", "--evaluation.articles", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "attention_guided_rl", *agrl.arguments("two", "cache-2", *two_articles)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), **place},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        said = process.communicate(timeout=100)[0]
        assert process.returncode == 0, said
    texts = [text for request in service.requests for text in request.texts]
    assert len(texts) == len(set(texts))
    assert len(wiki.requests) == len({json.dumps(request.query) for request in wiki.requests})
    assert agrl("one", "cache-1", *two_articles)[0] == 0
    one, two = (lines(tmp_path / "runs" / name / "trajectories.jsonl") for name in ("one", "two"))
    assert [(t["ids"], t["picks"]) for t in one] == [(t["ids"], t["picks"]) for t in two]


def test_no_key_is_in_any_file_or_on_the_screen(agrl, service, tmp_path):
    shown = agrl("good", "cache")[1]
    service.key = "another"  # refused from now on, with the whole key in the message
    code, refused = agrl("bad", "cache")
    assert code == 4
    assert KEY not in shown + refused
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
    row = re.search(r"queries of the training +(\d+) +([\d,]+) +4 updates × 1 rows × (\d+) steps × 6 tokens", shown)
    assert int(row[1]) == 4 * int(row[3])
    assert int(row[2].replace(",", "")) == 4 * 6 * int(row[3])
    keys = re.search(r"keys +(\d+) +(\d+) +\d+ keys × 24 tokens", shown)
    total = int(row[2].replace(",", "")) + int(keys[2]) + 4 * 6  # and the calibration's 4 queries
    assert f"{total * 1000 / 1e6:.4f} USD" in shown
    assert "127.0.0.1" in shown


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
        "evaluation.articles": 32,
        "evaluation.oracle": False,
        "pairs.num_pairs": 12,
        "rollout.steps": 3,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_updates": 2,
        "training.updates": 8,
        "training.device": "cpu",
        "log.trajectories_every": 0,
    }
    with pytest.warns(UserWarning, match="steerability"):
        session = runs.open_untrained(load_config("demo", overrides={**base, "selection.temperature": 1.0}))
    assert session.temperature == 1.0
    result = runs.train(load_config("demo", overrides=base), tmp_path / "run")
    first, *_, last = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["selection/steerability"] > 0.3
    assert first["selection/temperature"] < 0.1
    assert result.summary["contrasts"]["trained-untrained"]["low"] > 0
    assert last["reward/mean"] > first["reward/mean"]
