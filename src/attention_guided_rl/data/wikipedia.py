"""Wikipedia, or another MediaWiki, as a corpus: articles by title, by list, by category or at random.

In: titles, through the Action API of the wiki, one request at a time. Out: one Article of clean prose a title. What
was fetched once is kept on disk, pinned by its revision: a second run reads the same text and asks for nothing.
"""

import contextlib
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.article_cache import (
    CACHE_FOLDER,
    ArticleCache,
    CachedPage,
    CachedSite,
    CachedTitles,
    Reply,
    digest,
)
from attention_guided_rl.data.hygiene import without_near_duplicates
from attention_guided_rl.data.mediawiki import WIKIPEDIA_HOST, MediaWiki, WikiAddress, batches, normal_title, quoted
from attention_guided_rl.data.mediawiki_reply import EMPTY, INVALID, MISSING, SEVERAL
from attention_guided_rl.data.plain_text import clean, printable
from attention_guided_rl.data.wikitext import clean_wikitext
from attention_guided_rl.errors import ConfigError, CorpusError, UnsafeError
from attention_guided_rl.network import Network, web_address
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article

MAX_TITLE_FILE = 2**24  # bytes
REPEATED = "named twice"

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://")
_LINK = re.compile(r"\[\[([^\[\]|#:\n]{1,100})")

_log = logging.getLogger(__name__)


class WikipediaCorpus:
    """The articles of one wiki that the configuration names, held in memory, in the order of the list or shuffled."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        """Read all articles from the cache, and fetch those that are not in it.

        Raises:
            CorpusError: the one article is not there or is no article, or nothing is left of the list.
            RemoteError, CredentialsError: the wiki cannot be used, or must not be asked.
            UnsafeError: an address that is not of Wikipedia, or that leads to a private one.
        """
        address, titles = _address_and_titles(config)
        self.num_near_duplicates = self.num_skipped = 0
        """Near-duplicates, and titles of a list without an article of their own, that were left out."""
        self._shuffle, self._seed = config.shuffle, config.seed
        with contextlib.closing(MediaWiki(address, config.requests_per_second, network)) as wiki:
            library = _Library(wiki, ArticleCache(network.cache(CACHE_FOLDER), address.site), network)
            if config.title:
                self._articles = [library.article(titles[0])]
                return
            if config.category:
                titles = library.category(config.category, config.limit)
            elif config.random:
                titles = library.random(config.random, config.seed)
            articles = library.articles(titles)
        self.num_skipped = len(titles) - len(articles)
        self._articles = without_near_duplicates(articles) if config.drop_near_duplicates else articles
        self.num_near_duplicates = len(articles) - len(self._articles)
        if self.num_near_duplicates:
            _log.warning("%s: %d near-duplicates left out", address.host, self.num_near_duplicates)

    @property
    def pinned(self) -> str:
        """SHA-256 of the articles' ids and revisions, in order."""
        return digest(repr([(article.id, article.revision) for article in self._articles]))

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield one pass from place `start` on; with `corpus.shuffle` each epoch has an order of its own."""
        order = list(range(len(self._articles)))
        if self._shuffle:
            order = generator(self._seed, Purpose.SHUFFLE, epoch).permutation(len(order)).tolist()
        for place in order[start:]:
            yield self._articles[place]


def read_address(address: str) -> tuple[str, str]:
    """Return the language and the title that the address of a Wikipedia article holds.

    Raises:
        UnsafeError: it is not https, or not of Wikipedia.
        ConfigError: it names no article.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UnsafeError("corpus.title: refused an address that is not https://….wikipedia.org/wiki/…") from None
    wikipedia = WIKIPEDIA_HOST.fullmatch(host)
    if parts.scheme != "https" or wikipedia is None or port not in (None, 443) or "@" in parts.netloc:
        raise UnsafeError(
            f"corpus.title: refused an address at {printable(f'{parts.scheme}://{host}')}: only "
            "https://….wikipedia.org/wiki/… is taken; for another wiki give the title, and corpus.site"
        )
    named = parse_qs(parts.query).get("title")
    title = named[0] if named else unquote(parts.path.partition("/wiki/")[2])
    if not title:
        raise ConfigError("corpus.title: this address names no article; it ends in /wiki/ and the title")
    return wikipedia[1], normal_title(title)


