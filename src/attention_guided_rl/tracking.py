"""Tracking: the files of a run and what is seen on the terminal.

`metrics.jsonl` (one strict-JSON object per update, names in docs/metrics.md), `trajectories.jsonl`, `pairs.jsonl` and
`ATTRIBUTION.md` (where a text has a source to name) are append-only; a checkpoint records their lengths, and a resume
cuts them back to it. Only the main process writes.
"""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from attention_guided_rl.config import LogConfig
from attention_guided_rl.errors import CheckpointError, ConfigError, StorageError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.records import Article, PairPool, Rewards, Scores, TrajectoryBatch
from attention_guided_rl.screen import visible
from attention_guided_rl.storage import io_step, sync

LOGS = ("metrics.jsonl", "trajectories.jsonl", "pairs.jsonl")
ATTRIBUTION = "ATTRIBUTION.md"
_DIGITS = 6  # decimals of logged float32 numbers


class RunLogs:
    """The append-only logs of a run folder."""

    def __init__(self, run: Path, config: LogConfig, lengths: Mapping[str, int] | None = None) -> None:
        """Open the logs; with `lengths`, cut them back to a checkpoint first.

        Raises:
            CheckpointError: they are not what they were when the checkpoint was written.
            StorageError: the disk refuses.
        """
        self._attribution, pairs = run / ATTRIBUTION, run / "pairs.jsonl"
        self._files: dict[str, TextIO] = {}
        self._tensorboard: Any = None
        try:
            if lengths is not None:
                for name in LOGS:
                    _cut_back(run / name, lengths.get(name))
                if lengths.get(ATTRIBUTION) == 0:  # there was none; checkpoints of the first schema do not say
                    self._attribution.unlink(missing_ok=True)
                elif ATTRIBUTION in lengths:
                    _cut_back(self._attribution, lengths[ATTRIBUTION])
            for name in LOGS:
                io_step(f"open {name}")
                self._files[name] = (run / name).open("a", encoding="utf-8")
            with pairs.open("rb") as lines:
                self._written_pairs = {parse_json(line)["pair"] for line in lines}
            known = self._attribution.read_text(encoding="utf-8") if self._attribution.exists() else ""
            self._attributed = set(known.splitlines())
        except OSError as error:
            self.close()
            raise StorageError(f"{run}: cannot write the logs: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            self.close()
            raise CheckpointError(f"{pairs}: damaged; put it back from a copy, or start a new run") from None
        if config.tensorboard:
            self._tensorboard = _tensorboard_writer(run)

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Append one JSON line per record."""
        try:
            io_step(f"append {name}")
            for record in records:
                self._files[name].write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise StorageError(f"{self._files[name].name}: {error.strerror}") from error

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append an update's metrics."""
        self.write("metrics.jsonl", [record])
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "update":
                    self._tensorboard.add_scalar(name, value, record["update"])

    def pairs(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the pairs that this process has not written yet (memory is bounded: after many, one may recur)."""
        if len(self._written_pairs) > 200_000:
            self._written_pairs.clear()
        fresh = {r["pair"]: r for r in reversed(records) if r["pair"] not in self._written_pairs}
        self._written_pairs.update(fresh)
        self.write("pairs.jsonl", list(reversed(fresh.values())))

    def attribute(self, articles: Sequence[Article]) -> None:
        """List the articles whose text the run shows and that have a licence or an address, each once."""
        lines = {
            visible(f"- {a.title} ({a.source}, revision {a.revision}) {a.url} {a.licence}")
            for a in articles
            if a.licence or a.url
        }
        fresh = sorted(lines - self._attributed) if lines else []
        if not fresh:
            return
        if len(self._attributed) > 200_000:  # memory is bounded here too
            self._attributed.clear()
        self._attributed.update(fresh)
        try:
            io_step(f"append {ATTRIBUTION}")
            with self._attribution.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write("# Sources of the text in this run\n\nCleaned of markup and cut into passages.\n\n")
                file.write("".join(line + "\n" for line in fresh))
        except OSError as error:
            raise StorageError(f"{self._attribution}: {error.strerror}") from error

    def sync(self) -> dict[str, int]:
        """Make everything written durable and return the lengths of the logs in bytes.

        Raises:
            StorageError: the disk refuses.
        """
        run = self._attribution.parent
        try:
            for file in self._files.values():
                file.flush()
            paths = [run / name for name in (*LOGS, ATTRIBUTION)]
            there = [path for path in paths if path.exists()]
            for path in [*there, run]:
                sync(path)
            return {path.name: path.stat().st_size if path in there else 0 for path in paths}
        except OSError as error:
            raise StorageError(f"{run}: cannot write the logs: {error.strerror}") from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what a full disk did not take has been reported
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _cut_back(path: Path, length: int | None) -> None:
    """Shorten a log to what it was at a checkpoint.

    Raises:
        CheckpointError: it is shorter already, or the checkpoint does not know its length.
    """
    if not isinstance(length, int) or length < 0 or not path.is_file() or path.stat().st_size < length:
        raise CheckpointError(f"{path}: shorter than when the checkpoint was written; it was changed")
    with path.open("rb") as file:
        file.seek(max(0, length - 1))
        if length and file.read(1) != b"\n":
            raise CheckpointError(f"{path}: no line ends where one did when the checkpoint was written; it was changed")
    io_step(f"cut back {path.name}")
    os.truncate(path, length)


def trajectory_records(
    rows: TrajectoryBatch,
    rewards: Rewards,
    scores: Scores,
    pool: PairPool,
    model: LanguageModel,
    labels: Mapping[str, Any],
    first_index: int,
    kept: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Return one JSON-ready record per row; docs/metrics.md describes the fields."""
    group = rows.num_rows // pool.num_articles
    query_ids, real = rows.query_slots()
    ids, role, step = rows.ids.tolist(), rows.role.tolist(), rows.step.tolist()
    columns = {
        "picks": rows.picks.tolist(),
        "selection_logprobs": _nested(rows.selection_logprobs),
        "raw": _nested(rewards.raw),
        "baseline": _nested(rewards.baseline),
        "rewards": _nested(rewards.rewards),
        "value_token_logprobs": _nested(scores.value_logprobs),
        "sampled_logprobs": _nested(rows.sampled_logprobs),
    }
    if scores.counterfactual_ids is not None:
        columns["counterfactual_queries"] = scores.counterfactual_ids.tolist()
    texts = model.decode_rows(query_ids.flatten(0, 1), real.flatten(0, 1))
    all_kept = [True] * rows.num_rows if kept is None else kept.tolist()
    records = []
    for b in range(rows.num_rows):
        a, g = divmod(b, group)
        records.append(
            {
                "schema": 1,
                **labels,
                "index": first_index + a,
                "article": pool.articles[a].id,
                "trajectory": g,
                "pairs": pool.pair_ids[a],
                "ids": ids[b],
                "role": role[b],
                "step": step[b],
                "queries": texts[b * rows.num_steps : (b + 1) * rows.num_steps],
                **{name: column[b] for name, column in columns.items()},
                "probes": pool.probe_pair_ids[a],
                "kept": all_kept[b],
            }
        )
    return records


def pair_records(pool: PairPool, prior: Tensor, model: LanguageModel) -> list[dict[str, Any]]:
    """Return one JSON-ready record per pool pair and probe."""
    pool, prior, records = pool.to(torch.device("cpu")), prior.cpu(), []
    for a, article in enumerate(pool.articles):
        for probe, count in ((False, len(pool.pair_ids[a])), (True, len(pool.probe_pair_ids[a]))):
            prefix = "probe_" if probe else ""
            for n in range(count):
                key, value = (
                    getattr(pool, f"{prefix}{part}_ids")[a, n][getattr(pool, f"{prefix}{part}_mask")[a, n]].tolist()
                    for part in ("key", "value")
                )
                subject = int((pool.probe_subject if probe else pool.subject)[a, n])
                pair_id = (pool.probe_pair_ids if probe else pool.pair_ids)[a][n]
                records.append(
                    {
                        "pair": pair_id,
                        "article": article.id,
                        "source": article.source,
                        "revision": article.revision,
                        "hash": pair_id.rpartition("-")[0],
                        "position": int((pool.probe_position if probe else pool.position)[a, n]),
                        "title": article.title,
                        "subject": None if subject < 0 else subject,
                        "key_ids": key,
                        "value_ids": value,
                        "key": model.decode(key),
                        "value": model.decode(value),
                        "value_tokens": model.decode_tokens(value),
                        "prior": None if probe else _nested(prior[a, n : n + 1])[0],
                    }
                )
    return records


def environment_record() -> dict[str, Any]:
    """Return what the run was made with: versions and machine, nothing personal."""
    packages = ("attention-guided-rl", "torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class TrainingProgress:
    """A progress bar on a terminal, a plain line now and then elsewhere; it also times the updates."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console, self._total = console, total
        self._last_line = self._last_update = time.perf_counter()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console, transient=False)
            self._task = self._bar.add_task("training", total=total, completed=done)

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def seconds_since_last(self) -> float:
        """Return the time since the last call, or since the start."""
        now = time.perf_counter()
        seconds, self._last_update = now - self._last_update, now
        return seconds

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Show an update's metrics."""
        update = metrics["update"]
        line = f"reward {_shown(metrics['reward/mean'], '+.3f')}  kl {_shown(metrics['loss/kl'], '.3f')}"
        if self._bar is not None:
            self._bar.update(self._task, completed=update, description=line)
            return
        now = time.perf_counter()
        if update in (1, self._total) or now - self._last_line >= 10:
            self._last_line = now
            self._console.print(
                f"update {update}/{self._total}  {line}  {metrics['time/update_s']:.1f} s", highlight=False
            )


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _nested(values: Tensor) -> list[Any]:
    """Return nested lists of rounded numbers, None where one is not finite (JSON has no such number)."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(x) for x in item]
        return round(item, _DIGITS) if math.isfinite(item) else None

    return [plain(row) for row in values.tolist()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require_tensorboard() -> None:
    """Raise ConfigError if event files are asked for and cannot be written."""
    _tensorboard_class()


def _tensorboard_writer(run: Path) -> Any:
    return _tensorboard_class()(log_dir=str(run / "tensorboard"))


def _tensorboard_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "log.tensorboard needs the package tensorboard: pip install 'attention-guided-rl[tensorboard]'"
        ) from None
    return SummaryWriter
