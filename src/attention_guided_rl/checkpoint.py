"""Checkpoints: what a run needs to go on bit for bit, written so that a reader sees a whole checkpoint or none.

A checkpoint is staged in a hidden folder; a manifest with the SHA-256 of every file and the length of every log is
written last; everything is fsynced; a rename is the commit point. Random numbers need no saving: they are counters.

    checkpoints/update-000050/{adapter/ | model/, optimizer.safetensors, state.json, manifest.json}

and ema.safetensors where the scorer is a moving average.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_guided_rl.data.pairs import Position
from attention_guided_rl.ema import EmaWeights
from attention_guided_rl.errors import CheckpointError, StorageError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.rl_agent import AgentState

logger = logging.getLogger(__name__)
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything that changes from update to update, apart from weights and optimiser moments."""

    update: int = 0
    """Updates done."""
    temperature: float
    """τ of the selection softmax."""
    embedder: str
    """Identity of the embedder that τ was calibrated for."""
    agent: AgentState = field(default_factory=AgentState)
    position: Position = field(default_factory=Position)
    empty_updates: int = 0
    """Updates without an optimiser step because no row was kept or every advantage was 0."""
    nonfinite_updates: int = 0
    """Updates skipped because a number was not finite."""
    nonfinite_in_a_row: int = 0
    last_good: int | None = None
    """The newest regular checkpoint whose weights have since written trajectories without an alarm."""


_STATE = TypeAdapter(RunState)


def checkpoint_path(run: Path, update: int) -> Path:
    """Return the folder of the checkpoint after this many updates."""
    return run / "checkpoints" / f"update-{update:06d}"


def save_checkpoint(
    run: Path,
    state: RunState,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    log_lengths: Mapping[str, int],
    readme: str,
    ema: EmaWeights | None = None,
) -> Path:
    """Write a checkpoint and return its folder.

    Raises:
        StorageError: the disk refused; the checkpoints before it are untouched.
    """
    final = checkpoint_path(run, state.update)
    staged = final.parent / f".staged-{final.name}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        weights = staged / ("model" if model.peft_model is None else "adapter")
        model.save(str(weights))
        (weights / "README.md").write_text(readme, encoding="utf-8")
        save_file(_moments(model, optimizer), staged / "optimizer.safetensors")
        if ema is not None:
            save_file(ema.state(), staged / "ema.safetensors")
        (staged / "state.json").write_text(json.dumps(asdict(state), indent=1, allow_nan=False), encoding="utf-8")
        _write_manifest(staged, log_lengths)
        if final.exists():  # the same update written again, say after a resume
            shutil.rmtree(final)
        os.rename(staged, final)
        _fsync(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{final}: cannot write the checkpoint: {reason}") from error
    return final


def latest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint that verifies.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted((run / "checkpoints").glob("update-*"), key=lambda p: (len(p.name), p.name), reverse=True)
    problems = []
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("damaged checkpoint stepped over: %s", problem)
        return path
    raise CheckpointError(f"{run}: no usable checkpoint" + (f" ({'; '.join(problems)})" if problems else ""))


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, extra or changed.
    """
    try:
        manifest: dict[str, Any] = parse_json((path / "manifest.json").read_bytes())
        own_digest = manifest.pop("manifest_sha256")
        if own_digest != _manifest_digest(manifest):
            raise ValueError("the manifest's own digest differs")
        listed: dict[str, str] = manifest["sha256"]
        schema = manifest["schema"]
        if not all(isinstance(manifest[name], dict) for name in ("sha256", "log_bytes")):
            raise ValueError("not a manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: written with schema {schema}, this version reads {SCHEMA}")
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in sorted(present ^ set(listed)):
        raise CheckpointError(f"{path}: {name} is {'not in the manifest' if name in present else 'missing'}")
    for name, digest in listed.items():
        if _sha256(path / name) != digest:
            raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs from the manifest)")
    return manifest


def load_checkpoint(
    path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer | None, ema: EmaWeights | None = None
) -> RunState:
    """Put weights, their average and optimiser moments back; return the state. The checkpoint has been verified.

    Raises:
        CheckpointError: it is whole, but not of this model or not one of ours: anyone can write a manifest.
    """
    state = _read_state(path)
    load_weights(path, model)
    try:
        if ema is not None:
            ema.load(load_file(path / "ema.safetensors"))
        if optimizer is not None:
            _restore_moments(model, optimizer, load_file(path / "optimizer.safetensors"))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the model: {_first_line(error)}") from None
    return state


def load_weights(path: Path, model: LanguageModel) -> None:
    """Put a checkpoint's weights into the policy.

    Raises:
        CheckpointError: they belong to another model or another kind of training.
    """
    folder = path / ("model" if model.peft_model is None else "adapter")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: has no {folder.name}/; model.adapter differs from the run's")
    try:
        model.load(str(folder))
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: does not fit the model: {_first_line(error)}") from None


def _read_state(path: Path) -> RunState:
    try:
        state: RunState = _STATE.validate_python(parse_json((path / "state.json").read_bytes()))
        json.dumps(asdict(state), allow_nan=False)  # as it was written: no number that is not finite
        if state.temperature <= 0:
            raise ValueError("its temperature is not positive")
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: state.json is not one of ours: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _moments(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the optimiser's state to `<parameter>|<moment>`; safetensors cannot nest."""
    flat = {}
    for name, parameter in model.named_trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}|{key}"] = value.detach().cpu().contiguous()
    return flat


def _restore_moments(model: LanguageModel, optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_trainable().items():
        state = {key.rpartition("|")[2]: value for key, value in flat.items() if key.rpartition("|")[0] == name}
        if any(value.shape != parameter.shape for key, value in state.items() if key != "step"):
            raise ValueError(f"the optimiser's moments of {name} have another shape")
        for key, value in state.items():  # AdamW keeps its step counter on the host
            optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def _write_manifest(staged: Path, log_lengths: Mapping[str, int]) -> None:
    files = sorted(p for p in staged.rglob("*") if p.is_file())
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "sha256": {str(p.relative_to(staged)): _sha256(p) for p in files},
        "log_bytes": dict(log_lengths),
    }
    path = staged / "manifest.json"
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for target in [*files, path, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        _fsync(target)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, its own digest left out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