def _address_and_titles(config: CorpusConfig) -> tuple[WikiAddress, tuple[str, ...]]:
    """Return the wiki and the configured titles; addresses among these name the wiki, which must be one."""
    given = (config.title,) if config.title else config.titles
    if config.path is not None:
        given = _read_titles(config.path)
    named = [read_address(title) if _ADDRESS.match(title) else (None, normal_title(title)) for title in given]
    languages = {language or config.language for language, _ in named} or {config.language}
    if len(languages) > 1 or (config.site is not None and any(language for language, _ in named)):
        wikis = f"Wikipedia in {', '.join(sorted(languages))}"
        raise ConfigError(f"corpus.title: a corpus has one wiki, got {wikis}; give titles, and corpus.language or site")
    titles = tuple(dict.fromkeys(title for _, title in named))
    if config.site is not None:
        site = web_address(config.site)
        wikipedia = WIKIPEDIA_HOST.fullmatch(site.host)
        return WikiAddress(str(site), site.host, wikipedia[1] if wikipedia else site.host, trusted=True), titles
    (language,) = languages
    host = f"{language}.wikipedia.org"
    return WikiAddress(f"https://{host}/w/api.php", host, language, trusted=False), titles


def _read_titles(path: Path) -> tuple[str, ...]:
    """Return the lines of a file that are neither empty nor a comment."""
    try:
        if path.stat().st_size > MAX_TITLE_FILE:
            raise CorpusError(f"{path}: too large for a list of titles; set corpus.path to a text file, one a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: byte {error.start} is not valid UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); set corpus.path to a file of titles") from error
    titles = tuple(line for line in lines if line and not line.startswith("#"))
    if not titles:
        raise CorpusError(f"{path}: no title in it; write one in each line")
    return titles


