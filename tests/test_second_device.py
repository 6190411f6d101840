"""Where tensors are, without a GPU: the whole program on a device that only says it is one (`second_device.py`)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import second_device
from done_elsewhere import audited, figures, headroom, mixed, waits_of_writing, weights_at

from attention_guided_rl.config import Config
from attention_guided_rl.config_files import load_config

EVALUATED = {"training.updates": 2, "evaluation.articles": 2, "evaluation.oracle": True}
WORDS_IN_COMMON = {"embedder.kind": "hashing"}


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Call a function of `done_elsewhere` in a process that has a second device."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=second_device.begin) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_mixing_devices_is_refused_as_a_gpu_does(elsewhere):
    assert elsewhere(mixed) == ["sum", "index", "value", "product", "mask"]


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        ("qwen3", {"reward.kind": "counterfactual", "rollout.temperature": 0.8}),
        ("llama", {"reward.kind": "counterfactual", "reward.scorer": "policy", "training.micro_batch_rows": 2}),
        ("gpt2", {"reward.kind": "held_out", "reward.num_probes": 1, "reward.scorer": "ema", **WORDS_IN_COMMON}),
        ("llama", {"reward.scorer": "policy", "reward.gradient_weight": 0.5, "embedder.trained": True}),
        ("llama", {"reward.pick": "expected", "reward.query_in_context": False, "evaluation.oracle": False}),
        ("llama", {"model.adapter": "full", "objective.kl.estimator": "k3", "selection.heads": "mean_softmax"}),
    ],
    ids=["counterfactual", "live", "held out", "trained embedder", "expected pick", "no adapter"],
)
def test_training_and_evaluation_give_the_numbers_of_the_cpu(elsewhere, make_config, tmp_path, shape, overrides):
    same_numbers(elsewhere, make_config({**EVALUATED, **overrides}, shape=shape), tmp_path)


def test_the_demo_in_small_with_all_its_arms_gives_the_numbers_of_the_cpu(elsewhere, tmp_path):
    sizes = {"rollout.articles": 1, "rollout.trajectories": 3, "rollout.steps": 3, "rollout.query_tokens": 3}
    overrides = {**EVALUATED, **sizes, "evaluation.arms": "all", "pairs.num_pairs": 5, "selection.temperature": 0.1}
    config = load_config("demo", overrides={**overrides, "training.device": "cpu"})
    same_numbers(elsewhere, config, tmp_path)


def same_numbers(elsewhere: Callable[..., Any], config: Config, tmp_path: Path) -> None:
    assert elsewhere(weights_at, config) == {"second:0"}
    expected, found = figures(config, tmp_path / "here"), elsewhere(figures, config, tmp_path / "there")
    assert len(expected) > 100
    assert found == pytest.approx(expected, abs=2e-3, rel=2e-3)


def test_sixteen_bits_train_there(elsewhere, make_config, tmp_path):
    """Rounding leads the texts another way than the CPU's, so only the first update is the same."""
    config = make_config({**EVALUATED, "model.dtype": "bfloat16"})
    assert len(elsewhere(figures, config, tmp_path / "run")) > 100


def test_the_audits_come_to_the_same(elsewhere, make_config):
    config = make_config({"reward.kind": "counterfactual", "evaluation.articles": 4})
    assert elsewhere(audited, config) == audited(config)
    assert elsewhere(headroom, config) == pytest.approx(headroom(config), abs=1e-4)


def test_writing_waits_for_the_device_at_steps_and_never_at_tokens(elsewhere, make_config):
    """Four more tokens a query, and as many waits; with padded values transformers asks for the mask at every token."""
    short, long = (make_config({"pairs.value_tokens": 2, "rollout.query_tokens": n}) for n in (2, 6))
    waits = elsewhere(waits_of_writing, short)
    assert len(elsewhere(waits_of_writing, long)) == len(waits)
    more_rows = make_config({"pairs.value_tokens": 2, "rollout.query_tokens": 2, "rollout.trajectories": 9})
    assert len(elsewhere(waits_of_writing, more_rows)) == len(waits)
