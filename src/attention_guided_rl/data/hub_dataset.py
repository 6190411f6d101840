"""Open a data set of the Hugging Face hub, or a folder of one: what it is, where its files are, what can go wrong.

In: the name, a subset, a revision. Out: a HubDataset, nothing of which is read yet but the card and the list of files.
What the libraries raise, here or while the rows are read, becomes one line of ours in `explained`.
"""

import difflib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.plain_text import one_line
from attention_guided_rl.errors import AgrlError, ConfigError, CorpusError, CredentialsError, RemoteError, UnsafeError
from attention_guided_rl.network import Network, Transient, retry_after

SPLIT = "train"
LICENCES = {"wikimedia/wikipedia": "CC BY-SA 3.0, GFDL"}  # where the card says nothing

_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """An opened data set; nothing in it but `files` names a place on this machine."""

    name: str
    revision: str
    licence: str
    stream: Any
    """The library's IterableDataset."""
    files: tuple[str, ...]
    """Address of each of its shards; empty if those are not whole files."""

    def where(self, file: int) -> str:
        """Name a file for a message."""
        return self.files[file] if self.files else f"{self.name}, file {file}"

    def parquet(self, file: int) -> str | None:
        """Return the address of a file if it is Parquet."""
        return self.files[file] if self.files and _is_parquet(self.files[file]) else None


def open_dataset(config: CorpusConfig, network: Network) -> HubDataset:
    """Find the data set in a folder, in the hub's own cache if offline, or on the hub.

    Raises:
        CorpusError: there is no such data set, subset, revision or split, or a file is damaged.
        CredentialsError: the hub asks for a token, or for another one.
        RemoteError: the hub cannot be reached, or must not be while the cache lacks the data set.
        UnsafeError: the data set needs code from its repository, or names files elsewhere.
    """
    if not config.name:
        raise ConfigError("corpus.kind: hub needs corpus.name")
    import datasets
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # after the import, which sets a level of its own
        logging.getLogger(library).setLevel(logging.CRITICAL)  # whatever matters is raised as well
    folder = Path(config.name)
    if not folder.is_dir() and (
        folder.exists() or folder.is_absolute() or config.name.startswith(".") or config.name.count("/") > 1
    ):
        raise CorpusError(f"corpus.name: there is no folder {config.name!r}")
    try:
        with explained(config, f"data set {config.name}"):
            if folder.is_dir():
                return _open_folder(folder, folder.resolve().name, "local", config, network)
            if network.config.offline or huggingface_hub.is_offline_mode():
                return _open_snapshot(config, network)
            return _open_hub(config, network)
    except Transient as error:
        raise RemoteError(f"data set {config.name} cannot be reached: {error}") from error


def _open_hub(config: CorpusConfig, network: Network) -> HubDataset:
    """Open a data set of the hub at the commit its card was read from, so that no later one gets mixed in."""
    from datasets import load_dataset_builder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    name = config.name or ""
    card, commit = dict[str, Any](), config.revision
    try:
        path = Path(hf_hub_download(name, _CARD, repo_type="dataset", revision=config.revision))
        card, commit = _read_card(path), path.parent.name
    except RemoteEntryNotFoundError:
        pass
    builder = load_dataset_builder(
        f"hf://datasets/{name}", config.subset, revision=commit, cache_dir=str(network.cache("datasets"))
    )
    return _dataset(builder, name, builder.hash[:12], card, config)  # of a data set of the hub, the hash is the commit


