"""The warm parent, the service and the run that nothing disturbed, once for all tests of this folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_embeddings import KEY
from trials import LONG, SETTINGS, NoisyService, Trials
from warm import warm

from attention_guided_rl.config_files import config_to_yaml


@pytest.fixture(scope="session")
def make_trials(tmp_path_factory, make_config, licensed_corpus) -> Iterator[Callable[..., Trials]]:
    """Return the factory of trials of one setting: `make_trials({"training.updates": 40})`."""
    with NoisyService() as service, warm({"OPENAI_API_KEY": KEY}) as parent:
        given = {"embedder.base_url": service.url, "corpus.path": str(licensed_corpus)}

        def make(overrides: dict[str, Any] | None = None) -> Trials:
            root = tmp_path_factory.mktemp("trials")
            config = make_config({**SETTINGS, **given, **(overrides or {})})
            (root / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            return Trials(root, root / "config.yaml", parent, service)

        yield make


@pytest.fixture(scope="session")
def trials(make_trials) -> Trials:
    return make_trials()


@pytest.fixture(scope="session")
def long(make_trials) -> Trials:
    return make_trials(LONG)


@pytest.fixture(scope="session")
def licensed_corpus(tmp_path_factory, corpus_file) -> Path:
    """The eight articles, with a licence: so they are named in ATTRIBUTION.md."""
    path = tmp_path_factory.mktemp("licensed") / "articles.jsonl"
    lines = [json.loads(line) for line in corpus_file.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**x, "licence": "CC BY-SA 4.0"}) + "\n" for x in lines), encoding="utf-8")
    return path
