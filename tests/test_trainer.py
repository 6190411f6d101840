"""The training loop where things go wrong: numbers that are not finite, changed logs, a run that is extended."""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from failing import FailingEmbedder
from safetensors.torch import load_file, save_file

from attention_guided_rl import runs
from attention_guided_rl.checkpoint import checkpoint_path, latest_checkpoint
from attention_guided_rl.config import Config, LogConfig
from attention_guided_rl.config_files import load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import CheckpointError, ConfigError, NumericError, SpendError, StorageError
from attention_guided_rl.records import Article
from attention_guided_rl.session import Session
from attention_guided_rl.tracking import RunLogs
from attention_guided_rl.trainer import train

POISON = '''
from dataclasses import replace
from attention_guided_rl.reward import plain

calls = 0
poisoned = {poisoned}

def reward(inputs):
    """The plain reward; one number is NaN at the calls that are poisoned."""
    global calls
    calls += 1
    paid = plain(inputs)
    if calls in poisoned:
        raw = paid.raw.clone()
        raw[0, 0] = float("nan")
        return replace(paid, raw=raw)
    return paid
'''


@pytest.fixture
def poison(tmp_path, monkeypatch):
    """Return the factory of `package.module:name` rewards that are NaN at some calls."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, poisoned: set[int]) -> str:
        (tmp_path / f"{name}.py").write_text(POISON.format(poisoned=poisoned), encoding="utf-8")
        sys.modules.pop(name, None)
        return f"{name}:reward"

    return make


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_update_with_a_nan_reward_is_skipped_and_counted(make_config, poison, tmp_path):
    config = make_config({"reward.kind": poison("nan_once", {2}), "training.updates": 3})
    result = runs.train(config, tmp_path / "run")
    assert result.trained.state.nonfinite_updates == 1
    assert result.trained.state.nonfinite_in_a_row == 0
    records = metrics_of(tmp_path / "run")
    assert [r["guard/nonfinite_updates"] for r in records] == [0, 1, 1]
    assert records[1]["reward/mean"] is None
    assert records[1]["loss/total"] is None
    assert records[1]["optimizer/gradient_norm"] is None
    assert records[2]["loss/total"] is not None
    weights = load_file(checkpoint_path(tmp_path / "run", 3) / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_a_skipped_update_leaves_weights_and_statistics_as_they_were(make_config, poison, tmp_path):
    """Three updates of which the last is skipped end where two end."""
    skipped = runs.train(
        make_config({"reward.kind": poison("nan_last", {3}), "training.updates": 3}), tmp_path / "skipped"
    )
    clean = runs.train(
        make_config({"reward.kind": poison("nan_never", set()), "training.updates": 2}), tmp_path / "clean"
    )
    assert skipped.trained.state.agent == clean.trained.state.agent
    name = Path("adapter") / "adapter_model.safetensors"
    a, b = load_file(skipped.trained.checkpoint / name), load_file(clean.trained.checkpoint / name)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_three_in_a_row_stop_the_run(make_config, poison, tmp_path):
    config = make_config({"reward.kind": poison("nan_always", set(range(1, 99))), "training.updates": 9})
    with pytest.raises(NumericError, match="3 updates in a row"):
        runs.train(config, tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 3


def test_an_extended_run_remembers_how_far_it_should_go(make_config, tmp_path):
    runs.train(make_config({"training.updates": 1}), tmp_path / "run")
    runs.train(make_config({"training.updates": 2}), tmp_path / "run", resume=True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["training"]["updates"] == 2
    assert len(metrics_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "trajectories.jsonl", "pairs.jsonl"])
def test_a_log_that_was_shortened_is_refused(make_config, tmp_path, name):
    runs.train(make_config({"training.updates": 1}), tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        runs.train(make_config({"training.updates": 2}), tmp_path / "run", resume=True)


def test_pairs_and_sources_are_listed_once(make_config, tmp_path):
    """One article with a licence, read again and again."""
    path = tmp_path / "one.jsonl"
    text = " ".join(f"ba be bi bo bu by da de di do du dy {n}" for n in range(9))
    article = {"title": "One", "text": text, "licence": "CC BY-SA 4.0", "url": "https://example.org/One"}
    path.write_text(json.dumps(article) + "\n", encoding="utf-8")
    runs.train(make_config({"corpus.path": str(path), "training.updates": 3}), tmp_path / "run")
    pairs = [json.loads(line)["pair"] for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(set(pairs)) > 0
    attribution = (tmp_path / "run" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert attribution.count("https://example.org/One") == 1
    assert "CC BY-SA 4.0" in attribution


@pytest.mark.parametrize("finished", [0, 2])
def test_what_the_network_ends_loses_no_finished_update(make_config, tmp_path, monkeypatch, finished):
    """Whenever corpus or embedder give up, the run goes on from the update before, to the same end."""
    config = make_config({"embedder.kind": "failing:FailingEmbedder"})
    runs.train(config, tmp_path / "whole")
    monkeypatch.setattr(FailingEmbedder, "calls", 0)
    # 8 pools are looked at before; an update has 3 batches of queries and, for the steerability, 2 of keys as queries
    monkeypatch.setenv("FAIL_AT", str(8 + 5 * finished + 4))
    with pytest.raises(SpendError):
        runs.train(config, tmp_path / "broken")
    assert latest_checkpoint(tmp_path / "broken").name == f"update-{finished:06d}"
    assert len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) == finished
    monkeypatch.delenv("FAIL_AT")
    runs.train(config, tmp_path / "broken", resume=True)
    for name in ("trajectories.jsonl", "pairs.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Witness(Processes):
    """Writes down when processes would meet and when they would enter a collective."""

    def __init__(self):
        super().__init__("cpu")
        self.events = []

    def rendezvous(self, error=None):
        self.events.append("meet")
        super().rendezvous(error)

    def gather_rows(self, rows):
        self.events.append("collective")
        return super().gather_rows(rows)

    def sum_(self, tensors):
        self.events.append("collective")
        super().sum_(tensors)


def test_no_collective_waits_for_the_network(make_config, tmp_path):
    """In an update everything is embedded first, then the processes meet, and only then come collectives.

    They meet again after whatever one of them may have too little memory for, and over each checkpoint.
    """
    config = make_config({"embedder.kind": "failing:FailingEmbedder", "training.updates": 2})
    witness = Witness()
    session = Session(config, witness)
    for name in ("embed_queries", "embed_keys"):
        embed = getattr(session.embedder, name)

        def watched(ids, mask, embed=embed):
            witness.events.append("network")
            return embed(ids, mask)

        setattr(session.embedder, name, watched)
    (tmp_path / "run").mkdir()
    witness.events.clear()
    train(session, tmp_path / "run")
    shape = [event for event, _ in itertools.groupby(witness.events)]
    update = ["network", "meet", "collective", "meet", "collective", "meet", "collective"]  # rows, rewards, gradients
    assert shape == ["meet", *update, *update, "meet"]


def test_attribution_that_cannot_be_written_is_a_matter_of_storage(tmp_path):
    article = Article(id="a", title="Mill", text="", source="w", revision="1", url="u", licence="CC BY-SA 4.0")
    with RunLogs(tmp_path, LogConfig()) as logs:
        (tmp_path / "ATTRIBUTION.md").mkdir()
        with pytest.raises(StorageError, match=r"ATTRIBUTION\.md"):
            logs.attribute([article])


@pytest.mark.parametrize("licensed", [False, True])
def test_a_source_that_was_half_written_is_gone_after_a_resume(make_config, corpus_file, tmp_path, licensed):
    path = tmp_path / "articles.jsonl"
    lines = [json.loads(line) for line in corpus_file.read_text(encoding="utf-8").splitlines()]
    more = {"licence": "CC BY-SA 4.0"} if licensed else {}
    path.write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines), encoding="utf-8")
    config = make_config({"corpus.path": str(path), "training.updates": 1})
    runs.train(config, tmp_path / "run")
    with (tmp_path / "run" / "ATTRIBUTION.md").open("a", encoding="utf-8") as file:
        file.write("- art")
    runs.train(replace_updates(config, 2), tmp_path / "run", resume=True)
    runs.train(replace_updates(config, 2), tmp_path / "whole")
    attribution = [tmp_path / name / "ATTRIBUTION.md" for name in ("run", "whole")]
    assert [path.exists() for path in attribution] == [licensed, licensed]
    assert not licensed or attribution[0].read_bytes() == attribution[1].read_bytes()


# -- what a resume refuses ---------------------------------------------------------------------------------------------


def test_another_base_model_under_the_same_name_is_refused(make_config, model_folder, tmp_path):
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    config = make_config({"model.name": str(model), "training.updates": 1})
    runs.train(config, tmp_path / "run")
    weights = load_file(model / "model.safetensors")
    save_file({name: w * 1.01 for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the base model is not the one"):
        runs.train(replace_updates(config, 2), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="the base model is not the one"):
        runs.evaluate(tmp_path / "run", {"evaluation.articles": 1})


def test_another_tokenizer_under_the_same_name_is_refused(make_config, model_folder, tmp_path):
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    config = make_config({"model.name": str(model), "training.updates": 1})
    runs.train(config, tmp_path / "run")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ba"], vocabulary["be"] = vocabulary["be"], vocabulary["ba"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the tokenizer is not the one"):
        runs.train(replace_updates(config, 2), tmp_path / "run", resume=True)


def test_a_configuration_edited_by_hand_is_refused_with_the_difference(make_config, tmp_path):
    """The checkpoint has a copy of its own."""
    runs.train(make_config({"training.updates": 1}), tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.01 → 0\.02"):
        runs.train(load_config(files=[path]), tmp_path / "run", resume=True)


def test_logs_without_any_checkpoint_are_not_begun_anew(make_config, tmp_path):
    config = make_config({"training.updates": 1})
    runs.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="its checkpoints are gone"):
        runs.train(config, tmp_path / "run", resume=True)
    assert len(metrics_of(tmp_path / "run")) == 1


def replace_updates(config: Config, updates: int) -> Config:
    return replace(config, training=replace(config.training, updates=updates))
