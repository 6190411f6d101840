"""Checkpoints: everything comes back, damage of any file is seen and named, and the adapter is an ordinary one."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from attention_guided_rl.checkpoint import (
    RunState,
    check_fingerprints,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    remove_old_checkpoints,
    save_checkpoint,
    updates_of,
    verify,
)
from attention_guided_rl.data.pairs import Position
from attention_guided_rl.errors import CheckpointError, StorageError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.rl_agent import AgentState, RunningMoments

STATE = RunState(
    embedder="hashing/words/64/unit",
    update=2,
    temperature=0.1 + 0.2,  # not a short decimal
    agent=AgentState(
        scale=1 / 3,
        rewards=RunningMoments(7, -2 / 7, 1e-17),
        returns=(RunningMoments(7, 0.1, 3.0), RunningMoments(7, -1e300, 0.0), RunningMoments()),
    ),
    position=Position(epoch=3, offset=5, drawn=20, last_article="00ab"),
    empty_updates=1,
    nonfinite_updates=2,
    nonfinite_in_a_row=1,
)
LOGS = {"metrics.jsonl": 1234, "trajectories.jsonl": 567, "pairs.jsonl": 89}
README = "# A query policy\n"


def trained(model: LanguageModel, steps: int = 2, seed: int = 0) -> torch.optim.AdamW:
    """Take optimiser steps on made-up gradients."""
    optimizer = torch.optim.AdamW(model.named_trainable().values(), lr=0.01)
    for step in range(steps):
        step_on(model, optimizer, seed + step)
    return optimizer


def step_on(model: LanguageModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in model.named_trainable().values():
        parameter.grad = torch.randn(parameter.shape, generator=numbers)
    optimizer.step()


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_trainable().items()}


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logprobs(model: LanguageModel, ids: Tensor) -> Tensor:
    """log p of every token but the first."""
    with torch.no_grad():
        return model.token_logprobs(ids, torch.zeros_like(ids), torch.arange(1, ids.shape[1]))


def plain_logprobs(causal_lm, ids: Tensor) -> Tensor:
    """The same from a model of transformers or peft, nothing of ours involved."""
    with torch.no_grad():
        logits = causal_lm.eval()(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


IDS = torch.tensor([[1, 5, 9, 33, 7, 20, 6], [1, 40, 41, 4, 4, 17, 50]])


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory) -> Path:
    """A run folder with checkpoints of the updates 1 and 2."""
    run = tmp_path_factory.mktemp("run")
    model = make_model("llama")
    for update in (1, 2):
        optimizer = trained(model, seed=update)
        save_checkpoint(run, replace(STATE, update=update), model, optimizer, LOGS, README, config="seed: 0\n")
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adapter": "full"}], ids=["lora", "full"])
def test_state_weights_and_moments_come_back_bit_by_bit(make_model, tmp_path, options):
    before = make_model("llama", **options)
    optimizer = trained(before)
    path = save_checkpoint(tmp_path, STATE, before, optimizer, LOGS, README)

    after = make_model("llama", **options)
    fresh = torch.optim.AdamW(after.named_trainable().values(), lr=0.01)
    assert load_checkpoint(path, after, fresh) == STATE
    assert_bit_equal(weights(after), weights(before))

    step_on(before, optimizer, seed=9)  # only the same moments and step counts take the same third step
    step_on(after, fresh, seed=9)
    assert_bit_equal(weights(after), weights(before))


def test_a_state_before_the_first_update_comes_back(make_model, tmp_path):
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.named_trainable().values())
    path = save_checkpoint(tmp_path, RunState(temperature=0.5, embedder="x"), model, optimizer, {}, README)
    assert load_checkpoint(path, model, optimizer) == RunState(temperature=0.5, embedder="x")
    assert path == checkpoint_path(tmp_path, 0)


def test_the_manifest_keeps_the_lengths_of_the_logs(saved):
    assert verify(checkpoint_path(saved, 2))["log_bytes"] == LOGS


def test_loading_leaves_the_reference_alone(make_model, saved):
    model = make_model("llama")
    with model.reference():
        before = logprobs(model, IDS)
    load_weights(checkpoint_path(saved, 2), model)
    with model.reference():
        assert torch.equal(logprobs(model, IDS), before)
    assert not torch.allclose(logprobs(model, IDS), before, atol=1e-3)


def test_the_adapter_loads_with_peft_alone(make_model, causal_lm, shaken, tmp_path):
    model = shaken(make_model("llama"))
    path = save_checkpoint(tmp_path, STATE, model, trained(model), LOGS, README)
    plain = PeftModel.from_pretrained(causal_lm("llama"), str(path / "adapter"))
    torch.testing.assert_close(plain_logprobs(plain, IDS), logprobs(model, IDS), atol=1e-5, rtol=0)
    assert (path / "adapter" / "README.md").read_text(encoding="utf-8") == README


def test_a_fully_trained_model_loads_with_transformers_alone(make_model, shaken, tmp_path):
    model = shaken(make_model("llama", adapter="full"))
    path = save_checkpoint(tmp_path, STATE, model, trained(model), LOGS, README)
    plain = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    torch.testing.assert_close(plain_logprobs(plain, IDS), logprobs(model, IDS), atol=1e-5, rtol=0)


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    suffixes = {path.suffix for path in checkpoint_path(saved, 2).rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md", ".yaml"}


# -- which one is used -------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_used(run):
    assert latest_checkpoint(run) == checkpoint_path(run, 2)


def test_updates_are_compared_as_numbers(make_model, tmp_path):
    model = make_model("llama")
    optimizer = trained(model)
    for update in (999_999, 1_000_000):
        save_checkpoint(tmp_path, replace(STATE, update=update), model, optimizer, LOGS, README)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


def test_a_half_written_checkpoint_does_not_count(run):
    shutil.copytree(checkpoint_path(run, 2), run / "checkpoints" / ".staged-update-000003")
    assert latest_checkpoint(run) == checkpoint_path(run, 2)


def test_saving_clears_what_an_interrupted_save_left(make_model, run):
    left = run / "checkpoints" / ".staged-update-000003"
    left.mkdir()
    (left / "old").write_text("half", encoding="utf-8")
    model = make_model("llama")
    path = save_checkpoint(run, replace(STATE, update=3), model, trained(model), LOGS, README)
    verify(path)
    assert sorted(p.name for p in path.parent.iterdir()) == [f"update-00000{i}" for i in (1, 2, 3)]


def test_the_same_update_can_be_written_again(make_model, run):
    model = make_model("llama")
    path = save_checkpoint(run, replace(STATE, temperature=9.0), model, trained(model), LOGS, README)
    assert load_checkpoint(latest_checkpoint(run), model, None).temperature == 9.0
    assert path == checkpoint_path(run, 2)


def test_without_a_checkpoint_the_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}.*no usable checkpoint"):
        latest_checkpoint(tmp_path)


# -- damage ------------------------------------------------------------------------------------------------------------


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())


def flip(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


DAMAGE = {
    "first byte": lambda data: flip(data, 0),
    "middle byte": lambda data: flip(data, len(data) // 2, 3),
    "last byte": lambda data: flip(data, len(data) - 1),
    "last byte missing": lambda data: data[:-1],
    "half missing": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a byte more": lambda data: data + b"\0",
    "zeroed page": lambda data: bytes(min(512, len(data))) + data[512:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(run, damage):
    newest = checkpoint_path(run, 2)
    for name in files_of(newest):
        path = newest / name
        good = path.read_bytes()
        path.write_bytes(DAMAGE[damage](good))
        with pytest.raises(CheckpointError) as error:
            verify(newest)
        assert str(newest) in str(error.value)
        assert name in str(error.value)
        assert latest_checkpoint(run) == checkpoint_path(run, 1), name
        path.write_bytes(good)
    assert latest_checkpoint(run) == newest  # it was each of them alone


def test_damage_anywhere_is_noticed_and_the_older_checkpoint_used(run):
    """Bits flipped, files cut, zeroed, swapped or removed, at places drawn at random."""
    numbers = random.Random(0)
    newest = checkpoint_path(run, 2)
    files = {name: (newest / name).read_bytes() for name in files_of(newest)}
    unnoticed = []
    for trial in range(1700 if os.environ.get("AGRL_TORTURE") else 200):
        name = numbers.choice(list(files))
        good, place = files[name], numbers.randrange(len(files[name]))
        bad = {
            "flipped": flip(good, place, numbers.randrange(8)),
            "cut": good[:place],
            "zeroed": good[:place] + bytes(len(good) - place),
            "swapped": numbers.choice([other for other in files.values() if other != good]),
            "removed": None,
        }
        kind = numbers.choice([kind for kind, content in bad.items() if content != good])
        (newest / name).unlink() if bad[kind] is None else (newest / name).write_bytes(bad[kind])
        if latest_checkpoint(run) != checkpoint_path(run, 1):
            unnoticed.append((trial, name, kind, place))
        (newest / name).write_bytes(good)
    assert unnoticed == []
    assert latest_checkpoint(run) == newest


def test_a_missing_file_is_named_and_the_older_checkpoint_used(run):
    newest = checkpoint_path(run, 2)
    names = files_of(newest)
    assert {"state.json", "optimizer.safetensors", "adapter/adapter_model.safetensors", "manifest.json"} <= set(names)
    for name in names:
        path = newest / name
        path.rename(run / "aside")
        with pytest.raises(CheckpointError, match=name):
            verify(newest)
        assert latest_checkpoint(run) == checkpoint_path(run, 1), name
        (run / "aside").rename(path)
    assert latest_checkpoint(run) == newest


@pytest.mark.parametrize("name", ["adapter/pytorch_model.bin", "note.txt", "manifest.json.bak"])
def test_an_extra_file_is_named_and_the_older_checkpoint_used(run, name):
    (checkpoint_path(run, 2) / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        verify(checkpoint_path(run, 2))
    assert latest_checkpoint(run) == checkpoint_path(run, 1)


def test_files_of_another_checkpoint_are_noticed(run):
    for name in ("state.json", "optimizer.safetensors", "adapter/adapter_model.safetensors"):
        newest = checkpoint_path(run, 2)
        good = (newest / name).read_bytes()
        shutil.copy(checkpoint_path(run, 1) / name, newest / name)
        with pytest.raises(CheckpointError, match=name):
            verify(newest)
        (newest / name).write_bytes(good)


def test_every_flipped_bit_of_the_manifest_is_noticed(run):
    """The manifest vouches for the other files, nothing else for it. One bit of every byte, all eight in turn."""
    newest = checkpoint_path(run, 2)
    path = newest / "manifest.json"
    good = path.read_bytes()
    unnoticed = []
    for place in range(len(good)):
        path.write_bytes(flip(good, place, place % 8))
        try:
            verify(newest)
        except CheckpointError:
            continue
        unnoticed.append(good[max(0, place - 20) : place + 5])
    assert unnoticed == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["log_bytes"].update({"metrics.jsonl": 1}),
        lambda m: m["log_bytes"].pop("metrics.jsonl"),
        lambda m: m.pop("log_bytes"),
        lambda m: m.update(log_bytes=[]),
        lambda m: m.update(sha256=[]),
        lambda m: m.update(schema=3),
        lambda m: m["sha256"].update({"../outside": "0" * 64}),
    ],
    ids=["log length", "log missing", "logs missing", "logs a list", "files a list", "schema", "outside"],
)
def test_an_edited_manifest_is_noticed(run, edit):
    path = checkpoint_path(run, 2) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="update-000002"):
        verify(checkpoint_path(run, 2))


def test_a_checkpoint_of_the_first_schema_is_read(run, make_model):
    """It had no fingerprints, so nothing is held against it; and no length of ATTRIBUTION.md."""
    path = checkpoint_path(run, 2)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"schema": 1}
    del manifest["fingerprints"], manifest["manifest_sha256"]
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert latest_checkpoint(run) == path
    assert verify(path)["log_bytes"] == LOGS
    check_fingerprints(path, verify(path)["fingerprints"], {"the base model": "0" * 64})
    assert load_checkpoint(path, make_model("llama"), None) == STATE


@pytest.mark.parametrize("content", [b"", b"3", b"[]", b"null", b'{"schema": 1}', b"\xff", b"[" * 50_000])
def test_a_manifest_of_another_form_is_noticed(run, content):
    (checkpoint_path(run, 2) / "manifest.json").write_bytes(content)
    assert latest_checkpoint(run) == checkpoint_path(run, 1)


def test_when_all_are_damaged_each_is_named(run):
    for update in (1, 2):
        (checkpoint_path(run, update) / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"update-000002: state\.json is damaged.*update-000001: state\.json"):
        latest_checkpoint(run)


def test_damage_is_never_repaired_by_deleting(run):
    newest = checkpoint_path(run, 2)
    (newest / "state.json").write_bytes(b"{}")
    before = files_of(run)
    latest_checkpoint(run)
    assert files_of(run) == before


# -- which ones are kept -----------------------------------------------------------------------------------------------


@pytest.fixture
def five(make_model, tmp_path) -> Path:
    """A run with the checkpoints 1 to 5."""
    model = make_model("llama")
    for update in range(1, 6):
        save_checkpoint(tmp_path, replace(STATE, update=update), model, trained(model), LOGS, README)
    return tmp_path


def updates_kept(run: Path) -> list[int]:
    return sorted(updates_of(path) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "spared", "kept"),
    [(2, None, [4, 5]), (3, 1, [1, 3, 4, 5]), (9, None, [1, 2, 3, 4, 5]), (None, None, [1, 2, 3, 4, 5])],
)
def test_the_newest_are_kept_and_the_last_without_an_alarm(five, keep, spared, kept):
    remove_old_checkpoints(five, keep, spared)
    assert updates_kept(five) == kept


def test_a_damaged_checkpoint_does_not_count_among_the_kept_and_is_not_removed(five):
    for update in (5, 3):
        (checkpoint_path(five, update) / "state.json").write_bytes(b"{}")
    remove_old_checkpoints(five, 2, None)
    assert updates_kept(five) == [2, 3, 4, 5]
    assert latest_checkpoint(five) == checkpoint_path(five, 4)


def test_copies_and_notes_of_the_user_are_no_checkpoints_and_are_left_alone(five):
    folder = five / "checkpoints"
    names = ["update-000005.bak", "update-best", "update-000001 (copy)"]
    for name in names:
        shutil.copytree(checkpoint_path(five, 5), folder / name)
    (folder / "update-000009").write_text("a note", encoding="utf-8")
    remove_old_checkpoints(five, 2, None)
    names += ["update-000004", "update-000005", "update-000009"]
    assert {path.name for path in folder.iterdir()} == set(names)
    assert latest_checkpoint(five) == checkpoint_path(five, 5)


def test_how_many_updates_are_lost_is_said(five, caplog):
    for update in (5, 4):
        (checkpoint_path(five, update) / "state.json").write_bytes(b"{}")
    latest_checkpoint(five)
    assert "going back to update-000003: 2 updates are lost and will be done again" in caplog.text


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_rank_is_refused(make_model, saved):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_weights(checkpoint_path(saved, 2), make_model("llama", lora_rank=2))


def test_an_adapter_of_another_model_is_refused(make_model, saved):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_weights(checkpoint_path(saved, 2), make_model("gpt2"))


def test_the_other_kind_of_training_is_refused(make_model, saved):
    with pytest.raises(CheckpointError, match=r"model\.adapter"):
        load_weights(checkpoint_path(saved, 2), make_model("llama", adapter="full"))


def test_a_disk_that_refuses_is_a_storage_error(make_model, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way", encoding="utf-8")
    model = make_model("llama")
    with pytest.raises(StorageError, match="update-000002"):
        save_checkpoint(tmp_path, STATE, model, trained(model), LOGS, README)
    assert (tmp_path / "checkpoints").read_text(encoding="utf-8") == "in the way"
