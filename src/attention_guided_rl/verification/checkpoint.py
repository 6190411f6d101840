"""Checkpoint: is the newest one whole, finite, and of as many updates as it says.

The optimiser's own step counters are the witness: an update counts as done only where they moved, or where the run says
that it was empty or not finite.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.verification.reading import Json, read_object, read_tensors, unreadable

MOMENTS = {"exp_avg", "exp_avg_sq", "step"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says, and what was found in it."""

    path: Path
    update: int
    state: Json
    log_bytes: Mapping[str, int]
    num_files: int
    num_tensors: int
    num_steps: int
    """Steps that the optimiser counts."""


def newest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint of the largest update, whatever its state; what is staged or set aside is none."""
    found = {}
    for path in (run / "checkpoints").glob("update-*"):
        if number := re.fullmatch(r"update-(\d+)", path.name):
            found[int(number[1])] = path
    return found[max(found)] if found else None


def check_checkpoint(path: Path) -> Checkpoint:
    """Check manifest, files, tensors, state and counters of a checkpoint.

    Raises:
        CheckpointError: naming the first difference.
    """
    manifest = read_object(path / "manifest.json")
    listed, log_bytes = _check_manifest(path, manifest)
    tensors = {name: read_tensors(path / name) for name in sorted(listed) if name.endswith(".safetensors")}
    state = read_object(path / "state.json")
    counts = [state.get(name) for name in ("update", "empty_updates", "nonfinite_updates")]
    if any(type(count) is not int or count < 0 for count in counts):
        raise CheckpointError(f"{path / 'state.json'}: no usable counters")
    update, empty, nonfinite = counts
    if update != int(path.name.removeprefix("update-")):
        raise CheckpointError(f"{path / 'state.json'}: it is of update {update}")
    steps = update - empty - nonfinite
    if "optimizer.safetensors" not in tensors:
        raise CheckpointError(f"{path}: no optimizer.safetensors")
    _check_moments(path, tensors, steps)
    return Checkpoint(
        path=path, update=update, state=state, log_bytes=log_bytes, num_files=len(listed),
        num_tensors=sum(map(len, tensors.values())), num_steps=steps,
    )  # fmt: skip


def _check_manifest(path: Path, manifest: Json) -> tuple[dict[str, str], dict[str, int]]:
    """Return the files and log lengths of a manifest that fits its folder."""
    where = path / "manifest.json"
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if manifest.get("manifest_sha256") != digest:
        raise CheckpointError(f"{where}: its own SHA-256 differs")
    listed, log_bytes = manifest.get("sha256"), manifest.get("log_bytes")
    if not isinstance(listed, dict) or not isinstance(log_bytes, dict):
        raise CheckpointError(f"{where}: no files or no log_bytes")
    if any(type(length) is not int or length < 0 for length in log_bytes.values()):
        raise CheckpointError(f"{where}: log_bytes are not lengths")
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in sorted(present ^ set(listed)):
        raise CheckpointError(f"{path}: {name!r} is {'not in the manifest' if name in present else 'missing'}")
    for name, expected in listed.items():
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path / name, error) from None
        if found != expected:
            raise CheckpointError(f"{path / name}: its SHA-256 differs from the manifest")
    return listed, log_bytes


def _check_moments(path: Path, tensors: Mapping[str, Mapping[str, NDArray[Any]]], steps: int) -> None:
    """Check that every trained parameter has all of AdamW's state, after so many steps."""
    where, moments = path / "optimizer.safetensors", tensors["optimizer.safetensors"]
    found: dict[str, set[str]] = {}
    for name, value in moments.items():
        parameter, _, moment = name.rpartition("|")
        found.setdefault(parameter, set()).add(moment)
        if moment == "step" and value.tolist() != steps:
            raise CheckpointError(f"{where}: {value.tolist()} steps of {parameter!r}; the run counts {steps}")
    for parameter, has in found.items():
        if has != MOMENTS:
            raise CheckpointError(f"{where}: {parameter!r} has {sorted(has)}, not {sorted(MOMENTS)}")
    expected = len(tensors.get("adapter/adapter_model.safetensors", found))
    if steps and (not found or len(found) != expected):
        raise CheckpointError(f"{where}: moments of {len(found)} parameters where {expected} are trained")
