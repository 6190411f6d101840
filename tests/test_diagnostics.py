"""Measures of degeneration by hand, and the alarms they set off."""

import json
import logging

import pytest
import torch
from torch import tensor

from attention_guided_rl import runs
from attention_guided_rl.diagnostics import ALARMS, AlarmBell, raise_alarms, repeated_queries, value_overlap


def test_queries_repeat_when_they_are_an_earlier_one_token_for_token():
    rows = tensor([[[1, 2], [1, 2], [2, 1], [1, 2]], [[1, 1], [2, 2], [3, 3], [4, 4]]])
    assert repeated_queries(rows).tolist() == [0.5, 0.0]  # the second and the fourth


def test_overlap_is_the_share_of_query_tokens_that_stand_in_the_value():
    query, value = tensor([[[5, 6, 5, 9]]]), tensor([[[9, 5, 0]]])
    everything = torch.ones_like(query, dtype=torch.bool)
    real = tensor([[[True, True, False]]])
    assert value_overlap(query, everything, value, real).tolist() == [[0.75]]  # 5, 5 and 9 of four
    assert value_overlap(query, tensor([[[True, True, False, False]]]), value, real).tolist() == [[0.5]]
    zeros = torch.zeros_like(query)
    assert value_overlap(zeros, everything, value, real).tolist() == [[0.0]]  # padding is no token


HEALTHY = {
    "reward/zero_variance_groups": 0.1,
    "policy/entropy": 2.0,
    "query/distinct": 0.9,
    "query/repeated": 0.1,
    "query/value_overlap": 0.2,
    "loss/kl": 0.5,
    "selection/steerability": 1.0,
}
SICK = {
    "zero_variance": ("reward/zero_variance_groups", 0.6),
    "entropy_collapse": ("policy/entropy", 0.01),
    "constant_queries": ("query/distinct", 0.05),
    "repeated_queries": ("query/repeated", 0.6),
    "copied_values": ("query/value_overlap", 0.6),
    "kl_drift": ("loss/kl", 4.0),
    "unsteerable": ("selection/steerability", 0.05),
}


def test_a_healthy_update_rings_nothing_and_what_is_not_measured_neither():
    assert not any(raise_alarms(HEALTHY).values())
    assert not any(raise_alarms(HEALTHY | {"loss/kl": None, "policy/entropy": None}).values())


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_rings_alone(name):
    metric, value = SICK[name]
    rung = raise_alarms(HEALTHY | {metric: value})
    assert [alarm for alarm, on in rung.items() if on] == [f"alarm/{name}"]


def test_an_alarm_is_said_once_with_the_last_good_checkpoint(caplog):
    bell = AlarmBell(audible=True)
    sick = HEALTHY | {"update": 7, "loss/kl": 4.0}
    with caplog.at_level(logging.WARNING):
        assert bell.ring(sick | raise_alarms(sick), 5)
        assert bell.ring(sick | raise_alarms(sick), 5)
        assert not bell.ring(HEALTHY | raise_alarms(HEALTHY), 5)
    assert len(caplog.messages) == 1
    assert "update 7: kl_drift" in caplog.messages[0]
    assert "checkpoint 5" in caplog.messages[0]


def test_the_last_good_checkpoint_is_remembered(make_config, tmp_path):
    options = {"training.checkpoint_every": 2, "training.updates": 4}
    runs.train(make_config(options | {"selection.temperature": 0.05}), tmp_path / "steered")
    with pytest.warns(UserWarning, match="steerability"):  # and the alarm is on from the first update
        runs.train(make_config(options | {"selection.temperature": 1e6}), tmp_path / "unsteered")
    for name, expected in (("steered", 2), ("unsteered", None)):
        state = json.loads((tmp_path / name / "checkpoints" / "update-000004" / "state.json").read_text())
        assert state["last_good"] == expected
