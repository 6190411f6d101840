"""The audit: a healthy configuration passes, each planted fault is caught by the checks that are for it, no trace."""

import gc
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import planted_faults
import pytest
import torch

from attention_guided_rl.cli import main
from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.doctor import CHECKS, audit, memory_and_time
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.memory import peak_bytes, reset_peak, total_bytes
from attention_guided_rl.scorer import reference_scorer
from attention_guided_rl.trial import Cost, try_out

NAMES = (
    NO_OP := "adapter is a no-op",
    STAYS := "reference stays put",
    REPEATS := "sampling repeats itself",
    AGREES := "learner agrees with sampler",
    POLICY := "gradient of the policy term",
    KL := "gradient of the KL term",
    FOLLOWS := "reward t follows query t",
    SPREAD := "rewards differ in a group",
    ENTROPY := "selection entropy",
    STEERABLE := "steerability of selection",
    FINITE := "numbers are finite",
    WORDS := "queries are real tokens",
    PADDING := "padding changes nothing",
    COST := "time and memory (estimate)",
)


def failed(session) -> set[str]:
    return {result.name for result in audit(session) if not result.passed}


# -- nothing wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "adapter"), [("llama", "lora"), ("qwen3", "lora"), ("gpt2", "lora"), ("gpt2", "full")]
)
def test_a_healthy_session_passes(make_session, shape, adapter):
    results = audit(make_session({"model.adapter": adapter}, shape=shape))
    assert len(CHECKS) == 14
    assert tuple(r.name for r in results) == NAMES
    assert [r.name for r in results if not r.passed] == []
    assert all(r.measured for r in results)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.lora_dropout": 0.5, "rollout.temperature": 0.7},
        {"model.dtype": "bfloat16"},
        {"reward.kind": "counterfactual", "reward.scorer": "ema"},
        {"reward.kind": "held_out", "reward.num_probes": 1, "embedder.trained": True},
        {"reward.kind": "plain", "reward.scorer": "policy", "reward.gradient_weight": 1.0},
        {"objective.kl.place": "reward", "objective.kl.estimator": "k1", "reward.pick": "expected"},
        {"training.micro_batch_rows": 4, "reward.kind": "plain", "reward.scorer": "policy"},
        {"reward.query_in_context": False, "objective.kl.estimator": "k3"},
        {"objective.kl.coefficient": 0.0, "objective.kind": "planted_faults:without_kl"},
        {"objective.advantage_baseline": "running_mean", "rollout.articles": 1, "rollout.trajectories": 1},
        {"rollout.steps": 1, "rollout.query_tokens": 1},
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_what_is_unusual_is_no_fault(make_session, overrides):
    assert failed(make_session(overrides)) == set()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_audit_leaves_no_trace(make_session, shaken, adapter):
    session = make_session({"model.adapter": adapter, "model.lora_dropout": 0.2 if adapter == "lora" else 0.0})
    model = shaken(session.model)
    named = {**model.named_frozen(), **model.named_trainable()}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    state, temperature = torch.get_rng_state(), session.temperature
    audit(session)
    assert all(torch.equal(parameter, before[name]) for name, parameter in named.items())
    assert all(parameter.grad is None for parameter in named.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert session.temperature == temperature


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_lora_that_does_not_start_at_zero(make_session, shaken):
    session = make_session()
    shaken(session.model, 0.01)
    assert failed(session) == {NO_OP, POLICY, KL}


@pytest.mark.parametrize(("shape", "whole"), [("llama", False), ("gpt2", True)])
def test_dropout_left_on_when_sampling(make_session, shape, whole):
    session = make_session({"model.lora_dropout": 0.0 if whole else 0.3}, shape=shape)
    for name, module in session.model.peft_model.named_modules():
        module.train("lora_dropout" in name or whole)
    found = failed(session)
    assert {REPEATS, AGREES} <= found
    assert whole or found == {REPEATS, AGREES}


def test_dropout_left_on_by_an_update(make_session):
    session = make_session({"model.lora_dropout": 0.3})
    session.model.__class__ = planted_faults.DropoutStaysOn
    assert REPEATS in failed(session)


def test_a_reference_equal_to_a_fresh_copy(make_session):
    session = make_session()
    session.model.__class__ = planted_faults.FreshCopy
    session.scorer = session.reference_scorer = reference_scorer(session.model)
    assert failed(session) == {STAYS, KL}


def test_a_reference_that_shares_the_weights(make_session):
    session = make_session({"model.adapter": "full"})
    session.model._frozen_copy = session.model._policy
    assert {STAYS, KL} <= failed(session)


@pytest.mark.parametrize("coefficient", [0.02, 0.0])
def test_a_detached_policy_loss(make_session, coefficient):
    session = make_session({"objective.kind": "planted_faults:detached", "objective.kl.coefficient": coefficient})
    assert failed(session) == {POLICY}


def test_advantages_of_the_wrong_sign(make_session):
    assert failed(make_session({"objective.kind": "planted_faults:of_wrong_sign"})) == {POLICY}


def test_advantages_that_are_not_heeded(make_session):
    """They are 1 even where there is only the KL."""
    assert failed(make_session({"objective.kind": "planted_faults:heedless"})) == {POLICY, KL}


def test_a_loss_without_a_graph(make_session):
    assert failed(make_session({"objective.kind": "planted_faults:without_a_graph"})) == {POLICY, KL, COST}


def test_a_uniform_selector(make_session):
    session = make_session({"embedder.kind": "planted_faults:ConstantEmbedder"})
    assert failed(session) == {ENTROPY, STEERABLE}


@pytest.mark.parametrize(
    ("overrides", "caught"),
    [
        (
            {
                "objective.kind": "planted_faults:without_kl",
                "reward.kind": "planted_faults:of_the_next_step",
                "selection.temperature": 1e-6,
            },
            {KL, FOLLOWS, ENTROPY},
        ),
        (
            {"objective.kind": "planted_faults:colder", "reward.kind": "planted_faults:constant"},
            {AGREES, FOLLOWS, SPREAD},
        ),
        ({"reward.kind": "planted_faults:infinite"}, {FOLLOWS, FINITE, COST}),
    ],
    ids=["no KL, late reward, certain choice", "colder, constant reward", "infinite reward"],
)
def test_other_faults_of_a_configuration(make_session, overrides, caught):
    assert failed(make_session(overrides)) == caught


def test_base_weights_that_are_trained_beside_the_adapter(make_session):
    session = make_session()
    next(p for p in session.model.named_frozen().values() if p.dim() == 2).requires_grad_(True)
    assert POLICY in failed(session)


def test_a_frozen_copy_that_is_not_frozen(make_session):
    session = make_session({"model.adapter": "full"})
    session.model._frozen_copy.requires_grad_(True)
    assert failed(session) == {POLICY}


def test_a_vocabulary_of_one_token(make_session):
    session = make_session()
    session.model.query_vocabulary = torch.arange(64) == 20
    assert WORDS in failed(session)


def test_a_model_that_sees_padding(make_session):
    session = make_session()
    session.model.__class__ = planted_faults.SeesPadding
    assert PADDING in failed(session)


def test_more_memory_than_there_is_and_an_update_without_a_step(make_session):
    with try_out(make_session({"training.updates": 7200})) as trial:
        little = Cost(update_s=2.0, peak_bytes=2**20, stepped=True)
        for cost, passes in (
            (little, True),
            (replace(little, peak_bytes=None), True),
            (replace(little, peak_bytes=2**60), False),
            (replace(little, stepped=False), False),
        ):
            result = memory_and_time(replace(trial, cost=cost))
            assert result.passed == passes
            assert result.measured.startswith("2.0 s an update, 4.0 h for 7200; peak ")


def test_several_processes_are_refused(make_session):
    session = make_session()
    session.processes = SimpleNamespace(count=2)
    with pytest.raises(ConfigError, match="one process"):
        audit(session)


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_a_line_for_each_failure_and_exits_with_2(make_config, tmp_path, capfd):
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(make_config()), encoding="utf-8")
    assert main(["doctor", "--config", str(file)]) == 0
    out = capfd.readouterr().out
    assert out.count(" ok ") == 14
    assert "FAILED" not in out
    assert "all 14 checks passed" in out

    assert main(["doctor", "--config", str(file), "--objective.kind", "planted_faults:detached"]) == 2
    out, err = capfd.readouterr()
    assert (out.count(" ok "), out.count("FAILED")) == (13, 1)
    assert re.search(r"^gradient of the policy term: .*detached.*objective\.kind", out, re.MULTILINE)
    assert "passed" not in out
    assert err.splitlines()[-1] == "agrl: error: 1 of 14 checks failed: gradient of the policy term"


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_peak_counts_what_was_in_use_and_can_be_counted_anew():
    device = torch.device("cpu")
    gc.collect()  # what earlier tests left would be given back in between
    reset_peak(device)
    before = peak_bytes(device)
    if before is None:
        pytest.skip("this system does not tell")
    block = torch.ones(2**26)  # 256 MiB
    assert block.sum() == 2**26
    del block
    assert peak_bytes(device) - before > 100 * 2**20
    assert (total_bytes(device) or before) >= before


def test_every_check_has_its_line_in_the_page():
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)[1:] == list(NAMES)
