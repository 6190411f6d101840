"""Learning: a short run on the bundled model gets better at reading, and the same run paid at random does not (law 11).

The demo, made small: 4 subjects × 3 pairs, 3 steps, 12 updates of 64 rows at a low learning rate. Three seeds gained
0.20, 0.28 and 0.20 nats per value token; with shuffled rewards −0.05, 0.01 and −0.03, the drift of 12 random steps, so
the control is judged by its mean over the three. What is claimed of the method rests on the runs of docs/results.md.
"""

import json
from pathlib import Path

import pytest

from attention_guided_rl import runs
from attention_guided_rl.arms import run_arms
from attention_guided_rl.config_files import load_config
from attention_guided_rl.evaluation import evaluation_records
from attention_guided_rl.summary import summarise

SMALL = {
    "corpus.subjects": 4,
    "corpus.pairs_per_subject": 3,
    "evaluation.corpus.subjects": 4,
    "evaluation.corpus.pairs_per_subject": 3,
    "evaluation.articles": 24,
    "evaluation.num_probes": 0,
    "evaluation.oracle": False,
    "pairs.num_pairs": 12,
    "rollout.steps": 3,
    "rollout.articles": 8,
    "rollout.trajectories": 8,
    "objective.kl.coefficient": 0.05,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_updates": 2,
    "training.updates": 12,
    "training.seed": 2,
    "training.device": "cpu",
    "log.trajectories_every": 0,
}


def run(folder: Path, overrides: dict | None = None) -> Path:
    runs.train(load_config("demo", overrides={**SMALL, **(overrides or {})}), folder)
    return folder


def gain(folder: Path) -> float:
    """Trained minus untrained on 64 held-out articles, nats per value token."""
    session, update = runs.open_run(folder, {"evaluation.articles": 64})
    batches = run_arms(session, ["trained", "untrained"])
    records = [record for batch in batches for record in evaluation_records(session, batch, update)]
    return summarise(records, held_out=True)["contrasts"]["trained-untrained"]["mean"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("learning") / "real")


def test_a_short_run_learns_to_read(trained):
    summary = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["held_out"] is True
    assert summary["articles"] == 24
    assert summary["contrasts"]["trained-untrained"]["low"] > 0
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [record["reward/mean"] for record in metrics]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05
    assert metrics[0]["loss/kl"] == 0.0
    assert metrics[-1]["loss/kl"] > 1e-3
    assert max(record["policy/sampler_mismatch"] for record in metrics) < 1e-4


@pytest.mark.timeout(300)  # four short runs: 50 s on an idle machine, and a busy one must not look like a hang
def test_law_11_real_rewards_teach_and_shuffled_ones_do_not(trained, tmp_path):
    shuffled = [
        gain(
            run(
                tmp_path / f"shuffled-{seed}",
                {"training.shuffled_rewards": True, "training.seed": seed, "evaluation.articles": 0},
            )
        )
        for seed in (0, 1, 2)
    ]
    assert abs(sum(shuffled) / 3) <= 0.05, shuffled
    assert gain(trained) > 0.15