def _open_snapshot(config: CorpusConfig, network: Network) -> HubDataset:
    """Open what `hf download` left in the hub's own cache, without any connection."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, what = config.name or "", f"data set {config.name}" + (f", subset {config.subset}" if config.subset else "")
    try:
        files = [f"{config.subset}/*"] if config.subset else None
        folder = Path(
            snapshot_download(
                name, repo_type="dataset", revision=config.revision, local_files_only=True, allow_patterns=files
            )
        )
        return _open_folder(folder, name, folder.name[:12], config, network)
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        network.require_online(what)
        raise RemoteError(f"{what} is not in the cache, and HF_HUB_OFFLINE allows no connection") from error


def _open_folder(folder: Path, name: str, commit: str, config: CorpusConfig, network: Network) -> HubDataset:
    """Open a folder with data files; a subset is one that its card names, or a folder in it."""
    from datasets import load_dataset_builder

    card = _read_cards(folder)
    choices = [(folder, config.subset)]
    if config.subset is not None and (folder / config.subset).is_dir():
        _read_cards(folder / config.subset)  # the library would follow these too
        choices.append((folder / config.subset, None))
    for place, subset in choices:
        try:
            builder = load_dataset_builder(str(place.resolve()), subset, cache_dir=str(network.cache("datasets")))
            break
        except (FileNotFoundError, ValueError):
            if (place, subset) == choices[-1]:
                raise
    return _dataset(builder, name, commit, card, config)


def _dataset(builder: Any, name: str, commit: str, card: dict[str, Any], config: CorpusConfig) -> HubDataset:
    files = tuple((builder.config.data_files or {}).get(SPLIT, ()))
    try:
        stream = builder.as_streaming_dataset(split=SPLIT)
    except ValueError as error:
        for file in files:
            with explained(config, file):
                if _is_parquet(file):
                    with parquet_file(file):  # the damaged one will not open, and is named
                        pass
        raise error
    licences = card.get("license") or builder.info.license or LICENCES.get(name, "")
    return HubDataset(
        name=name,
        revision=f"{config.subset or builder.config.name}@{commit}",
        licence=one_line(licences if isinstance(licences, str) else ", ".join(map(str, licences))),
        stream=stream,
        files=files if len(files) == stream.num_shards else (),
    )


def _read_cards(folder: Path) -> dict[str, Any]:
    """Return what the files that describe a folder state."""
    return _read_card(folder / _CARD) | _read_yaml(folder / ".huggingface.yaml")


def _read_card(path: Path) -> dict[str, Any]:
    """Return what the head of a README.md states; nothing if there is none."""
    from huggingface_hub import DatasetCard

    return _checked(DatasetCard.load(path).data.to_dict()) if path.is_file() else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    return _checked(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def _checked(card: dict[str, Any]) -> dict[str, Any]:
    """Raise UnsafeError if a card names files outside its folder, which the library would open."""
    for subset in card.get("configs") or ():
        for pattern in _texts([subset.get("data_files"), subset.get("data_dir")]):
            if "::" in pattern or "://" in pattern or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
                raise UnsafeError(f"the card of the data set names files elsewhere: {pattern[:100]!r}; refused")
    return card


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _is_parquet(address: str) -> bool:
    return address.endswith(".parquet") and "::" not in address  # "::" is inside an archive


@contextmanager
def parquet_file(address: str) -> Iterator[Any]:
    """Open a file, here or on the hub, as pyarrow's ParquetFile."""
    from huggingface_hub import HfFileSystem
    from pyarrow import parquet

    with HfFileSystem().open(address) if address.startswith("hf://") else Path(address).open("rb") as file:
        yield parquet.ParquetFile(file)


@contextmanager
def explained(config: CorpusConfig, where: str) -> Iterator[None]:
    """Turn what the libraries raise into an error of ours, or into Transient if it may pass."""
    try:
        yield
    except (AgrlError, Transient):
        raise
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise _explain(error, config, where) from error


def _explain(error: Exception, config: CorpusConfig, where: str) -> Exception:
    import httpx2
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    name, cause = config.name, one_line(str(error))[:300] or type(error).__name__
    reply = error.response if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in cause:
        return CredentialsError(
            f"corpus.name: {name!r} is gated: accept its terms at https://huggingface.co/datasets/{name}, make a token "
            "at https://huggingface.co/settings/tokens, and set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CorpusError(f"corpus.revision: data set {name} has no revision {config.revision!r}")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError, DatasetNotFoundError)):
        return CorpusError(
            f"corpus.name: no data set {name!r}: it is neither a folder here nor on the hub, or it is private: then "
            "make a token that may read it at https://huggingface.co/settings/tokens, and set HF_TOKEN"
        )
    if reply is not None and reply.status_code in (401, 403):
        return CredentialsError(f"corpus.name: the hub refuses access to {name!r}; check or renew HF_TOKEN")
    if reply is not None and (reply.status_code in (408, 429) or reply.status_code >= 500):
        return Transient(f"the hub answers {reply.status_code}", retry_after(reply.headers))
    if isinstance(error, (ConnectionError, TimeoutError, httpx2.TransportError, errors.LocalEntryNotFoundError)):
        return Transient(one_line(str(error.__cause__ or error))[:300])
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in cause:
        return UnsafeError(f"corpus.name: {name!r} needs code from its repository; refused")
    return CorpusError(_reason(cause, config, where))


def _reason(cause: str, config: CorpusConfig, where: str) -> str:
    """Reword what the library says of a missing subset or split, with the names that exist."""
    names = re.findall(r"'([^']*)'", cause.rpartition("[")[2])
    near = difflib.get_close_matches(config.subset or "", names) or names[:5]
    listed = ", ".join(near) + (", …" if len(names) > len(near) else "")
    if "BuilderConfig" in cause and "not found" in cause:
        return f"{where}: no subset {config.subset!r}; set corpus.subset to another, such as {listed}"
    if "Config name is missing" in cause:
        return f"{where}: it has several subsets; set corpus.subset to one, such as {listed}"
    if cause.startswith("Bad split"):
        return f"{where}: no split {SPLIT!r}, only {', '.join(names)}"
    return f"{where}: cannot be read as a data set: {cause}"
