"""Text, Markdown and JSONL files as a corpus.

In: a file or a folder. Out: its articles, a finite pass in file order or shuffled. Everything stays in memory, so the
files should be small; for a whole Wikipedia use `corpus.kind: dump`.

- `.txt`: a file is an article, its name the title.
- `.md`: likewise, but the first `# heading` is the title. Headings, emphasis and links become their words; images,
  comments, rules and link targets go; between code fences nothing changes, the fences themselves go.
- `.jsonl`: a line is an article, `{"title", "text"}`, or a ready pair, `{"key", "value"}` with an optional integer
  `subject`; consecutive pairs of the same `article` (or `title`) are one article, as are those that name none.
  Both may give `source`, `url`, `revision`, `licence` and `id`.

Each may be packed as `.gz`.
"""

import difflib
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.hygiene import without_near_duplicates
from attention_guided_rl.data.plain_text import clean, one_line
from attention_guided_rl.data.text_files import kind_of, list_files, read_text, title_of, warn_once
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article, PairText

MAX_BAD_SHARE = 0.1  # of the lines of a JSONL file; more suggest that it is something else
MAX_SUBJECT = 2**31  # labels end in 64-bit tensors
GIVEN_FIELDS = ("source", "url", "revision", "licence", "id")

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--[^<>]*-->")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*)")
_DROPPED_LINE = re.compile(  # a rule or the underline of a heading, a table's row of dashes, the target of links
    r"([-*_=])(?:\s?\1){2,}|\|?\s?:?---[-:|\s]*|\[[^\[\]]+\]:\s\S+(?:\s[\"'(].*)?"
)
_MARKUP = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"!\[[^\[\]]*\]\((?:[^()]|\([^()]*\))*\)", ""),
        (r"\[([^\[\]]*)\]\((?:[^()]|\([^()]*\))*\)", r"\1"),
        (r"\[([^\[\]]+)\]\[[^\[\]]*\]", r"\1"),
        (r"<(https?://[^<>\s]+)>", r"\1"),
        (r"</?[a-zA-Z]+(?:\s[^<>]*)?/?>", ""),
        (r"^\s*(?:>\s?)+", ""),
        (r"^\s*[-*+]\s+(?:\[[ xX]\]\s)?", ""),
        (r"(?<![\w*\\])\*{1,3}(?=[^\s*])|(?<=[^\s*\\])\*{1,3}(?![\w*])", ""),  # "2 * 3" and "2*3" stay
        (r"(?<![\w\\])_{1,3}(?=[^\s_])|(?<=[^\s_\\])_{1,3}(?!\w)", ""),  # "two_words" stays
        (r"`+", ""),
        (r"\\([!-/:-@\[-`{-~])", r"\1"),
    )
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a file says of an article; of a ready pair, an article with this pair alone."""

    title: str
    text: str
    pairs: tuple[PairText, ...] | None
    given: dict[str, str]
    """The further fields of Article that the file sets."""


class FilesCorpus:
    """The articles of a file, or of all files below a folder by relative path, held in memory."""

    def __init__(self, config: CorpusConfig) -> None:
        """Read the files; raise CorpusError if one is damaged, all are empty, or none has the configured title."""
        if config.path is None:
            raise ConfigError("corpus.kind: files needs corpus.path")
        articles = [article for path, name in list_files(config.path) for article in _read_file(path, name)]
        if not articles:
            raise CorpusError(f"{config.path}: empty, no article in it; set corpus.path to files with text")
        chosen = articles if config.title is None else _with_title(articles, config.title, config.path)
        self._articles = without_near_duplicates(chosen) if config.drop_near_duplicates else chosen
        self.num_near_duplicates = len(chosen) - len(self._articles)
        """Articles left out because they nearly repeat another; places count the rest."""
        if self.num_near_duplicates:
            warn_once(f"{config.path}: {self.num_near_duplicates} near-duplicates left out")
        self._shuffle = config.shuffle
        self._seed = config.seed

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield one pass from place `start` on; with `corpus.shuffle` each epoch has an order of its own."""
        order = list(range(len(self._articles)))
        if self._shuffle:
            order = generator(self._seed, Purpose.SHUFFLE, epoch).permutation(len(order)).tolist()
        for place in order[start:]:
            yield self._articles[place]


def _with_title(articles: list[Article], title: str, path: Path) -> list[Article]:
    chosen = [article for article in articles if article.title == title]
    if not chosen:
        near = difflib.get_close_matches(title, list(dict.fromkeys(article.title for article in articles)))
        hint = f"nearest: {', '.join(map(repr, near))}" if near else f"the first is {articles[0].title!r}"
        raise CorpusError(f"{path}: no article {title!r}, change corpus.title; {hint}")
    return chosen


