"""A data set of the Hugging Face hub, or a folder of one, as a corpus: its split `train`, read as a stream.

In: the name, a subset, the column that holds the text. Out: one Article a row, in an order of our own.

With `corpus.shuffle`, the files are permuted, and within a file the rows of each block of BLOCK: a function of
(seed, file, block) alone, so reading can begin at any place and needs neither a shuffle buffer nor a saved state. The
order is the same in every pass, because near-duplicates are judged in the corpus's order: in another order another one
of two would stay, and what is held out in one pass could be read in the next. Every process reads in the same order and
keeps its own share of each update's articles (`PoolStream.next_pool`); no process has files of its own.
"""

import difflib
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.errors import AgrlError, ConfigError, CorpusError, CredentialsError, RemoteError, UnsafeError
from attention_guided_rl.network import Network, Transient, retry_after
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table  # type: ignore[import-untyped]

BLOCK = 1000  # rows
SPLIT = "train"
LICENCES = {"wikimedia/wikipedia": "CC BY-SA 3.0, GFDL"}  # where the card says nothing
TEXT_TYPES = ("string", "large_string", "string_view")

_ROW_ORDER, _FILE_ORDER = 1, 2  # third coordinate of the random numbers; other corpora have 0 there
_CARD = "README.md"
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # NUL and lone surrogates, which cannot be tokenised or written

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened data set; nothing in it but `files` names a place on this machine."""

    name: str
    revision: str
    licence: str
    stream: Any
    """The library's IterableDataset."""
    files: tuple[str, ...]
    """Address of each of its shards; empty if those are not whole files."""


