"""Logs: metrics.jsonl and pairs.jsonl: every update once and in order, every pair once.

In: lines. Out: the records of the updates, the pairs by their ids.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.verification.reading import Json, Line
from attention_guided_rl.verification.settings import Asked

OF_A_STEP = (
    *("loss/total", "loss/policy", "loss/kl", "policy/entropy", "policy/sampler_mismatch", "optimizer/gradient_norm"),
)
"""What every update with an optimiser step has measured."""
COUNTERS = {"filter/empty_updates": "empty_updates", "guard/nonfinite_updates": "nonfinite_updates"}
"""Names in metrics.jsonl and in state.json."""
MOST_REMEMBERED = 200_000  # pairs; of longer runs a pair may be written twice


@dataclass(frozen=True, slots=True)
class Pair:
    """A line of pairs.jsonl."""

    article: str
    value_ids: list[int]
    prior: float | None
    end: int
    """Bytes of pairs.jsonl up to and with it."""


def check_metrics(path: str, lines: Iterable[Line], asked: Asked, done: int, state: Json) -> list[Json]:
    """Check that the updates 1 … `done` are there, each once and in order, and what they count; return their metrics.

    Raises:
        CheckpointError: naming the first difference.
    """
    records: list[Json] = []
    before: Json = dict.fromkeys(COUNTERS, 0)
    for line in lines:
        where, record, number = line.where, line.record, len(records) + 1
        if record.get("update") != number:
            raise CheckpointError(f"{where}: update {record.get('update')!r} where update {number} belongs")
        if number > done:
            raise CheckpointError(f"{where}: update {number}, and the checkpoint is of update {done}")
        if record.get("episodes") != number * asked.rows:
            raise CheckpointError(
                f"{where}: {record.get('episodes')!r} episodes; {number} × {asked.rows} were asked for"
            )
        _check_step(where, record, before)
        records.append(record)
        before = record
    if len(records) < done:
        raise CheckpointError(f"{path}: the last update is {len(records)}, and the checkpoint is of update {done}")
    expected = {name: state.get(field) for name, field in COUNTERS.items()}
    if records:
        expected["selection/temperature"] = state.get("temperature")
    for name, value in expected.items():
        if before.get(name) != value:
            raise CheckpointError(f"{path}: {name} is {before.get(name)!r}, in the checkpoint {value!r}")
    return records


def is_nonfinite(metrics: list[Json], update: int) -> bool:
    """Return whether the run says that an update had a number that is not finite."""
    before = metrics[update - 2]["guard/nonfinite_updates"] if update > 1 else 0
    return bool(metrics[update - 1]["guard/nonfinite_updates"] > before)


def check_pairs(lines: Iterable[Line]) -> dict[str, Pair]:
    """Check that every pair is named by its text and position, and stands there once; return them.

    Raises:
        CheckpointError: naming the first difference.
    """
    pairs: dict[str, Pair] = {}
    for line in lines:
        record = line.record
        try:
            name, prior = record["pair"], record["prior"]
            pair = Pair(record["article"], record["value_ids"], None if prior is None else float(prior), line.end)
            fits = name == f"{record['hash']}-{record['position']}" and len(pair.value_ids) > 0
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{line.where}: no pair ({type(error).__name__}: {error})") from None
        if not fits:
            raise CheckpointError(f"{line.where}: pair {name!r} is not what hash and position say, or has no value")
        if name in pairs and len(pairs) <= MOST_REMEMBERED:
            raise CheckpointError(f"{line.where}: pair {name!r} a second time")
        pairs.setdefault(name, pair)
    return pairs


def _check_step(where: str, record: Json, before: Mapping[str, int]) -> None:
    """Check that an update either took a step and measured it, or is counted as one that took none."""
    rises = {}
    for name in COUNTERS:
        if type(record.get(name)) is not int or not 0 <= record[name] - before[name] <= 1:
            raise CheckpointError(f"{where}: {name} is {record.get(name)!r}, after {before[name]}")
        rises[name] = record[name] - before[name]
    if sum(rises.values()) > 1:
        raise CheckpointError(f"{where}: the update is counted as empty and as not finite")
    if not any(rises.values()):
        for name in OF_A_STEP:
            if not isinstance(record.get(name), int | float):
                raise CheckpointError(f"{where}: {name} is {record.get(name)!r}, and the update counts as done")
    elif rises["filter/empty_updates"] and record.get("loss/total") is not None:
        raise CheckpointError(f"{where}: the update is counted as empty, and has a loss")
