"""Text files: which of a folder are read, and what is in them.

In: a path. Out: the .txt, .md and .jsonl files there, each also as .gz, and the clean text of each.
"""

import functools
import gzip
import logging
import zlib
from collections import Counter
from pathlib import Path

from attention_guided_rl.data.plain_text import clean
from attention_guided_rl.errors import CorpusError

SUFFIXES = (".txt", ".md", ".jsonl")
ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
ABOUT = ("readme", "license", "licence", "copying")  # files that say something about the folder at whose top they lie
MAX_UNPACKED = 2**28  # bytes of a .gz file: gzip packs a thousandfold, and all of a file stays in memory

_log = logging.getLogger(__name__)


def kind_of(path: Path) -> str:
    """Return the suffix that says what is in a file, without `.gz`."""
    return _unpacked_name(path).suffix.lower()


def title_of(path: Path) -> str:
    """Return the name of a file without its suffixes."""
    return _unpacked_name(path).stem


def list_files(path: Path) -> list[tuple[Path, str]]:
    """Return each file with its name in the corpus: relative to the folder, so that moving it changes nothing.

    Raises:
        CorpusError: there is none, or an archive lies among them, whose articles would be missing.
    """
    if path.is_file():
        _refuse_archive(path)
        if kind_of(path) not in SUFFIXES:
            raise CorpusError(f"{path}: {path.suffix!r} files are not supported; give {', '.join(SUFFIXES)}")
        return [(path, path.name)]
    if not path.is_dir():
        raise CorpusError(f"{path}: no such file or folder; correct corpus.path")
    found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    others: Counter[str] = Counter()
    for name, file in found:
        _refuse_archive(file)
        if kind_of(file) not in SUFFIXES and not any(part.startswith(".") for part in Path(name).parts):
            others[file.suffix.lower() or "no suffix"] += 1
    texts = [(file, name) for name, file in found if kind_of(file) in SUFFIXES]
    about = [name for file, name in texts if file.parent == path and title_of(file).lower() in ABOUT]
    files = [(file, name) for file, name in texts if name not in about]
    if not files:
        besides = f" besides {', '.join(about)}" if about else ""
        raise CorpusError(f"{path}: no {', '.join(SUFFIXES)} file in this folder{besides}; correct corpus.path")
    if about:
        warn_once(f"{path}: read {len(files)} files, and passed over {', '.join(about)}, which is about the folder")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        warn_once(f"{path}: passed over {others.total()} files that are not {', '.join(SUFFIXES)}: {kinds}")
    return files


def read_text(path: Path) -> str:
    """Return the clean text of a file.

    Raises:
        CorpusError: it cannot be read, is not UTF-8, or is a .gz file that is damaged or unpacks to too much.
    """
    try:
        return clean(_read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: byte {error.start} is not valid UTF-8; convert the file to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: damaged or cut off ({error}); pack the file again") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); make it readable or remove it") from error


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once however often a corpus is opened."""
    _log.warning(message)


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _refuse_archive(path: Path) -> None:
    if path.suffix.lower() in ARCHIVES or kind_of(path) in ARCHIVES:
        fix = "unpack it, and leave it out of corpus.path"
        fix = "for a dump of a wiki set corpus.kind: dump" if path.stem.lower().endswith(".xml") else fix
        raise CorpusError(f"{path}: archives are not read; {fix}")


def _read_bytes(path: Path) -> bytes:
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        unpacked = file.read(MAX_UNPACKED + 1)
    if len(unpacked) > MAX_UNPACKED:
        raise CorpusError(f"{path}: unpacks to more than {MAX_UNPACKED:,} bytes; unpack it, or pack it in parts")
    return unpacked
