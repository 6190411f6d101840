"""Signal and noise of the gradient estimators, all on the same rollouts of the same policy.

    python scripts/estimators.py --batches 24                    the demo, untrained
    python scripts/estimators.py --batches 24 --run runs/mine    a run's newest checkpoint

For every estimator and batch of rollouts the gradient of the policy term is computed (advantages not divided by s, so
that nothing but the estimator differs). Over K batches with mean m and total variance v of one batch's gradient:

    signal² = |m|² − v/K (unbiased),   SNR = signal² / v,   trajectories for SNR 1 = rows of a batch / SNR

± is a jackknife over batches. `cosine` is between the mean gradient and that of the default estimator on the same
rollouts: a filter that changes what is maximised shows there, and so does the noise of the smaller signal.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from attention_guided_rl import runs
from attention_guided_rl.config import FilterConfig, KLConfig, ObjectiveConfig
from attention_guided_rl.config_files import load_config
from attention_guided_rl.objective import policy_gradient
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import BranchRequest, UpdateBatch
from attention_guided_rl.reward import (
    REWARDS,
    expected_rewards,
    reward_inputs,
    unread_candidates,
    with_candidates,
    with_probes,
)
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.session import Session

PLAIN_BASELINES = ("leave_one_out", "running_mean", "none")
KEPT = {
    "running_zscore": FilterConfig(kind="running_zscore"),
    "group_zscore": FilterConfig(kind="group_zscore"),
    "extremes": FilterConfig(kind="extremes"),
}
K1 = KLConfig(place="reward", estimator="k1")


def estimators() -> Iterator[tuple[str, str, ObjectiveConfig]]:
    """Yield name, reward and options of every estimator; the first is the default."""
    default = ObjectiveConfig()
    yield "value_prior, to_go, leave_one_out (default)", "value_prior", default
    yield "… expectation over the pick", "expected", default
    for returns in ("to_go", "trajectory"):
        for baseline in PLAIN_BASELINES:
            if (returns, baseline) != ("to_go", "leave_one_out"):
                name = f"value_prior, {returns}, {baseline}"
                yield name, "value_prior", replace(default, returns=returns, advantage_baseline=baseline)
    for name, kept in KEPT.items():
        yield f"… default, filter {name}", "value_prior", replace(default, filter=kept)
    yield "… default, KL in the reward", "value_prior", replace(default, kl=K1)
    yield "plain, to_go, leave_one_out", "plain", default
    yield "plain, trajectory, leave_one_out", "plain", replace(default, returns="trajectory")
    original = replace(default, returns="trajectory", advantage_baseline="running_mean")
    yield "plain, trajectory, running_mean", "plain", original
    yield "plain, trajectory, running_mean, running_zscore", "plain", replace(original, filter=KEPT["running_zscore"])
    yield "counterfactual, to_go, leave_one_out", "counterfactual", default
    yield "held_out, to_go, leave_one_out", "held_out", default


def gradients_of_a_batch(session: Session, batch: int, states: dict[str, AgentState]) -> dict[str, np.ndarray]:
    """Return every estimator's gradient on one batch of rollouts, and keep its statistics for the next."""
    config = session.config
    num_articles, group = config.rollout.articles, config.rollout.trajectories
    indices = range(num_articles)
    pool = session.stream(config.corpus, num_probes=config.reward.num_probes, purpose=Purpose.POOL)
    for _ in range(batch):
        pool.next_pool(num_articles)
    pool = pool.next_pool(num_articles).to(session.model.device)
    rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, batch, indices, group))
    q0 = session.uniforms(Purpose.COUNTERFACTUAL, batch, indices, group)[:, :, :-1]
    candidates = unread_candidates(rows, pool)
    request = with_candidates(BranchRequest(counterfactual_uniforms=q0), candidates, pool)
    scores = session.reference_scorer.score(rows, with_probes(request, rows, pool))
    prior = session.reference_scorer.prior(pool, session.template)
    inputs = reward_inputs(rows, scores, pool, prior)
    rewards = {name: reward(inputs).rewards for name, reward in REWARDS.items()}
    rewards["expected"] = expected_rewards(REWARDS["value_prior"], inputs, scores, candidates, rows).rewards
    distribution = session.model.reference_logprobs(scores.query_hidden, config.rollout.temperature)
    ids, _ = rows.query_slots()
    k1 = rows.sampled_logprobs - distribution.gather(-1, ids.flatten(1)[..., None]).view(ids.shape)

    found = {}
    parameters = list(session.model.named_trainable().values())
    for name, reward, options in estimators():
        level = reward == "held_out"
        kl = k1.mean(-1) if options.kl.place == "reward" else None
        state = replace(states.get(name, AgentState()), scale=1.0)
        advantages, states[name] = compute_advantages(rewards[reward], options, state, group, is_level=level, kl=kl)
        kept = advantages.keep.float()[:, None]
        update = UpdateBatch(
            rows=rows,
            advantages=advantages.advantages * kept,
            reference_hidden=scores.query_hidden,
            num_query_tokens=max(1, int(advantages.keep.sum())) * rows.num_steps * rows.layout.query_len,
        )
        loss = policy_gradient(session.model, update, KLConfig(coefficient=0.0), config.rollout.temperature).loss
        gradient = torch.autograd.grad(loss, parameters)
        found[name] = torch.cat([g.flatten() for g in gradient]).numpy()
    return found


def signal_to_noise(gradients: np.ndarray) -> tuple[float, float]:
    """Return SNR and its jackknife error from (batches, parameters)."""
    gram = gradients @ gradients.T

    def ratio(keep: np.ndarray) -> float:
        count, some = len(keep), gram[np.ix_(keep, keep)]
        mean_square = some.sum() / count**2
        variance = (np.trace(some) - count * mean_square) / (count - 1)
        return float((mean_square - variance / count) / variance)

    everything = np.arange(len(gradients))
    left_out = np.array([ratio(np.delete(everything, i)) for i in everything])
    error = math.sqrt((len(everything) - 1) / len(everything) * ((left_out - left_out.mean()) ** 2).sum())
    return ratio(everything), error


def main() -> None:
    """Collect gradients and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    overrides = {"evaluation.articles": 0, "corpus.pairs_per_subject": 4}
    if options.run:
        session, _ = runs.open_run(options.run)
    else:
        session = runs.open_untrained(load_config("demo", overrides=overrides))
    states: dict[str, AgentState] = {}
    batches = [gradients_of_a_batch(session, number, states) for number in range(options.batches)]
    rows = session.config.rollout.articles * session.config.rollout.trajectories
    names = list(batches[0])
    default = np.stack([b[names[0]] for b in batches]).mean(0)
    print(f"{options.batches} batches of {rows} trajectories")
    print(f"{'estimator':52s} {'SNR':>7s} {'±':>6s} {'trajectories for SNR 1':>23s} {'cosine':>7s}")
    for name in names:
        stack = np.stack([b[name] for b in batches])
        used = stack[np.abs(stack).sum(1) > 0]  # before its warm-up a filter keeps nothing
        ratio, error = signal_to_noise(used)
        mean = used.mean(0)
        cosine = float(mean @ default / (np.linalg.norm(mean) * np.linalg.norm(default)))
        needed = f"{rows / ratio:.0f}" if ratio > 0 else "–"
        print(f"{name:52s} {ratio:7.3f} {error:6.3f} {needed:>23s} {cosine:7.2f}")


if __name__ == "__main__":
    main()
