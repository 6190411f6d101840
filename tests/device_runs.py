"""What `test_device.py` does here and on the fake device, in functions that another process can import."""

import json
from pathlib import Path
from typing import Any

import fake_device
import torch

from attention_guided_rl import runs
from attention_guided_rl.config import Config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.doctor import audit
from attention_guided_rl.headroom import measure_headroom
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.session import Session
from attention_guided_rl.trainer import read


def train_and_evaluate(config: Config, folder: Path) -> dict[str, Any]:
    """Return every number and flag of the updates and of the evaluation but the clock's and the memory's."""
    runs.train(config, folder)
    updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return leaves({"updates": updates, "evaluation": json.loads((folder / "evaluation.json").read_text("utf-8"))})


def resume_and_evaluate(config: Config, folder: Path) -> dict[str, Any]:
    """The same of a run that is there, gone on with."""
    runs.train(config, folder, resume=True)
    return leaves(runs.evaluate(folder))


def leaves(found: Any, name: str = "") -> dict[str, Any]:
    """Return the numbers and flags in a tree of lists and mappings, by their paths."""
    if isinstance(found, int | float):
        return {name: found}
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    parts = [leaves(part, f"{name} {key}") for key, part in items if not str(key).startswith(("time/", "memory/"))]
    return {key: number for part in parts for key, number in part.items()}


def audits(config: Config) -> dict[str, bool]:
    return {check.name: check.passed for check in audit(runs.open_untrained(config))}


def headroom(config: Config) -> dict[str, Any]:
    return leaves(json.loads(json.dumps(measure_headroom(runs.open_untrained(config)).contrasts)))


def open_session(config: Config) -> Session:
    return Session(config, Processes("cpu"))


def weights_at(config: Config) -> set[str]:
    model = open_session(config).model
    return {str(p.device) for p in (model.named_trainable() | model.named_frozen()).values()}


def synchronisations_of_writing(config: Config) -> int:
    """Count how often the host waits while it writes an update's trajectories, once libraries are warm."""
    session = open_session(config)
    session.temperature = 0.5
    stream = session.stream(config.corpus, num_probes=0, purpose=Purpose.POOL)
    for update in range(2):
        fake_device.SYNCHRONISATIONS.clear()
        read(session, stream, update, slice(0, config.rollout.articles))
    return len(fake_device.SYNCHRONISATIONS)


def refused_mixes() -> dict[str, str]:
    """Try what CUDA takes and what it does not; return what was refused, and why."""
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="fake")
    rows = torch.tensor([0, 1])
    there.index_put_((rows, rows), torch.tensor(3.0, device="fake"))
    assert (there[rows] * torch.tensor(2.0)).tolist() == [[6.0, 2.0], [2.0, 6.0]]
    refused = {}
    for name, attempt in {
        "sum": lambda: here + there,
        "index": lambda: here[rows.to("fake")],
        "value": lambda: there.index_put_((rows, rows), torch.ones(2)),
        "product": lambda: torch.nn.Linear(2, 2).to("fake")(here),
        "mask": lambda: there.masked_fill(here > 0, 0.0),
        "stack": lambda: torch.stack([there.sum(), here.sum()]),
    }.items():
        try:
            attempt()
        except RuntimeError as error:
            refused[name] = str(error)
    return refused
