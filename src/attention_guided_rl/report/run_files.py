"""Run files: what the page about a run shows, read from the run's files alone and in bounded memory.

In: a run folder. Out: RunRecord, plain data. The logs are streamed; damaged lines are left out and counted. No model is
loaded, and torch is not imported.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.plain_data import parse_json, read_yaml
from attention_guided_rl.report.log_lines import objects
from attention_guided_rl.report.trajectories import ArticleRows, read_articles
from attention_guided_rl.storage import run_config

MAX_POINTS = 400  # of a curve


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """Everything that is shown of a run."""

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    metrics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Points (update, value) by name, at most MAX_POINTS; a point is the mean of `updates_per_point` updates."""
    updates: int = 0
    updates_per_point: int = 1
    alarms: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Ranges of updates in which an alarm rang, by name; a name that never rang has none."""
    probe_curves: dict[str, list[float]] = field(default_factory=dict)
    """Mean over articles by arm, after 0, 1, … S pairs."""
    articles: list[ArticleRows] = field(default_factory=list)
    left_out: int = 0
    """Articles left out because the page would grow too large."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Lines that could not be read, by file."""


def read_run(folder: Path) -> RunRecord:
    """Read what there is to show of a run.

    Raises:
        ConfigError: this is no run folder.
        CheckpointError: a file that is written whole cannot be read.
    """
    try:
        config = read_yaml(run_config(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.yaml'}: not readable: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.yaml'}: not a configuration")
    record = RunRecord(
        name=folder.resolve().name,
        config=config,
        environment=_whole(folder / "environment.json") or {},
        summary=_whole(folder / "evaluation.json"),
    )
    _read_metrics(folder / "metrics.jsonl", record)
    _read_probe_curves(folder / "evaluation.jsonl", record)
    record.articles, record.left_out = read_articles(folder, record.damaged)
    return record


def _whole(path: Path) -> Mapping[str, Any] | None:
    """Return the object of a JSON file; None if there is no file."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not an object")
    return content


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_curve(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(is_number(step) for step in value)


def _read_metrics(path: Path, record: RunRecord) -> None:
    metrics: dict[str, list[tuple[float, float]]] = {}
    for line in objects(path, record.damaged):
        update = line.get("update")
        if not is_number(update):
            record.damaged[path.name] += 1
            continue
        record.updates = max(record.updates, int(update))
        for name, value in line.items():
            if name.startswith("alarm/"):
                ranges = record.alarms.setdefault(name.removeprefix("alarm/"), [])
                if value and ranges and ranges[-1][1] == update - 1:
                    ranges[-1] = (ranges[-1][0], int(update))
                elif value:
                    ranges.append((int(update), int(update)))
            elif is_number(value):
                metrics.setdefault(name, []).append((float(update), float(value)))
    longest = max((len(points) for points in metrics.values()), default=0)
    record.updates_per_point = size = max(1, math.ceil(longest / MAX_POINTS))
    record.metrics = {name: _thin(points, size) for name, points in metrics.items()}


def _thin(points: list[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """Average groups of consecutive points."""
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _read_probe_curves(path: Path, record: RunRecord) -> None:
    curves: dict[str, list[list[float]]] = {}
    for line in objects(path, record.damaged):
        arm, curve = line.get("arm"), line.get("probe_curve")
        if not isinstance(arm, str) or not (curve is None or _is_curve(curve)):
            record.damaged[path.name] += 1
        elif curve:
            curves.setdefault(arm, []).append(curve)
    for arm, found in curves.items():
        if len({len(curve) for curve in found}) == 1:
            record.probe_curves[arm] = [sum(step) / len(step) for step in zip(*found, strict=True)]