class _Library:
    """The pages of one wiki, from the cache or else from the wiki, and then kept."""

    def __init__(self, wiki: MediaWiki, cache: ArticleCache, network: Network) -> None:
        self._wiki, self._cache, self._network = wiki, cache, network
        self._address = wiki.address

    def article(self, title: str) -> Article:
        """Return the article with a title; raise CorpusError with a hint if there is none."""
        (page,) = self._pages((title,), keep_problems=False)
        article = self._article(page)
        if isinstance(article, Article):
            return article
        hint = "change corpus.title"
        if article == SEVERAL:
            meanings = list(dict.fromkeys(link.strip() for link in _LINK.findall(page.wikitext)))
            hint = f"set corpus.title to one of its meanings: {quoted(meanings)}"
        elif article in (MISSING, INVALID):
            hint = self._wiki.nearest(title) or hint
        raise CorpusError(f"{self._address.host}: {title[:200]!r}: {article}; {hint}")

    def articles(self, titles: Sequence[str]) -> list[Article]:
        """Return the articles with these titles; what is none is counted and left out.

        Raises:
            CorpusError: nothing is left.
        """
        articles: dict[str, Article] = {}
        skipped: Counter[str] = Counter()
        for page in self._pages(titles, keep_problems=True):
            article = self._article(page)
            if isinstance(article, str) or article.id in articles:
                skipped[article if isinstance(article, str) else REPEATED] += 1
            else:
                articles[article.id] = article
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            report = f"{self._address.host}: skipped {skipped.total()} of {len(titles)} titles: {reasons}"
            if not articles:
                raise CorpusError(f"{report}; set other titles")
            _log.warning(report)
        return list(articles.values())

    def category(self, name: str, limit: int) -> tuple[str, ...]:
        """Return the titles of the first articles of a category."""
        name = normal_title(name)
        named = name.partition(":")[0].lower() in self._site.no_prose
        fetch = functools.partial(self._wiki.category, name if named else f"Category:{name}", limit)
        return self._titles(f"category {name!r}, {limit}", fetch, similar=name)

    def random(self, count: int, seed: int) -> tuple[str, ...]:
        """Return random titles, the same ever after."""
        return self._titles(f"random {count}, seed {seed}", functools.partial(self._wiki.random, count))

    @functools.cached_property
    def _site(self) -> CachedSite:
        return self._cached(CachedSite, "the wiki itself", self._wiki.about)

    def _titles(self, requested: str, fetch: Callable[[], tuple[str, ...]], similar: str = "") -> tuple[str, ...]:
        def fetch_some(requested: str) -> CachedTitles:
            titles = fetch()
            if not titles:
                hint = self._wiki.nearest(similar, "14") if similar else ""
                raise CorpusError(f"{self._address.host}: {requested}: no articles; {hint or 'name another'}")
            return CachedTitles(site=self._address.site, requested=requested, titles=titles)

        return self._cached(CachedTitles, requested, fetch_some).titles

    def _cached(self, shape: type[Reply], requested: str, fetch: Callable[[str], Reply]) -> Reply:
        cached = self._cache.read(shape, requested)
        if cached is None:
            self._network.require_online(f"{self._address.host}: {requested}")
            with self._cache.lock():
                cached = self._cache.read(shape, requested)
                if cached is None:
                    cached = fetch(requested)
                    self._cache.write(cached)
        return cached

    def _pages(self, titles: Sequence[str], *, keep_problems: bool) -> list[CachedPage]:
        """Return the page of each title. `keep_problems`: what is no article is not asked for again either."""
        found = self._look_up(titles, keep_problems)
        missing = [title for title in titles if title not in found]
        if missing:
            self._network.require_online(f"{self._address.host}: {missing[0][:200]!r}")
            licence = self._site.licence
        for batch in batches(missing):
            with self._cache.lock():
                found |= self._look_up(batch, keep_problems)
                for page in self._damaged([title for title in batch if title not in found], licence):
                    found[page.requested] = page
                    self._cache.write(page)
                for page in self._wiki.pages([title for title in batch if title not in found], licence):
                    found[page.requested] = page
                    if keep_problems or not page.problem:
                        self._cache.write(page)
            _log.info("%s: %d of %d pages", self._address.host, len(found), len(titles))
        return [found[title] for title in titles]

    def _damaged(self, titles: Sequence[str], licence: str) -> Iterator[CachedPage]:
        """Fetch what is damaged in the cache in the revision that was there, where the wiki still has that."""
        for title in titles:
            lost = self._cache.damaged_revision(title)
            if lost is None:
                continue
            page = self._wiki.revision(title, *lost, licence)
            if page is not None:
                yield page
            else:
                _log.warning(
                    "%s: the cache's copy of %r in revision %d is damaged, and the wiki no longer shows that revision; "
                    "its newest is read. A run begun with revision %d cannot go on: put the file of the cache back "
                    "from a backup, or start a new run",
                    self._address.host, title, lost[1], lost[1],
                )  # fmt: skip

    def _look_up(self, titles: Sequence[str], with_problems: bool) -> dict[str, CachedPage]:
        pages = {title: self._cache.read(CachedPage, title) for title in titles}
        return {title: page for title, page in pages.items() if page and (with_problems or not page.problem)}

    def _article(self, page: CachedPage) -> Article | str:
        """Return the article, or why the page is none."""
        if page.problem:
            return page.problem
        text = clean(clean_wikitext(page.wikitext, frozenset(self._site.no_prose)))
        if not text:
            return EMPTY
        return Article(
            id=f"wikipedia:{self._address.label}:{page.page_id}",
            title=page.title,
            text=text,
            source=f"wikipedia:{self._address.label}",
            revision=str(page.revision),
            url=page.url,
            licence=page.licence,
        )
