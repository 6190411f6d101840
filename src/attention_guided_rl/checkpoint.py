"""Checkpoints: what a run needs to go on bit for bit, written so that a reader sees a whole checkpoint or none.

A checkpoint is staged in a hidden folder; a manifest with the SHA-256 of every file and the length of every log is
written last; everything is fsynced; a rename is the commit point. Random numbers need no saving: they are counters.

    checkpoints/update-000050/{adapter/ | model/, optimizer.safetensors, state.json, config.yaml, manifest.json}

and ema.safetensors where the scorer is a moving average.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_guided_rl.data.pairs import Position
from attention_guided_rl.ema import EmaWeights
from attention_guided_rl.errors import CheckpointError, NumericError, StorageError
from attention_guided_rl.guard import first_tensor
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.rl_agent import AgentState
from attention_guided_rl.storage import io_step, remove_folder, rename, sync

logger = logging.getLogger(__name__)
SCHEMA = 2


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
    micro_batch_rows: int | None = None
    """Rows at a time in scoring and update since memory ran out; None: it has not."""
    rollout_rows: int | None = None
    """Rows written at a time since memory ran out."""


_STATE = TypeAdapter(RunState)


def checkpoint_path(run: Path, update: int) -> Path:
    """Return the folder of the checkpoint after this many updates."""
    return run / "checkpoints" / f"update-{update:06d}"


def updates_of(path: Path) -> int:
    """Return the number of updates that a checkpoint's name tells; −1 for a name that is none."""
    number = path.name.removeprefix("update-")
    return int(number) if number.isdecimal() else -1


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, whatever their state; copies under other names are left alone."""
    found = [path for path in (run / "checkpoints").glob("update-*") if updates_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=updates_of, reverse=True)


def save_checkpoint(
    run: Path,
    state: RunState,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    log_lengths: Mapping[str, int],
    readme: str,
    ema: EmaWeights | None = None,
    *,
    config: str = "",
    fingerprints: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint and return its folder.

    `config`: the text of config.yaml; `fingerprints`: of what is not in the checkpoint, by name.

    Raises:
        StorageError: the disk refused; the checkpoints before it are untouched.
        NumericError: a weight or moment is not finite; the checkpoints before it are untouched.
    """
    final = checkpoint_path(run, state.update)
    moments, average = _moments(model, optimizer), {} if ema is None else ema.state()
    if bad := first_tensor([*model.named_trainable().items(), *moments.items(), *average.items()]):
        raise NumericError(f"{final}: not written, for {bad} is not finite; resuming goes back to before it was so")
    staged = final.parent / f".staged-{final.name}"
    with _storage_errors(final):
        try:
            remove_folder(staged)
            io_step(f"stage {final.name}")
            staged.mkdir(parents=True)
            weights = staged / ("model" if model.peft_model is None else "adapter")
            io_step("write weights")
            model.save(str(weights))
            (weights / "README.md").write_text(readme, encoding="utf-8")
            (staged / "config.yaml").write_text(config, encoding="utf-8")
            io_step("write optimizer.safetensors")
            save_file(moments, staged / "optimizer.safetensors")
            if ema is not None:
                io_step("write ema.safetensors")
                save_file(average, staged / "ema.safetensors")
            io_step("write state.json")
            (staged / "state.json").write_text(json.dumps(asdict(state), indent=1, allow_nan=False), encoding="utf-8")
            _write_manifest(staged, log_lengths, fingerprints)
        except (OSError, SafetensorError):
            shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the room
            raise
        rename(staged, final)
    return final


def remove_old_checkpoints(run: Path, keep: int | None, spared: int | None) -> None:
    """Remove all but the newest `keep` that verify, those newer than them, and the one of update `spared`.

    Raises:
        StorageError: the disk refused.
    """
    if keep is None:
        return
    good = 0
    for path in checkpoints(run):
        if good < keep:
            with contextlib.suppress(CheckpointError):
                verify(path)
                good += 1
        elif spared is None or path != checkpoint_path(run, spared):
            with _storage_errors(path):
                remove_folder(path)


def latest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint that verifies.

    Raises:
        CheckpointError: there is none.
    """
    found, problems = checkpoints(run), []
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("damaged checkpoint stepped over: %s", problem)
        if problems:
            lost = updates_of(found[0]) - updates_of(path)
            logger.warning("going back to %s: %d updates are lost and will be done again", path.name, lost)
        return path
    raise CheckpointError(f"{run}: no usable checkpoint" + (f" ({'; '.join(problems)})" if problems else ""))


def check_fingerprints(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare what a checkpoint was made with, by name, as its manifest says, with what there is now.

    Raises:
        CheckpointError: naming what differs.
    """
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            raise CheckpointError(f"{path}: {name} is not the one that the checkpoint was made with")


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
        manifest.setdefault("fingerprints", {})  # the first schema had none
        if not all(isinstance(manifest[name], dict) for name in ("sha256", "log_bytes", "fingerprints")):
            raise ValueError("not a manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from None
    if schema not in (1, SCHEMA):
        raise CheckpointError(f"{path}: written with schema {schema}, this version reads 1 to {SCHEMA}")
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
            ema.load(_load_finite(path / "ema.safetensors"))
        if optimizer is not None:
            _restore_moments(model, optimizer, _load_finite(path / "optimizer.safetensors"))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the model: {_first_line(error)}") from None
    return state


def load_weights(path: Path, model: LanguageModel) -> None:
    """Put a checkpoint's weights into the policy.

    Raises:
        CheckpointError: they belong to another model or another kind of training, or are not finite.
    """
    folder = path / ("model" if model.peft_model is None else "adapter")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: has no {folder.name}/; model.adapter differs from the run's")
    try:
        model.load(str(folder))
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: does not fit the model: {_first_line(error)}") from None
    if bad := first_tensor(model.named_trainable().items()):
        raise CheckpointError(f"{folder}: the tensor {bad} is not finite")


def _load_finite(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)
    if bad := first_tensor(tensors.items()):
        raise CheckpointError(f"{path}: the tensor {bad} is not finite")
    return tensors


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: cannot write the checkpoint: {reason}") from error


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


def _write_manifest(staged: Path, log_lengths: Mapping[str, int], fingerprints: Mapping[str, str]) -> None:
    files = sorted(p for p in staged.rglob("*") if p.is_file())
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "sha256": {str(p.relative_to(staged)): _sha256(p) for p in files},
        "log_bytes": dict(log_lengths),
        "fingerprints": dict(fingerprints),
    }
    path = staged / "manifest.json"
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    io_step("write manifest.json")
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for target in [*files, path, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        sync(target)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, its own digest left out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
