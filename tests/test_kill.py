"""Killed at any file operation, and at any moment, a run that is resumed ends with the same bits as one left alone.

Dropout, sampling, shuffling, accumulation over micro-batches, an embedding service whose vectors are never twice the
same, checkpoints that are removed, and the evaluation are all in it. `make torture` goes through every point.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_embeddings import KEY, EmbeddingServer
from warm import Warm, warm

from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.text import STORE

TORTURE = bool(os.environ.get("AGRL_TORTURE"))
EVERY = 1 if TORTURE else 9
"""Which of the points are tried."""
KILLED = -9
SETTINGS = {
    "model.lora_dropout": 0.1,
    "corpus.shuffle": True,
    "embedder.kind": "openai",
    "embedder.model": "text-embedding-ada-002",
    "network.cache": "cache",  # beside the run
    "selection.temperature": None,
    "selection.calibration_queries": 4,
    "training.updates": 4,
    "training.micro_batch_rows": 4,
    "training.checkpoint_every": 1,
    "training.keep_checkpoints": 2,
    "evaluation.articles": 2,
}


class NoisyService(EmbeddingServer):
    """Its vector of a text differs each time it is asked for; what was lost on the way was not asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def noise(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([self._noise(text, shape[1:]) for text in self.requests[number].texts])

    def _noise(self, text: str, shape: tuple[int, ...]) -> np.ndarray:
        self.asked[text] += 1
        seed = hashlib.sha256(f"{self.asked[text]} {text}".encode()).digest()[:8]
        return np.random.default_rng(int.from_bytes(seed)).uniform(-2e-4, 2e-4, shape)

    def forget_what_was_lost(self, cache: Path, identity: str) -> None:
        if (cache / STORE).exists():
            stored = VectorStore(cache / STORE).get(identity, list(self.asked))
            for text in self.asked.keys() - stored.keys():
                del self.asked[text]


class Trials:
    """Runs of one setting, each with a cache of its own, in children of a warm parent."""

    def __init__(self, root: Path, config: Path, parent: Warm, service: NoisyService) -> None:
        self.root, self._config, self._parent, self._service = root, config, parent, service
        self._number = 0
        self.whole = self.new()
        steps = root / "steps"
        assert self.train(self.whole, steps=str(steps)) == 0, self.said(self.whole)
        self.steps = [line.partition(" ")[2] for line in steps.read_text(encoding="utf-8").splitlines()]
        self.seconds = float(steps.read_text(encoding="utf-8").splitlines()[-1].partition(" ")[0])
        state = newest(self.whole / "checkpoints") / "state.json"
        self._identity = json.loads(state.read_text(encoding="utf-8"))["embedder"]

    def new(self) -> Path:
        """Return the folder of a run that has not begun; the service has heard of nothing yet."""
        self._number += 1
        self._service.asked.clear()
        return self.root / f"trial{self._number}" / "run"

    def train(self, run: Path, *more: str, **how: Any) -> int:
        """Begin a run, or go on with it; return the exit code, minus 9 where it was killed."""
        run.parent.mkdir(exist_ok=True)
        start = ["--resume"] if run.exists() else ["--config", str(self._config)]
        command = ["train", *start, "--run", run.name, "--runs-folder", ".", *more]
        code = self._parent(command, run.parent, **how)
        if code == KILLED:
            self._service.forget_what_was_lost(run.parent / "cache", self._identity)
        return code

    def finish(self, run: Path, what: Any = None) -> None:
        """Go on with a run until all is done, and compare every file with those of the whole run."""
        code = self.train(run)
        assert code == 0, (what, self.said(run))
        assert differing_files(run, self.whole) == [], (what, run)

    def said(self, run: Path) -> str:
        return (run.parent / "log").read_text(encoding="utf-8")[-3000:]


def newest(folder: Path) -> Path:
    return max(folder.glob("update-*"))


def differing_files(run: Path, other: Path) -> list[str]:
    """Name the files that differ; the time that an update took may, and what follows from its number of digits."""
    ours, theirs = contents(run), contents(other)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def contents(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_dir() or name in (".lock", "report.html"):  # the page shows the times
            continue
        found[name] = path.read_bytes()
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in found[name].splitlines()]
            found[name] = [{**line, "time/update_s": None} for line in lines]
        elif path.name == "manifest.json":
            manifest = json.loads(found[name])
            found[name] = {**manifest, "manifest_sha256": None}
            found[name]["log_bytes"]["metrics.jsonl"] = None
        elif name == "environment.json":
            found[name] = {**json.loads(found[name]), "account": None}
    return found


@pytest.fixture(scope="module")
def trials(tmp_path_factory, make_config, licensed_corpus) -> Iterator[Trials]:
    root = tmp_path_factory.mktemp("kill")
    with NoisyService() as service, warm({"OPENAI_API_KEY": KEY}) as parent:
        more = {"embedder.base_url": service.url, "corpus.path": str(licensed_corpus)}
        (root / "config.yaml").write_text(config_to_yaml(make_config(SETTINGS | more)), encoding="utf-8")
        yield Trials(root, root / "config.yaml", parent, service)


@pytest.fixture(scope="module")
def licensed_corpus(tmp_path_factory, corpus_file) -> Path:
    """The eight articles, with a licence: so they are named in ATTRIBUTION.md."""
    path = tmp_path_factory.mktemp("licensed") / "articles.jsonl"
    lines = [json.loads(line) for line in corpus_file.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**x, "licence": "CC BY-SA 4.0"}) + "\n" for x in lines), encoding="utf-8")
    return path


def test_two_runs_left_alone_are_equal(trials):
    """What the other tests compare with, and that there is something to compare."""
    run = trials.new()
    trials.finish(run)
    names = contents(run)
    assert len(trials.steps) >= 40
    assert {"metrics.jsonl", "trajectories.jsonl", "pairs.jsonl", "evaluation.jsonl", "ATTRIBUTION.md"} <= set(names)
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "update-000004"


def test_killed_before_any_file_operation_and_resumed_ends_with_the_same_bits(trials):
    killed = range(3, len(trials.steps), EVERY)
    for step in killed:
        run = trials.new()
        assert trials.train(run, kill_at=step) == KILLED, (step, trials.said(run))
        trials.finish(run, (step, trials.steps[step]))


def test_killed_again_while_resuming_ends_with_the_same_bits(trials):
    numbers = random.Random(0)
    for _ in range(100 if TORTURE else 2):
        run = trials.new()
        kills = 0
        while kills < 3:
            kills += trials.train(run, kill_at=numbers.randrange(5, len(trials.steps))) == KILLED
        trials.finish(run)


def test_killed_at_any_moment_ends_with_the_same_bits(trials):
    numbers = random.Random(1)
    for trial in range(100 if TORTURE else 4):
        run = trials.new()
        for _ in range(3 if trial % 3 == 0 else 1):
            trials.train(run, kill_after_s=numbers.uniform(0, trials.seconds))
        trials.finish(run)
