"""Trajectories to look at: a bounded choice of a run's trajectories, with the pairs they read.

In: trajectories.jsonl and pairs.jsonl, streamed; lines that are not shown are told from their first bytes and not
parsed. Out: ArticleRows. The choice: the first articles of the evaluation, trained and untrained, whatever came out;
and a few trajectories of the first, the middle and the last training update that was logged.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from attention_guided_rl.report.log_lines import clean, lines

NUM_ARTICLES = 8  # of the evaluation
NUM_TRAINING_ARTICLES = 2  # of each training update shown, with as many of their trajectories
MAX_BYTES = 3_000_000  # of all trajectories shown, as JSON
ARMS = ("trained", "untrained")

_TRAJECTORY = re.compile(
    rb'\{"schema": 1, "phase": "(?P<phase>\w+)", "arm": "(?P<arm>[^"\\]*)", "update": (?P<update>\d+), '
    rb'"scorer": "[^"\\]*", "index": (?P<index>\d+), "article": "(?:[^"\\]|\\.)*", "trajectory": \d+,'
)
_PAIR = re.compile(rb'\{"pair": "(?P<pair>[^"\\]*)"')

Number = FiniteFloat | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The value read at a step: its tokens, and what is known of each."""

    tokens: list[str]
    gains: list[float | None]
    """Log-probability less the token's even share of the value's prior; where there is no prior, the former alone."""
    has_prior: bool
    exact: bool
    """Whether the run says where its tokens end; otherwise the value is cut into equal pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A trajectory, step by step."""

    name: str
    queries: list[str]
    picks: list[int]
    probs: list[list[float | None]]
    """Probability of each key; None where it had been read."""
    rewards: list[float | None]
    values: list[Value]
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArticleRows:
    """An article's pool and some trajectories over it."""

    phase: str
    update: int
    index: int
    title: str
    keys: list[str]
    subjects: list[int | None]
    rows: list[Row]


class _Trajectory(BaseModel):
    """A line of trajectories.jsonl."""

    phase: str
    arm: str
    update: int
    index: int
    trajectory: int
    pairs: Annotated[list[str], Field(min_length=1)]
    queries: list[str]
    picks: list[Annotated[int, Field(ge=0)]]
    selection_logprobs: list[list[Number]]
    rewards: list[Number]
    value_token_logprobs: list[list[Number]]
    kept: bool

    @model_validator(mode="after")
    def _fits(self) -> "_Trajectory":
        columns = (self.queries, self.selection_logprobs, self.rewards, self.value_token_logprobs)
        if {len(c) for c in columns} != {len(self.picks)} or not self.picks or max(self.picks) >= len(self.pairs):
            raise ValueError("steps do not agree")
        if {len(step) for step in self.selection_logprobs} != {len(self.pairs)}:
            raise ValueError("attention does not fit the pool")
        return self


class _Pair(BaseModel):
    """A line of pairs.jsonl."""

    pair: str
    title: str
    subject: int | None
    value_ids: list[int]
    key: str
    value: str
    prior: Number
    value_tokens: list[str] | None = None


_UNKNOWN = _Pair(pair="", title="", subject=None, value_ids=[], key="(not in pairs.jsonl)", value="", prior=None)


def read_articles(folder: Path, damaged: Counter[str]) -> tuple[list[ArticleRows], int]:
    """Return articles with trajectories, and how many were left out because the page would grow too large."""
    groups = _read_trajectories(folder / "trajectories.jsonl", damaged)
    pairs = _read_pairs(folder / "pairs.jsonl", {pair for rows in groups for pair in rows[0].pairs}, damaged)
    articles, size = [], 0
    for rows in groups:
        article = _article(rows, pairs)
        size += len(json.dumps(asdict(article)))
        if size <= MAX_BYTES:
            articles.append(article)
    return articles, len(groups) - len(articles)


def _head(line: bytes) -> tuple[str, str, int, int] | None:
    """Return phase, arm, update and index of a trajectory from its first bytes, or parse it if it begins otherwise."""
    if match := _TRAJECTORY.match(line):
        return match["phase"].decode(), match["arm"].decode(errors="replace"), int(match["update"]), int(match["index"])
    try:
        found = _Trajectory.model_validate_json(line)
    except ValidationError:
        return None
    return found.phase, found.arm, found.update, found.index


