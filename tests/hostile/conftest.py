"""A finished run to attack, and a way to change its checkpoint so that it still verifies."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from attention_guided_rl import runs


@pytest.fixture(scope="session")
def finished(make_config, tmp_path_factory) -> Path:
    """A run of one update, evaluated."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.train(make_config({"training.updates": 1, "evaluation.articles": 1}), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "run"))


@pytest.fixture(scope="session")
def sign():
    """Return the function that writes the manifest anew, as an attacker would."""

    def sign(checkpoint: Path) -> None:
        path = checkpoint / "manifest.json"
        files = [file for file in checkpoint.rglob("*") if file.is_file() and file != path]
        manifest = json.loads(path.read_text())
        manifest["sha256"] = {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        del manifest["manifest_sha256"]
        manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest))

    return sign
