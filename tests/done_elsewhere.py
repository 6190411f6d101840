"""What `test_second_device.py` does here and on the second device, in functions that another process can import."""

import json
from pathlib import Path
from typing import Any

import second_device
import torch

from attention_guided_rl import runs
from attention_guided_rl.config import Config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.doctor import audit
from attention_guided_rl.headroom import measure_headroom
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.session import Session
from attention_guided_rl.trainer import read


def figures(config: Config, folder: Path) -> dict[str, float]:
    """Train and evaluate; return every number of the updates and of the evaluation but the clock's and the memory's."""
    torch.set_num_threads(1)
    runs.train(config, folder)
    updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return numbers({"updates": updates, "evaluation": json.loads((folder / "evaluation.json").read_text("utf-8"))})


def numbers(found: Any, name: str = "") -> dict[str, float]:
    """Return the numbers in a tree of lists and mappings, by their paths."""
    if isinstance(found, float):
        return {name: found}
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    parts = [numbers(part, f"{name} {key}") for key, part in items if not str(key).startswith(("time/", "memory/"))]
    return {key: number for part in parts for key, number in part.items()}


def opened(config: Config) -> Session:
    return Session(config, Processes("cpu"))


def audited(config: Config) -> dict[str, bool]:
    return {check.name: check.passed for check in audit(runs.open_untrained(config))}


def headroom(config: Config) -> dict[str, float]:
    return numbers(json.loads(json.dumps(measure_headroom(runs.open_untrained(config)).contrasts)))


def weights_at(config: Config) -> set[str]:
    model = opened(config).model
    return {str(p.device) for p in (model.named_trainable() | model.named_frozen()).values()}


def waits_of_writing(config: Config) -> list[str]:
    """Return what the writing of an update's trajectories waited for, keys and libraries being warm."""
    session = opened(config)
    session.temperature = 0.5
    stream = session.stream(config.corpus, num_probes=0, purpose=Purpose.POOL)
    for update in range(2):
        second_device.WAITS.clear()
        read(session, stream, update, slice(0, config.rollout.articles))
    return list(second_device.WAITS)


def mixed() -> list[str]:
    """Try what a GPU takes and what it does not; return what was refused."""
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="second")
    rows = torch.tensor([0, 1])
    there.index_put_((rows, rows), torch.tensor(3.0, device="second"))
    assert (there[rows] * torch.tensor(2.0)).tolist() == [[6.0, 2.0], [2.0, 6.0]]
    refused = []
    for name, attempt in {
        "sum": lambda: here + there,
        "index": lambda: here[rows.to("second")],
        "value": lambda: there.index_put_((rows, rows), torch.ones(2)),
        "product": lambda: torch.nn.Linear(2, 2).to("second")(here),
        "mask": lambda: there.masked_fill(here > 0, 0.0),
    }.items():
        try:
            attempt()
        except RuntimeError:
            refused.append(name)
    return refused
