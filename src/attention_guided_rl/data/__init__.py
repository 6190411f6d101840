"""Corpora: where articles come from. `CORPORA` is the table; `package.module:name` in the configuration works too."""

from collections.abc import Callable
from pathlib import Path

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.dump import DumpCorpus
from attention_guided_rl.data.encyclopedia import EncyclopediaCorpus
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.network import Network

CORPORA: dict[str, Callable[[CorpusConfig, Network], Corpus]] = {
    "encyclopedia": lambda config, network: EncyclopediaCorpus(config),
    "files": lambda config, network: FilesCorpus(config),
    "dump": lambda config, network: DumpCorpus(config),
}


def is_private(config: CorpusConfig) -> bool:
    """Return whether the text is of this machine, as far as one can know: only what anybody can read is not."""
    from_hub = config.kind == "hub" and not Path(config.name or "").exists()
    return not from_hub and config.kind not in ("encyclopedia", "wikipedia")
