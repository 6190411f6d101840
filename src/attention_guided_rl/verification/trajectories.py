"""Trajectories: every promised line once and in order, each coherent in itself, its rewards computed again.

In: lines, pairs, metrics. Out: how many lines of training there are, and the evaluation's trajectories by arm. With
G trajectories of each of A articles an update has A·G lines; S steps, N pairs in the pool, Q query and L value tokens.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.verification.logs import Pair, is_nonfinite
from attention_guided_rl.verification.reading import Json, Line
from attention_guided_rl.verification.settings import Asked

VALUE = 3  # in `role`
ROUNDING = 1e-5  # logged numbers have six decimals; sums in float32 are a little coarser
OF_ALL_ROWS = ("reward/mean", "reward/raw", "filter/kept_fraction", "selection/picked_logprob")
"""Metrics that are plain means over the logged rows of an update."""


@dataclass(frozen=True, slots=True)
class ArmRow:
    """What evaluation.jsonl must say of a trajectory of the evaluation."""

    where: str
    index: Any
    picks: list[int]
    reward: float


@dataclass(slots=True)
class Trajectories:
    """What was found in trajectories.jsonl."""

    num_training: int = 0
    training_bytes: int = 0
    last_pair_byte: int = 0
    """Where in pairs.jsonl the last pair of training ends."""
    num_recomputed: int = 0
    """Rows whose rewards follow from the log-probabilities and the pairs."""
    evaluation: dict[str, list[ArmRow]] = field(default_factory=dict)

    @property
    def num_evaluation(self) -> int:
        """Lines of the evaluation."""
        return sum(map(len, self.evaluation.values()))


@dataclass(frozen=True, slots=True)
class _Row:
    """A line that has been found coherent."""

    rewards: NDArray[np.float64]
    means: tuple[float, ...]
    """As `OF_ALL_ROWS`."""
    recomputed: bool


def check_trajectories(
    path: str, lines: Iterable[Line], asked: Asked, pairs: Mapping[str, Pair], metrics: list[Json]
) -> Trajectories:
    """Check that the lines of training are those that log.trajectories_every promises, then those of the evaluation.

    Raises:
        CheckpointError: naming the first difference.
    """
    found, places = Trajectories(), _places(asked, len(metrics))
    sizes: dict[str, int | None] = {"S": asked.steps, "N": asked.num_pairs}
    group: list[_Row] = []
    first: Json = {}
    place = next(places, None)
    for line in lines:
        where, record = line.where, line.record
        if record.get("phase") == "evaluation" and place is None:
            row = _check_row(line, asked, asked.evaluation_reward, pairs, sizes, may_be_null=False)
            _collect(found, line, row, len(metrics))
            continue
        here = tuple(record.get(name) for name in ("phase", "update", "index", "trajectory"))
        if here != place:
            raise CheckpointError(f"{where}: {_named(here)} where {_named(place)} belongs")
        update, trajectory = record["update"], record["trajectory"]
        first = record if trajectory == 0 else first
        if any(record.get(name) != first.get(name) for name in ("article", "pairs", "probes")):
            raise CheckpointError(f"{where}: not the pool of the group's first trajectory")
        if (record.get("arm"), record.get("scorer")) != ("trained", asked.scorer):
            raise CheckpointError(f"{where}: arm {record.get('arm')!r}, scorer {record.get('scorer')!r}")
        row = _check_row(line, asked, asked.reward, pairs, sizes, may_be_null=is_nonfinite(metrics, update))
        group.append(row)
        found.num_training, found.training_bytes = found.num_training + 1, line.end
        found.num_recomputed += row.recomputed
        found.last_pair_byte = max(found.last_pair_byte, *(pairs[p].end for p in record["pairs"] + record["probes"]))
        if len(group) == asked.rows:
            _check_means(where, group, metrics[update - 1])
            group = []
        place = next(places, None)
    if place is not None:
        raise CheckpointError(f"{path}: it ends where {_named(place)} belongs")
    return found


def _places(asked: Asked, updates: int) -> Iterator[tuple[Any, ...]]:
    """Yield phase, update, index and trajectory of every promised line of training."""
    for update in range(1, updates + 1):
        if asked.trajectories_every and (update - 1) % asked.trajectories_every == 0:
            yield from product(["train"], [update], range(asked.articles), range(asked.trajectories))


def _named(place: tuple[Any, ...] | None) -> str:
    if place is None:
        return "nothing of training"
    phase, update, index, trajectory = place
    return f"{phase!r} update {update!r}, article {index!r}, trajectory {trajectory!r}"


def _check_row(
    line: Line,
    asked: Asked,
    reward: str,
    pairs: Mapping[str, Pair],
    sizes: dict[str, int | None],
    *,
    may_be_null: bool,
) -> _Row:
    """Check one line; a size that is not known yet is that of the first line."""
    try:
        record = line.record
        pool, picks = [pairs[name] for name in record["pairs"]], record["picks"]
        for name in record["pairs"] + record["probes"]:
            _require(pairs[name].article == record["article"], f"pair {name!r} is of another article")
        for dimension, size in (("S", len(picks)), ("N", len(pool))):
            sizes[dimension] = size if sizes[dimension] is None else sizes[dimension]
            _require(size == sizes[dimension], f"{dimension} is {size}, not {sizes[dimension]}")
        _require(record["schema"] == 1, f"schema {record['schema']!r}")
        _require(all(type(p) is int and 0 <= p < len(pool) for p in picks), f"picks {picks} are not in the pool")
        _require(len(set(picks)) == len(picks), f"picks {picks}: a pair is read twice")
        picked_logprob = _check_choices(record, picks, len(pool))
        _check_texts(record, picks, pool, asked)
        rewards, raw, recomputed = _check_rewards(record, picks, pool, asked, reward, may_be_null=may_be_null)
    except KeyError as error:
        raise CheckpointError(f"{line.where}: {error.args[0]!r} is missing, here or in pairs.jsonl") from None
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{line.where}: {error}") from None
    means = float(rewards.mean()), float(raw.mean()), float(record["kept"]), picked_logprob
    return _Row(rewards, means, recomputed)


def _check_choices(record: Json, picks: list[int], num_pairs: int) -> float:
    """Check that choices were distributions over the unread pairs; return the picks' mean log-probability."""
    logprobs = _numbers(record, "selection_logprobs", (len(picks), num_pairs), may_be_null=True)
    for step, (pick, row) in enumerate(zip(picks, logprobs, strict=True)):
        read = np.isin(np.arange(num_pairs), picks[:step])
        _require(bool((np.isnan(row) == read).all()), f"selection_logprobs, step {step}: null is not where it was read")
        total = float(np.exp(row[~read]).sum())
        _require(abs(total - 1) <= 1e-4, f"selection_logprobs, step {step}: the probabilities add up to {total:.6g}")
        _require(math.isfinite(row[pick]), f"selection_logprobs, step {step}: the pick had no probability")
    return float(logprobs[np.arange(len(picks)), picks].mean())


