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
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.hub_dataset import explained, open_dataset, parquet_file
from attention_guided_rl.data.plain_text import clean, one_line
from attention_guided_rl.errors import CorpusError
from attention_guided_rl.network import Network, Transient
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

BLOCK = 1000  # rows
TEXT_TYPES = ("string", "large_string", "string_view")

_ROW_ORDER, _FILE_ORDER = 1, 2  # third coordinate of the random numbers; other corpora have 0 there

_log = logging.getLogger(__name__)


class HubCorpus:
    """The rows of a data set with a text column; a place is a row, without an article where the text is empty."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        """Find the data set; rows are read later.

        Raises:
            CorpusError: there is no such column; and what `open_dataset` raises.
        """
        self._config, self._network = config, network
        self._columns = (config.text_column, "title", "url", "id")
        self._dataset = open_dataset(config, network)
        self._num_files: int = self._dataset.stream.num_shards
        self._num_rows: dict[int, int] = {}
        self.num_empty = 0
        """Rows without text met so far."""
        if (names := self._dataset.stream.column_names) is not None:
            self._check_columns(names, self._dataset.name)

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
        raise CorpusError(f"{self._dataset.name}: no article {title!r} with text, change corpus.title; {hint}")

    def _titles(self, table: "Table", file: int, block: int) -> list[str]:
        given = _strings(table.column("title")) if "title" in table.column_names else [None] * table.num_rows
        return [one_line(title) or _default_title(file, block * BLOCK + row) for row, title in enumerate(given)]

    def _read(self, table: "Table", file: int, block: int, rows: Iterable[int]) -> Iterator[Article | None]:
        """Yield the articles of some rows of a block."""
        columns = {name: _strings(table.column(name)) for name in self._columns if name in table.column_names}
        for row in rows:
            yield self._article({name: column[row] for name, column in columns.items()}, file, block * BLOCK + row)

    def _article(self, cells: dict[str, str | None], file: int, row: int) -> Article | None:
        text = clean(cells[self._config.text_column]).strip()
        if not text:
            self.num_empty += 1
            if self.num_empty == 1:
                _log.warning("%s: passed over a row without text, as any after it", self._dataset.where(file))
            return None
        return Article(
            id=f"hub:{self._dataset.name}:{one_line(cells.get('id')) or f'{file}-{row}'}",
            title=one_line(cells.get("title")) or _default_title(file, row),
            text=text,
            source=f"hub:{self._dataset.name}",
            revision=self._dataset.revision,
            url=one_line(cells.get("url")),
            licence=self._dataset.licence,
        )

    def _tables(self, file: int, first: int) -> Iterator["Table"]:
        """Yield the blocks of a file from number `first` on; after a lost connection it is opened again."""
        tables: Iterator[Table] | None = None
        block, num_rows = first, first * BLOCK

        def advance() -> "Table | None":
            nonlocal tables
            try:
                with explained(self._config, self._dataset.where(file)):
                    tables = tables or self._blocks(file, block)
                    return next(tables, None)
            except Transient:
                tables = None
                raise

        while (table := self._network.retry(self._dataset.where(file), advance)) is not None:
            self._check_type(table, file)
            block, num_rows = block + 1, num_rows + table.num_rows
            yield table
        self._num_rows[file] = num_rows

    def _blocks(self, file: int, first: int) -> Iterator["Table"]:
        if (address := self._dataset.parquet(file)) is not None:
            yield from _parquet_blocks(address, first, self._columns)
        else:  # in a shard alone, every batch but the last is full, whatever pieces the file comes in
            shard = self._dataset.stream.shard(num_shards=self._num_files, index=file).with_format("arrow")
            yield from itertools.islice(shard.iter(batch_size=BLOCK), first, None)

    def _rows_of(self, file: int) -> int | None:
        """Return the number of rows of a file if it was read before or states it itself, as Parquet does."""
        if file not in self._num_rows and (address := self._dataset.parquet(file)) is not None:

            def count() -> int:
                with explained(self._config, address), parquet_file(address) as opened:
                    return int(opened.metadata.num_rows)

            self._num_rows[file] = self._network.retry(address, count)
        return self._num_rows.get(file)

    def _check_columns(self, names: list[str], where: str) -> None:
        if self._config.text_column not in names:
            raise CorpusError(
                f"{where}: no column {self._config.text_column!r}; set corpus.text_column to one of {', '.join(names)}"
            )

    def _check_type(self, table: "Table", file: int) -> None:
        self._check_columns(table.column_names, self._dataset.where(file))
        kind = str(table.schema.field(self._config.text_column).type)
        if kind not in (*TEXT_TYPES, "null"):
            raise CorpusError(
                f"{self._dataset.where(file)}: column {self._config.text_column!r} holds {kind}, not text; "
                "set corpus.text_column to another"
            )


def _parquet_blocks(address: str, first: int, wanted: Sequence[str]) -> Iterator["Table"]:
    """Yield the blocks of a Parquet file from number `first` on, without reading what is before them.

    The library would read on in the background, up to the end of the file, while an article is used.
    """
    from pyarrow import Table, concat_tables

    with parquet_file(address) as file:
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