def _read_file(path: Path, name: str) -> list[Article]:
    """Return the articles of a file; none, with a line in the log, if it is empty."""
    text, kind = read_text(path), kind_of(path)
    title = one_line(title_of(path)) or "untitled"
    if kind == ".jsonl":
        entries = _read_jsonl(path, text, title)
    else:
        heading, text = _strip_markdown(text) if kind == ".md" else ("", text.strip())
        entries = [_Entry(heading or title, text, None, {})] if text else []
    if not entries:
        _log.warning("%s: skipped, the file is empty", path)
    seen: Counter[str] = Counter()
    articles = []
    for entry in entries:
        articles.append(_article(entry, clean(name), seen[entry.title]))
        seen[entry.title] += 1
    return articles


def _article(entry: _Entry, name: str, namesakes: int) -> Article:
    """`namesakes`: articles before it in the file with the same title, which keep their ids apart."""
    identity = "\0".join([name, entry.title, *([str(namesakes)] if namesakes else [])])
    given = entry.given
    return Article(
        id=given.get("id", f"files:{_digest(identity)[:16]}"),
        title=entry.title,
        text=entry.text,
        source=given.get("source", f"files:{name}"),
        revision=given.get("revision", _digest(entry.text)[:12]),
        url=given.get("url", ""),
        licence=given.get("licence", ""),
        pairs=entry.pairs,
    )


def _read_jsonl(path: Path, text: str, default_title: str) -> list[_Entry]:
    """Skip and count bad lines; raise CorpusError if they are more than MAX_BAD_SHARE."""
    good: list[_Entry] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                good.append(_parse_line(line, default_title))
            except ValueError as error:
                bad.append((number, one_line(str(error))))
    if bad:
        total = len(good) + len(bad)
        report = f"{path}:{bad[0][0]}: {bad[0][1]}; {len(bad)} of {total} lines are unusable"
        if len(bad) > MAX_BAD_SHARE * total:
            raise CorpusError(f"{report}; give {{title, text}} or {{key, value}} in each")
        _log.warning("%s and skipped", report)
    return _join_pairs(good)


def _join_pairs(entries: list[_Entry]) -> list[_Entry]:
    """Make one entry of consecutive pairs with the same title."""
    joined = []
    for (title, is_pair), group in itertools.groupby(entries, lambda entry: (entry.title, entry.pairs is not None)):
        members = list(group)
        if is_pair:
            pairs = tuple(pair for member in members for pair in member.pairs or ())
            members = [_Entry(title, "\n".join(member.text for member in members), pairs, members[0].given)]
        joined += members
    return joined


def _parse_line(line: str, default_title: str) -> _Entry:
    """Raise ValueError with the reason if the line is neither an article nor a pair."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not an object but deeply nested lists") from error
    if type(row) is not dict:
        raise ValueError(f"not an object but {type(row).__name__}")
    given = {name: value for name in GIVEN_FIELDS if (value := one_line(_field(row, name)))}
    title = one_line(_field(row, "title"))
    if "key" not in row and "value" not in row:
        text = _field(row, "text")
        if not title or not text:
            raise ValueError("'title' or 'text' is missing or empty")
        return _Entry(title, text, None, given)
    key, value, subject = _field(row, "key"), _field(row, "value"), row.get("subject")
    if not key or not value:
        raise ValueError("'key' or 'value' is missing or empty")
    if subject is not None and (type(subject) is not int or not 0 <= subject < MAX_SUBJECT):
        raise ValueError("'subject' is not a small integer from 0 on")
    title = one_line(_field(row, "article")) or title or default_title
    return _Entry(title, f"{key} {value}", (PairText(key, value, subject),), given)


def _field(row: dict[str, Any], name: str) -> str:
    """Return a field as text; identifiers may be numbers, and what is null counts as missing."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) and (type(value) is not int or name not in GIVEN_FIELDS):
        raise ValueError(f"{name!r} is not text")
    return clean(str(value)).strip()


def _strip_markdown(text: str) -> tuple[str, str]:
    """Return the title, empty if there is none, and the text without markup."""
    title, in_code, lines = "", "", []
    for line in _COMMENT.sub("", _FRONT_MATTER.sub("", text)).split("\n"):
        fence = _FENCE.match(line)
        if fence and in_code in ("", fence[1]):
            in_code = "" if in_code else fence[1]
        elif in_code:
            lines.append(line)
        elif not _DROPPED_LINE.fullmatch(line.strip()):
            heading = _HEADING.match(line)
            words = heading[2].rstrip().rstrip("#").rstrip() if heading else line
            for pattern, replacement in _MARKUP:
                words = pattern.sub(replacement, words)
            lines.append(words.rstrip())
            if heading and len(heading[1]) == 1:
                title = title or one_line(words)
    return title, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
