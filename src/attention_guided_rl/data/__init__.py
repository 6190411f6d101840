"""Corpora: where articles come from. `CORPORA` is the table; `package.module:name` in the configuration works too."""

from collections.abc import Callable
from pathlib import Path

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.encyclopedia import EncyclopediaCorpus
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.data.hub import HubCorpus
from attention_guided_rl.data.hygiene import CleanCorpus
from attention_guided_rl.data.wikipedia import WikipediaCorpus
from attention_guided_rl.network import Network
from attention_guided_rl.tables import resolve

CORPORA: dict[str, Callable[[CorpusConfig, Network], Corpus]] = {
    "encyclopedia": lambda config, network: EncyclopediaCorpus(config),
    "files": lambda config, network: FilesCorpus(config),
    "dump": lambda config, network: DumpCorpus(config),
    "wikipedia": WikipediaCorpus,
    "hub": HubCorpus,
}


def open_corpus(config: CorpusConfig, network: Network) -> Corpus:
    """Open a corpus, its articles of other splits and its near-duplicates left out."""
    return CleanCorpus(resolve(CORPORA, config.kind, "corpus.kind")(config, network), config)


def is_private(config: CorpusConfig) -> bool:
    """Return whether the text may be nobody else's business: only what anybody can read is surely not."""
    from_hub = config.kind == "hub" and not Path(config.name or "").exists()
    from_wikipedia = config.kind == "wikipedia" and config.site is None
    return not (from_hub or from_wikipedia or config.kind == "encyclopedia")
