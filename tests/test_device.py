"""Where tensors are, without a GPU: training, evaluation and audits on a device made of CPU tensors (`fake_device.py`).

In float32 they give the CPU's numbers there. That CUDA's own kernels do, no test shows.
"""

from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from device_runs import (
    audits,
    headroom,
    refused_mixes,
    resume_and_evaluate,
    synchronisations_of_writing,
    train_and_evaluate,
    weights_at,
)

from attention_guided_rl.config import Config
from attention_guided_rl.config_files import load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import ConfigError

TIMEOUT = 120  # seconds for one answer
EVALUATED = {"training.updates": 2, "evaluation.articles": 2, "evaluation.oracle": True}
HASHING = {"embedder.kind": "hashing"}


@pytest.fixture(scope="module")
def on_fake_device() -> Iterator[Callable[..., Any]]:
    """Call a function of `device_runs` in a process that has the fake device, and that ends with this one."""
    if fake_device.SET_UP is None:
        pytest.skip("this PyTorch cannot have a device that is written in Python")
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=fake_device.serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        ours.send((function, arguments))
        if not ours.poll(TIMEOUT):
            process.kill()
        succeeded, answer = ours.recv()
        assert succeeded, answer
        return answer

    yield call
    ours.close()
    process.join(TIMEOUT)


def assert_same_numbers(on_fake_device: Callable[..., Any], config: Config, folder: Path) -> None:
    assert on_fake_device(weights_at, config) == {"fake:0"}
    expected = train_and_evaluate(config, folder / "cpu")
    assert len(expected) > 100
    assert on_fake_device(train_and_evaluate, config, folder / "fake") == pytest.approx(expected, abs=2e-3, rel=2e-3)


def test_mixing_devices_is_refused(on_fake_device):
    refused = on_fake_device(refused_mixes)
    assert list(refused) == ["sum", "index", "value", "product", "mask", "stack"]
    assert all("tensors on cpu" in why for why in refused.values())


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        ("qwen3", {"reward.kind": "counterfactual", "rollout.temperature": 0.8}),
        ("llama", {"reward.kind": "counterfactual", "reward.scorer": "policy", "training.micro_batch_rows": 2}),
        ("gpt2", {"reward.kind": "held_out", "reward.num_probes": 1, "reward.scorer": "ema", **HASHING}),
        ("llama", {"reward.scorer": "policy", "reward.gradient_weight": 0.5, "embedder.trained": True}),
        ("llama", {"reward.pick": "expected", "reward.query_in_context": False, "evaluation.oracle": False}),
        ("llama", {"model.adapter": "full", "objective.kl.estimator": "k3", "selection.heads": "mean_softmax"}),
    ],
    ids=["counterfactual", "live", "held out", "trained embedder", "expected pick", "no adapter"],
)
def test_training_and_evaluation_give_the_numbers_of_the_cpu(on_fake_device, make_config, tmp_path, shape, overrides):
    assert_same_numbers(on_fake_device, make_config({**EVALUATED, **overrides}, shape=shape), tmp_path)


def test_the_demo_in_small_gives_the_numbers_of_the_cpu_and_goes_on_with_all_arms(on_fake_device, tmp_path):
    sizes = {"rollout.articles": 1, "rollout.trajectories": 3, "rollout.steps": 3, "rollout.query_tokens": 3}
    overrides = {**EVALUATED, **sizes, "pairs.num_pairs": 5, "selection.temperature": 0.1, "training.device": "cpu"}
    assert_same_numbers(on_fake_device, load_config("demo", overrides=overrides), tmp_path)
    longer = load_config("demo", overrides={**overrides, "training.updates": 3})
    expected = resume_and_evaluate(longer, tmp_path / "cpu")
    found = on_fake_device(resume_and_evaluate, longer, tmp_path / "fake")
    assert any("possible" in name for name in expected)
    assert found == pytest.approx(expected, abs=2e-3, rel=2e-3)


def test_sixteen_bits_train(on_fake_device, make_config, tmp_path):
    """Draws that rounding decides are others than the CPU's; sampler and learner are the same policy all the same."""
    config = make_config({**EVALUATED, "model.dtype": "bfloat16"})
    found = on_fake_device(train_and_evaluate, config, tmp_path / "run")
    assert found[" updates 0 loss/kl"] == 0.0
    assert found[" updates 1 loss/kl"] > 0.0
    assert found[" updates 1 policy/sampler_mismatch"] < 0.05


def test_the_audits_pass_there_too(on_fake_device, make_config):
    config = make_config({"reward.kind": "counterfactual", "evaluation.articles": 4})
    assert set(audits(config).values()) == {True}
    assert on_fake_device(audits, config) == audits(config)
    assert on_fake_device(headroom, config) == pytest.approx(headroom(config), abs=1e-4)


def test_writing_synchronises_so_often_a_step_whatever_the_rows_and_tokens(on_fake_device, make_config):
    def count(**sizes: int) -> int:
        overrides = {"pairs.value_tokens": 2, **{f"rollout.{name}": size for name, size in sizes.items()}}
        return on_fake_device(synchronisations_of_writing, make_config(overrides))

    once = count(steps=2)
    assert count(steps=4) == once + 2 * 9
    assert count(steps=2, query_tokens=7) == count(steps=2, trajectories=9) == once


def test_each_run_of_a_process_is_where_its_configuration_says(monkeypatch):
    """Accelerate keeps one state for a process, with the device of the first run."""
    assert Processes("cpu").device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Processes("auto").device == Processes("cuda").device == torch.device("cuda")
    assert Processes("cpu").device == torch.device("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="there are 2; lower --nproc-per-node"):
        Processes("auto")
