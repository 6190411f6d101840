"""A corpus of your own: the rows of a CSV file with the columns `title` and `text`."""

import csv
import hashlib
from collections.abc import Iterator

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.network import Network
from attention_guided_rl.records import Article


class CsvCorpus:
    """An article for each row, in the order of the file; a row without title or text is an empty place."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        """Read the file; what is wrong with it becomes one line and an exit code."""
        if config.path is None:
            raise ConfigError("corpus.kind: my_corpus:CsvCorpus needs corpus.path")
        try:
            with config.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise CorpusError(f"{config.path}: cannot be read as CSV: {error}") from error
        if not rows or not {"title", "text"} <= rows[0].keys():
            raise CorpusError(f"{config.path}: it needs a line with `title` and `text`, and a row below it")
        self._articles = [_article(row["title"] or "", row["text"] or "", config.path.name) for row in rows]

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield one pass from row `start` on; the order is the same in every epoch."""
        yield from self._articles[start:]


def _article(title: str, text: str, file_name: str) -> Article | None:
    if not title.strip() or not text.strip():
        return None
    digest = hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()
    return Article(
        id=f"csv:{digest[:16]}",
        title=title.strip(),
        text=text.strip(),
        source=f"csv:{file_name}",
        revision=digest[:12],
        url="",
        licence="",
    )