class HubCorpus:
    """The rows of a data set with a text column; a place is a row, without an article where the text is empty."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        """Find the data set; rows are read later.

        Raises:
            CorpusError: there is no such data set, subset, revision, split or column, or a file is damaged.
            CredentialsError: the hub asks for a token, or for another one.
            RemoteError: the hub cannot be reached, or must not be while the cache lacks the data set.
            UnsafeError: the data set needs code from its repository, or names files elsewhere.
        """
        self._config, self._network = config, network
        self._columns = (config.text_column, "title", "url", "id")
        self._source = _open(config, network)
        self._num_files: int = self._source.stream.num_shards
        self._num_rows: dict[int, int] = {}
        self.num_empty = 0
        """Rows without text met so far."""
        if (names := self._source.stream.column_names) is not None:
            self._check_columns(names, self._source.name)

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield one pass from place `start` on, in the same order in every epoch; rows before it become no objects.

        Raises:
            CorpusError: a file is damaged, or none has the configured title.
            RemoteError: the connection is lost for longer than network.deadline_s.
        """
        if self._config.title is not None:
            yield from (self._only,)[start:]
            return
        for file in _order(self._num_files, self._config, 0, 0, _FILE_ORDER):
            num_rows = self._rows_of(file) if start else None
            if num_rows is not None and num_rows <= start:
                start -= num_rows
                continue
            first = start // BLOCK if num_rows is not None else 0
            start -= first * BLOCK
            for block, table in enumerate(self._tables(file, first), first):
                if table.num_rows <= start:
                    start -= table.num_rows
                    continue
                order = _order(table.num_rows, self._config, file, block, _ROW_ORDER)
                yield from self._read(table, file, block, order[start:])
                start = 0

    @functools.cached_property
    def _only(self) -> Article:
        """The first article with the configured title; kept, for every pass asks for it."""
        title, near = self._config.title or "", list[str]()
        for file in range(self._num_files):
            for block, table in enumerate(self._tables(file, 0)):
                titles = self._titles(table, file, block)
                same = [row for row, other in enumerate(titles) if other == title]
                for article in self._read(table, file, block, same):
                    if article is not None:
                        return article
                near = difflib.get_close_matches(title, [*near, *titles])
        hint = f"nearest: {', '.join(map(repr, near))}" if near else "none is near it"
        raise CorpusError(f"{self._source.name}: no article {title!r} with text, change corpus.title; {hint}")

    def _titles(self, table: "Table", file: int, block: int) -> list[str]:
        given = _strings(table.column("title")) if "title" in table.column_names else [None] * table.num_rows
        return [_one_line(title) or _default_title(file, block * BLOCK + row) for row, title in enumerate(given)]

    def _read(self, table: "Table", file: int, block: int, rows: Iterable[int]) -> Iterator[Article | None]:
        """Yield the articles of some rows of a block."""
        columns = {name: _strings(table.column(name)) for name in self._columns if name in table.column_names}
        for row in rows:
            yield self._article({name: column[row] for name, column in columns.items()}, file, block * BLOCK + row)

    def _article(self, cells: dict[str, str | None], file: int, row: int) -> Article | None:
        text = _clean(cells[self._config.text_column]).strip()
        if not text:
            self.num_empty += 1
            if self.num_empty == 1:
                _log.warning("%s: passed over a row without text, as any after it", self._where(file))
            return None
        return Article(
            id=f"hub:{self._source.name}:{_one_line(cells.get('id')) or f'{file}-{row}'}",
            title=_one_line(cells.get("title")) or _default_title(file, row),
            text=text,
            source=f"hub:{self._source.name}",
            revision=self._source.revision,
            url=_one_line(cells.get("url")),
            licence=self._source.licence,
        )

    def _tables(self, file: int, first: int) -> Iterator["Table"]:
        """Yield the blocks of a file from number `first` on; after a lost connection it is opened again."""
        tables: Iterator[Table] | None = None
        block, num_rows = first, first * BLOCK

        def advance() -> "Table | None":
            nonlocal tables
            try:
                with _explained(self._config, self._where(file)):
                    tables = tables or self._blocks(file, block)
                    return next(tables, None)
            except Transient:
                tables = None
                raise

        while (table := self._network.retry(self._where(file), advance)) is not None:
            self._check_type(table, file)
            block, num_rows = block + 1, num_rows + table.num_rows
            yield table
        self._num_rows[file] = num_rows

    def _blocks(self, file: int, first: int) -> Iterator["Table"]:
        if (address := self._parquet(file)) is not None:
            yield from _parquet_blocks(address, first, self._columns)
        else:  # in a shard alone, every batch but the last is full, whatever pieces the file comes in
            shard = self._source.stream.shard(num_shards=self._num_files, index=file).with_format("arrow")
            yield from itertools.islice(shard.iter(batch_size=BLOCK), first, None)

    def _rows_of(self, file: int) -> int | None:
        """Return the number of rows of a file if it was read before or states it itself, as Parquet does."""
        if file not in self._num_rows and (address := self._parquet(file)) is not None:

            def count() -> int:
                with _explained(self._config, address), _parquet_file(address) as opened:
                    return int(opened.metadata.num_rows)

            self._num_rows[file] = self._network.retry(address, count)
        return self._num_rows.get(file)

    def _parquet(self, file: int) -> str | None:
        """Return the address of a file if it is Parquet."""
        address = self._source.files[file] if self._source.files else ""
        return address if _is_parquet(address) else None

    def _where(self, file: int) -> str:
        return self._source.files[file] if self._source.files else f"{self._source.name}, file {file}"

    def _check_columns(self, names: list[str], where: str) -> None:
        if self._config.text_column not in names:
            raise CorpusError(
                f"{where}: no column {self._config.text_column!r}; set corpus.text_column to one of {', '.join(names)}"
            )

    def _check_type(self, table: "Table", file: int) -> None:
        self._check_columns(table.column_names, self._where(file))
        kind = str(table.schema.field(self._config.text_column).type)
        if kind not in (*TEXT_TYPES, "null"):
            raise CorpusError(
                f"{self._where(file)}: column {self._config.text_column!r} holds {kind}, not text; "
                "set corpus.text_column to another"
            )


def _open(config: CorpusConfig, network: Network) -> _Source:
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
        with _explained(config, f"data set {config.name}"):
            if folder.is_dir():
                return _open_folder(folder, folder.resolve().name, "local", config, network)
            if network.config.offline or huggingface_hub.is_offline_mode():
                return _open_snapshot(config, network)
            return _open_hub(config, network)
    except Transient as error:
        raise RemoteError(f"data set {config.name} cannot be reached: {error}") from error


def _open_hub(config: CorpusConfig, network: Network) -> _Source:
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
    return _source(builder, name, builder.hash[:12], card, config)  # of a data set of the hub, the hash is the commit


def _open_snapshot(config: CorpusConfig, network: Network) -> _Source:
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


