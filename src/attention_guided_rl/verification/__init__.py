"""Verification: is a run done and consistent? Derived again from its files alone, by code that shares nothing with the
code that wrote them.

In: a run folder. Out: what was found, check by check, or the first difference. No torch, no model.
"""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.verification.checkpoint import Checkpoint, check_checkpoint, newest_checkpoint
from attention_guided_rl.verification.evaluation import check_records, check_summary, check_trajectories_of_arms
from attention_guided_rl.verification.logs import check_metrics, check_pairs
from attention_guided_rl.verification.reading import read_lines, read_object, unreadable
from attention_guided_rl.verification.settings import Asked, read_asked
from attention_guided_rl.verification.trajectories import Trajectories, check_trajectories

LOGS = ("metrics.jsonl", "trajectories.jsonl", "pairs.jsonl")


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that found nothing wrong."""

    check: str
    found: str


def verify_run(folder: Path, overrides: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Check a run, yielding what was found; when all is yielded, the run is complete and consistent.

    Of an unfinished run, what its newest checkpoint vouches for is checked first: the rest is cut off by a resume.
    `overrides`: the evaluation.* that `agrl evaluate` was given.

    Raises:
        ConfigError: this is no run folder.
        CheckpointError: naming the first difference, or what is missing and how to go on.
    """
    asked = read_asked(folder, overrides or {})
    yield Finding("config.yaml", f"{asked.updates} updates of {asked.articles} × {asked.trajectories} trajectories")
    path = newest_checkpoint(folder)
    if path is None:
        raise _without_checkpoint(folder, asked)
    checkpoint = check_checkpoint(path)
    yield Finding(
        f"checkpoints/{path.name}",
        f"{checkpoint.num_files} files as in the manifest, {checkpoint.num_tensors} tensors finite, "
        f"{checkpoint.num_steps} optimiser steps",
    )
    missing = _missing(folder, asked, checkpoint)
    lengths = {name: _length(checkpoint, name) if missing else None for name in LOGS}
    metrics_path, trajectories_path, pairs_path = (folder / name for name in LOGS)

    lines = read_lines(metrics_path, lengths["metrics.jsonl"])
    metrics = check_metrics(str(metrics_path), lines, asked, checkpoint.update, checkpoint.state)
    yield Finding("metrics.jsonl", f"updates 1 to {len(metrics)}, {len(metrics) * asked.rows} episodes")
    pairs = check_pairs(read_lines(pairs_path, lengths["pairs.jsonl"]))
    yield Finding("pairs.jsonl", f"{len(pairs)} pairs")
    lines = read_lines(trajectories_path, lengths["trajectories.jsonl"])
    found = check_trajectories(str(trajectories_path), lines, asked, pairs, metrics)
    yield Finding(
        "trajectories.jsonl",
        f"{found.num_training} of training, {found.num_evaluation} of the evaluation; "
        f"rewards of {found.num_recomputed} computed again",
    )
    _check_lengths(folder, checkpoint, found, finished=missing is None)
    yield Finding("log_bytes", "the logs are as long as the checkpoint says")
    if missing is not None:
        raise CheckpointError(f"{folder}: unfinished: {missing}; to go on: {_resume_command(folder)}")
    if asked.evaluation_articles:
        yield _check_evaluation(folder, asked, checkpoint, found)
        yield _check_report(folder)


def _missing(folder: Path, asked: Asked, checkpoint: Checkpoint) -> str | None:
    """Return what a run has not done yet, or None."""
    done = f"{checkpoint.update} of {asked.updates} updates"
    if checkpoint.update < asked.updates:
        return done
    if checkpoint.update > asked.updates:
        raise CheckpointError(f"{checkpoint.path}: {done}: more than training.updates asks for")
    if not asked.evaluation_articles:
        return None
    for name in ("evaluation.jsonl", "evaluation.json", "report.html"):
        if not (folder / name).is_file():
            return f"{done}, but no {name}"
    first = next(read_lines(folder / "evaluation.jsonl"), None)
    evaluated = checkpoint.update if first is None else first.record.get("update")
    if isinstance(evaluated, int) and evaluated < checkpoint.update:
        return f"{done}, but the evaluation is of update {evaluated}"
    return None


def _without_checkpoint(folder: Path, asked: Asked) -> CheckpointError:
    if any((folder / name).exists() and (folder / name).stat().st_size for name in LOGS):
        return CheckpointError(f"{folder}: no checkpoint, and the logs are not empty; start a new run")
    return CheckpointError(f"{folder}: unfinished: 0 of {asked.updates} updates; to go on: {_resume_command(folder)}")


def _resume_command(folder: Path) -> str:
    place = folder.resolve()
    command = f"agrl train --run {shlex.quote(place.name)} --resume"
    if place.parent != Path("runs").resolve():
        command += f" --runs-folder {shlex.quote(os.path.relpath(place.parent))}"
    return command


def _length(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.log_bytes:
        raise CheckpointError(f"{checkpoint.path / 'manifest.json'}: log_bytes lacks {name}")
    return checkpoint.log_bytes[name]


def _check_lengths(folder: Path, checkpoint: Checkpoint, found: Trajectories, *, finished: bool) -> None:
    """Check the logs against the lengths in the checkpoint; behind it may stand what a resume cuts off, and what an
    evaluation has added.
    """
    for name in sorted({*LOGS, *checkpoint.log_bytes}):
        expected = _length(checkpoint, name)
        if expected == 0 and name not in LOGS and not (folder / name).exists():
            continue  # there was no source to name
        try:
            length = (folder / name).stat().st_size
        except OSError as error:
            raise unreadable(folder / name, error) from None
        may_be_longer = not finished
        if name == "trajectories.jsonl":
            length, may_be_longer = found.training_bytes, False
        elif name != "metrics.jsonl":
            may_be_longer = may_be_longer or found.num_evaluation > 0
        if length < expected or (length > expected and not may_be_longer):
            raise CheckpointError(f"{folder / name}: {length} bytes; the checkpoint says {expected}")
    if found.last_pair_byte > _length(checkpoint, "pairs.jsonl"):
        raise CheckpointError(f"{folder / 'pairs.jsonl'}: pairs of training stand behind what the checkpoint covers")


def _check_evaluation(folder: Path, asked: Asked, checkpoint: Checkpoint, found: Trajectories) -> Finding:
    lines, summary, trajectories = (
        folder / name for name in ("evaluation.jsonl", "evaluation.json", "trajectories.jsonl")
    )
    try:
        arms = check_records(str(lines), read_lines(lines), asked, checkpoint.update)
        check_summary(str(summary), read_object(summary), arms)
        check_trajectories_of_arms(str(trajectories), found.evaluation, arms)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; to make it again: agrl evaluate {shlex.quote(str(folder))}") from None
    return Finding(
        "evaluation", f"{len(arms)} arms on {asked.evaluation_articles} articles; the means are of the lines"
    )


def _check_report(folder: Path) -> Finding:
    path = folder / "report.html"
    try:
        whole = path.read_bytes().rstrip().endswith(b"</html>")
    except OSError as error:
        raise unreadable(path, error) from None
    if not whole:
        raise CheckpointError(f"{path}: cut off; to make it again: agrl report {shlex.quote(str(folder))}")
    return Finding("report.html", "there, and whole")