def _check_texts(record: Json, picks: list[int], pool: list[Pair], asked: Asked) -> None:
    """Check that the row's context holds the values that were picked, and that queries were sampled."""
    ids, role, step = (np.asarray(record[name]) for name in ("ids", "role", "step"))
    _require(ids.shape == role.shape == step.shape, "ids, role and step differ in length")
    for t, pick in enumerate(picks):
        value = ids[(role == VALUE) & (step == t)].tolist()
        _require(value == pool[pick].value_ids, f"step {t}: the context does not hold the value of pair {pick}")
    sampled = _numbers(record, "sampled_logprobs", (len(picks), asked.query_tokens))
    _require(bool((sampled <= 1e-5).all()), "sampled_logprobs: a probability above 1")
    _require(len(record["queries"]) == len(picks), f"{len(record['queries'])} queries in {len(picks)} steps")


def _check_rewards(
    record: Json, picks: list[int], pool: list[Pair], asked: Asked, reward: str, *, may_be_null: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Check rewards = raw − baseline, and both parts where they follow from what is logged; return rewards and raw."""
    raw, baseline, rewards = (
        _numbers(record, name, (len(picks),), may_be_null) for name in ("raw", "baseline", "rewards")
    )
    logprobs = _numbers(record, "value_token_logprobs", (len(picks), asked.value_tokens), may_be_null)
    if np.isnan(rewards).any() or np.isnan(logprobs).any():
        return rewards, raw, False
    _close(rewards, raw - baseline, ROUNDING, "rewards are not raw − baseline")
    _require(bool((logprobs <= 1e-5).all()), "value_token_logprobs: a probability above 1")
    sampled = asked.pick == "sampled" or record["phase"] != "train"
    if reward not in ("plain", "value_prior") or not sampled:
        return rewards, raw, False
    mean_len = sum(len(pair.value_ids) for pair in pool) / len(pool)
    _close(raw, logprobs.sum(1) / mean_len, 1e-4, "raw is not the sum of value_token_logprobs / mean value length")
    priors = [pool[pick].prior for pick in picks]
    if reward == "plain":
        _close(baseline, np.zeros(len(picks)), 0.0, "baseline of the reward plain is not 0")
    elif record["scorer"] != "reference" or (None in priors and record["phase"] != "train"):
        return rewards, raw, False  # a live scorer's prior, or that of what was a probe before, is not in pairs.jsonl
    else:
        _close(
            baseline, np.array(priors, dtype=float) / mean_len, asked.tolerance,
            "baseline is not the prior of the pair / mean value length",
        )  # fmt: skip
    return rewards, raw, True


def _check_means(where: str, group: list[_Row], metrics: Json) -> None:
    """Check the means of an update's rows against its metrics."""
    for name, values in zip(OF_ALL_ROWS, zip(*(row.means for row in group), strict=True), strict=True):
        mean, said = sum(values) / len(values), metrics.get(name)
        if said is None and math.isnan(mean):
            continue
        if not isinstance(said, int | float) or not abs(said - mean) <= ROUNDING * max(1.0, abs(mean)):
            raise CheckpointError(
                f"{where}: {name} of update {metrics['update']} is {mean:.6g}, in metrics.jsonl {said!r}"
            )


def _collect(found: Trajectories, line: Line, row: _Row, update: int) -> None:
    """Add a trajectory of the evaluation."""
    record = line.record
    for name, expected in (("update", update), ("trajectory", 0), ("scorer", "reference")):
        if record.get(name) != expected:
            raise CheckpointError(f"{line.where}: {name} is {record.get(name)!r}, not {expected!r}")
    arm_row = ArmRow(line.where, record.get("index"), record["picks"], float(row.rewards.mean()))
    found.evaluation.setdefault(str(record.get("arm")), []).append(arm_row)
    found.num_recomputed += row.recomputed


def _numbers(record: Json, name: str, shape: tuple[int, ...], may_be_null: bool = False) -> NDArray[np.float64]:
    """Return logged numbers as an array of this shape, NaN where they are null."""
    values = np.asarray(record[name], dtype=np.float64)
    _require(values.shape == shape, f"{name}: {values.shape} numbers, not {shape}")
    _require(may_be_null or not np.isnan(values).any(), f"{name}: null, and no update of this is counted as not finite")
    return values


def _close(found: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float, message: str) -> None:
    off = np.abs(found - expected)
    if not (off <= tolerance * np.maximum(1.0, np.abs(expected))).all():
        step = int(np.nanargmax(off))
        raise ValueError(f"step {step}: {message}: {found[step]:.6g}, computed {expected[step]:.6g}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
