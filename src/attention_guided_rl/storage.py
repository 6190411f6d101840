"""Storage: files that are whole or not there, durable when the call returns, and what makes a folder a run.

Every step that a killed process could leave half done is announced to `io_step` before it is made. Nobody listens but
the tests, which kill the process, fill the disk or send a signal at each of them.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from attention_guided_rl.errors import ConfigError, StorageError, UnsafeError

listener: Callable[[str], None] | None = None
"""Told the name of each step before it is made."""


def io_step(name: str) -> None:
    """Announce a step that changes what is on the disk."""
    if listener is not None:
        listener(name)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half.

    Raises:
        StorageError: the disk refuses.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `write_text` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():  # a device or pipe, which would be a file afterwards
            raise FileExistsError(errno.EEXIST, "not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            io_step(f"write {path.name}")
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                io_step(f"sync {path.name}")
                os.fsync(file.fileno())
            io_step(f"rename {path.name}")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Wait until the disk has a file, or which files a folder holds."""
    io_step(f"sync {path.name}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder its name and wait until the disk has it; a folder of that name is replaced."""
    aside = new.with_name(f".removed-{new.name}")
    if new.exists():
        remove_folder(aside)
        io_step(f"set aside {new.name}")
        os.rename(new, aside)
    io_step(f"rename {new.name}")
    os.rename(old, new)
    sync(new.parent)
    remove_folder(aside)


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be there. Its name goes first: what a killed process leaves is hidden."""
    if not folder.exists():
        return
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".removed-{folder.name}")
    if hidden != folder:
        remove_folder(hidden)
        io_step(f"set aside {folder.name}")
        os.rename(folder, hidden)
    io_step(f"remove {hidden.name}")
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half done in a folder that nobody else is working in.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        for path in [*folder.rglob(".*.tmp"), *folder.rglob(".staged-*"), *folder.rglob(".removed-*")]:
            io_step(f"remove {path.name}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot remove what is half done: {error.strerror}") from error


def run_config(folder: Path) -> Path:
    """Return the path of a run's config.yaml.

    Raises:
        ConfigError: this is no run folder.
        UnsafeError: a link in it leads elsewhere, so that what is written to the run would end there; or a pipe or
            device is in it, which may have no end.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder (it has no config.yaml)")
    inside = folder.resolve()
    for place, folders, files in os.walk(inside):
        for name in (*folders, *files):
            entry = Path(place, name)
            if not entry.is_file() and not entry.is_dir() and entry.exists():
                raise UnsafeError(f"{entry}: neither a file nor a folder, such as a pipe; refused (remove it)")
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise UnsafeError(f"{entry}: a link that leads out of the run folder; refused (move the folder whole)")
    return path