def _open_folder(folder: Path, name: str, commit: str, config: CorpusConfig, network: Network) -> _Source:
    """Open a folder with data files; a subset is one that its card names, or a folder in it."""
    from datasets import load_dataset_builder

    card = _read_card(folder / _CARD) | _read_yaml(folder / ".huggingface.yaml")
    choices = [(folder, config.subset)]
    if config.subset is not None and (folder / config.subset).is_dir():
        choices.append((folder / config.subset, None))
    for place, subset in choices:
        try:
            builder = load_dataset_builder(str(place.resolve()), subset, cache_dir=str(network.cache("datasets")))
            break
        except (FileNotFoundError, ValueError):
            if (place, subset) == choices[-1]:
                raise
    return _source(builder, name, commit, card, config)


def _source(builder: Any, name: str, commit: str, card: dict[str, Any], config: CorpusConfig) -> _Source:
    files = tuple((builder.config.data_files or {}).get(SPLIT, ()))
    try:
        stream = builder.as_streaming_dataset(split=SPLIT)
    except ValueError as error:
        for file in files:
            with _explained(config, file):
                if _is_parquet(file):
                    with _parquet_file(file):  # the damaged one will not open, and is named
                        pass
        raise error
    licences = card.get("license") or builder.info.license or LICENCES.get(name, "")
    return _Source(
        name=name,
        revision=f"{config.subset or builder.config.name}@{commit}",
        licence=_one_line(licences if isinstance(licences, str) else ", ".join(map(str, licences))),
        stream=stream,
        files=files if len(files) == stream.num_shards else (),
    )


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
def _parquet_file(address: str) -> Iterator[Any]:
    from huggingface_hub import HfFileSystem
    from pyarrow import parquet

    with HfFileSystem().open(address) if address.startswith("hf://") else Path(address).open("rb") as file:
        yield parquet.ParquetFile(file)


def _parquet_blocks(address: str, first: int, wanted: Sequence[str]) -> Iterator["Table"]:
    """Yield the blocks of a Parquet file from number `first` on, without reading what is before them.

    The library would read on in the background, up to the end of the file, while an article is used.
    """
    from pyarrow import Table, concat_tables

    with _parquet_file(address) as file:
        names = file.schema_arrow.names
        columns = [name for name in names if name in wanted or wanted[0] not in names]  # else all, for the message
        skipped, group = first * BLOCK, 0
        while group < file.num_row_groups and (num_rows := file.metadata.row_group(group).num_rows) <= skipped:
            skipped, group = skipped - num_rows, group + 1
        groups = range(group, file.num_row_groups)
        rest = file.schema_arrow.empty_table().select(columns)
        for batch in file.iter_batches(BLOCK, row_groups=groups, columns=columns, use_threads=False):
            table = Table.from_batches([batch])
            rest = concat_tables([rest, table.slice(skipped)])
            skipped = max(0, skipped - table.num_rows)
            while rest.num_rows >= BLOCK:
                yield rest.slice(0, BLOCK)
                rest = rest.slice(BLOCK)
        if rest.num_rows:
            yield rest


@contextmanager
def _explained(config: CorpusConfig, where: str) -> Iterator[None]:
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

    name, cause = config.name, _one_line(str(error))[:300] or type(error).__name__
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
        return Transient(_one_line(str(error.__cause__ or error))[:300])
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


def _order(length: int, config: CorpusConfig, *coordinates: int) -> list[int]:
    if not config.shuffle:
        return list(range(length))
    return generator(config.seed, Purpose.SHUFFLE, *coordinates).permutation(length).tolist()


def _strings(column: "ChunkedArray") -> list[str | None]:
    """Return the cells as text; Parquet files may hold bytes that are none, which are left out."""
    if str(column.type) in TEXT_TYPES:
        cells = column.cast("large_binary").to_pylist()
        return [None if cell is None else cell.decode("utf-8", "ignore") for cell in cells]
    return [None if cell is None else str(cell) for cell in column.to_pylist()]


def _default_title(file: int, row: int) -> str:
    """Name a row by where it stands in the data set, whatever the order of reading: splits go by titles."""
    return f"row {row} of file {file}"


def _clean(text: str | None) -> str:
    return _NOT_TEXT.sub("", text or "").replace("\r\n", "\n").replace("\r", "\n")


def _one_line(text: str | None) -> str:
    return " ".join(_clean(text).split())
