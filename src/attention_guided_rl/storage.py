"""Storage: files that are whole or not there, and what makes a folder a run."""

import os
from pathlib import Path

from attention_guided_rl.errors import ConfigError, StorageError


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half.

    Raises:
        StorageError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error


def run_config(folder: Path) -> Path:
    """Return the path of a run's config.yaml.

    Raises:
        ConfigError: this is no run folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder (it has no config.yaml)")
    return path