def _read_trajectories(path: Path, damaged: Counter[str]) -> list[list[_Trajectory]]:
    """Return the trajectories to show by article: of the evaluation, then of the first, middle and last update."""
    evaluation: dict[int, dict[str, int]] = {}  # index → arm → offset
    training: dict[int, int] = {}  # update → offset of its first line
    for offset, line in lines(path, damaged):
        head = _head(line)
        if head is None:
            damaged[path.name] += 1
            continue
        phase, arm, update, index = head
        if phase == "train":
            training.setdefault(update, offset)
        elif arm in ARMS:
            evaluation.setdefault(index, {})[arm] = offset
    first = sorted(index for index, arms in evaluation.items() if "trained" in arms)[:NUM_ARTICLES]
    offsets = [[evaluation[index][arm] for arm in ARMS if arm in evaluation[index]] for index in first]
    updates = sorted(training)
    for update in sorted({updates[0], updates[len(updates) // 2], updates[-1]}) if updates else ():
        offsets += _update_offsets(path, update, training[update])
    found = [[row for row in (_trajectory(path, o, damaged) for o in group) if row] for group in offsets]
    return [[row for row in group if row.pairs == group[0].pairs] for group in found if group]


def _update_offsets(path: Path, update: int, start: int) -> list[list[int]]:
    """Return where the first trajectories of the first articles of a training update lie."""
    found: dict[int, list[int]] = {}
    for offset, line in lines(path, Counter(), start):
        head = _head(line)
        if head is not None and head[2] != update:
            break
        if head is not None and (head[3] in found or len(found) < NUM_TRAINING_ARTICLES):
            found.setdefault(head[3], []).append(offset)
    return [offsets[:NUM_TRAINING_ARTICLES] for offsets in found.values()]


def _trajectory(path: Path, offset: int, damaged: Counter[str]) -> _Trajectory | None:
    _, line = next(lines(path, Counter(), offset))
    try:
        return _Trajectory.model_validate_json(line)
    except ValidationError:
        damaged[path.name] += 1
        return None


def _read_pairs(path: Path, wanted: Iterable[str], damaged: Counter[str]) -> dict[str, _Pair]:
    missing, found = set(wanted), {}
    for _, line in lines(path, damaged):
        match = _PAIR.match(line)
        if match and match["pair"].decode(errors="replace") not in missing:
            continue
        try:
            pair = _Pair.model_validate_json(line)
        except ValidationError:
            damaged[path.name] += 1
            continue
        if pair.pair in missing:
            missing.discard(pair.pair)
            found[pair.pair] = pair
    return found


def _article(rows: Sequence[_Trajectory], pairs: Mapping[str, _Pair]) -> ArticleRows:
    first = rows[0]
    pool = [pairs.get(pair, _UNKNOWN) for pair in first.pairs]
    return ArticleRows(
        phase=first.phase,
        update=first.update,
        index=first.index,
        title=clean(next((pair.title for pair in pool if pair.title), first.pairs[0])),
        keys=[clean(pair.key) for pair in pool],
        subjects=[pair.subject for pair in pool],
        rows=[_row(row, pool) for row in rows],
    )


def _row(row: _Trajectory, pool: Sequence[_Pair]) -> Row:
    return Row(
        name=row.arm if row.phase == "evaluation" else f"row {row.trajectory + 1}",
        queries=[clean(query) for query in row.queries],
        picks=row.picks,
        probs=[[None if p is None else _short(math.exp(min(p, 0))) for p in step] for step in row.selection_logprobs],
        rewards=[_short(reward) for reward in row.rewards],
        values=[_value(pool[p], lps) for p, lps in zip(row.picks, row.value_token_logprobs, strict=True)],
        kept=row.kept,
    )


def _value(pair: _Pair, logprobs: Sequence[float | None]) -> Value:
    num_tokens = len(pair.value_ids)
    share = 0.0 if pair.prior is None or not num_tokens else pair.prior / num_tokens
    exact = pair.value_tokens is not None and len(pair.value_tokens) == num_tokens
    tokens = pair.value_tokens if exact and pair.value_tokens is not None else _pieces(pair.value, num_tokens)
    gains = [None if p is None else _short(p - share) for p in logprobs[:num_tokens]]
    return Value(
        tokens=[clean(token if n else token.lstrip(), strip=False) for n, token in enumerate(tokens)],
        gains=gains + [None] * (num_tokens - len(gains)),
        has_prior=pair.prior is not None,
        exact=exact,
    )


def _pieces(text: str, count: int) -> list[str]:
    """Cut a text into pieces of equal length."""
    ends = [round(i * len(text) / count) for i in range(count + 1)] if count else []
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def _short(value: float | None) -> float | None:
    """Round to three significant digits."""
    return None if value is None else float(f"{value:.3g}")
