"""Runs to be killed, starved and interrupted, and the run that nothing disturbed, which they must equal in the end.

Dropout, sampling, shuffling, accumulation over micro-batches, an embedding service whose vectors are never twice the
same, checkpoints that are removed, and the evaluation are all in them. `make torture` goes through every point.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fake_embeddings import EmbeddingServer
from warm import Warm

from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.text import STORE
from attention_guided_rl.verification import verify_run

TORTURE = bool(os.environ.get("AGRL_TORTURE"))
"""Whether every point is tried, not some."""
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

LONG: dict[str, Any] = {
    "embedder.kind": "attention",
    "training.updates": 40,
    "training.checkpoint_every": 10,
    "log.trajectories_every": 3,
    "optimizer.warmup_updates": 5,
    "evaluation.articles": 0,
}
"""A longer run, without a service."""


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
        self._number, self._identity = 0, ""
        (root / "logs").mkdir()
        self.whole = self.new()
        steps = root / "steps"
        assert self.train(self.whole, steps=str(steps)) == 0, self.said(self.whole)
        self.steps = [line.partition(" ")[2] for line in steps.read_text(encoding="utf-8").splitlines()]
        self.seconds = float(steps.read_text(encoding="utf-8").splitlines()[-1].partition(" ")[0])
        state = newest(self.whole / "checkpoints") / "state.json"
        self._identity = json.loads(state.read_text(encoding="utf-8"))["embedder"]

    def new(self, disk: Path | None = None) -> Path:
        """Return the folder of a run that has not begun; the service has heard of nothing yet."""
        self._number += 1
        self._service.asked.clear()
        folder = (disk or self.root) / f"trial{self._number}"
        folder.mkdir()
        return folder / "run"

    def train(self, run: Path, *more: str, **how: Any) -> int:
        """Begin a run, or go on with it; return the exit code, minus 9 where it was killed."""
        self._service.forget_what_was_lost(run.parent / "cache", self._identity)
        code = self._parent(self._command(run, *more), folder=run.parent, log=self._log(run), **how)
        if code == 0:
            list(verify_run(run))
        return code

    def start(self, run: Path, rank: int, **how: Any) -> int:
        """Begin a run as one of several processes; return its process id."""
        return self._parent.start(self._command(run), folder=run.parent, log=self._log(run, rank), **how)

    def wait(self, child: int) -> int:
        return self._parent.wait(child)

    def _command(self, run: Path, *more: str) -> list[str]:
        start = ["--resume"] if run.exists() else ["--config", str(self._config)]
        return ["train", *start, "--run", run.name, "--runs-folder", ".", *more]

    def finish(self, run: Path, what: Any = None, *, other_checkpoints: bool = False) -> None:
        """Go on with a run until all is done, and compare every file with those of the whole run.

        `other_checkpoints`: beside the last, others may be there than in a run that was left alone.
        """
        code = self.train(run)
        assert code == 0, (what, self.said(run))
        last = str(newest(run / "checkpoints").relative_to(run))
        differing = differing_files(run, self.whole)
        if other_checkpoints:
            differing = [name for name in differing if name.startswith(last) or not name.startswith("checkpoints")]
        assert differing == [], (what, run, differing)

    def said(self, run: Path, rank: int = 0) -> str:
        return self._log(run, rank).read_text(encoding="utf-8")[-9000:]

    def _log(self, run: Path, rank: int = 0) -> Path:
        return self.root / "logs" / f"{run.parent.name}-{rank}"


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


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
