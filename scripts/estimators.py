"""Signal and noise of the gradient estimators, all on the same rollouts of the same policy.

    python scripts/estimators.py --batches 24                         the demo, untrained
    python scripts/estimators.py --batches 24 --run runs/mine         a run's newest checkpoint
    python scripts/estimators.py --batches 96 --only mean "KL in"     the default and those whose name has one of these

For every estimator and batch of rollouts the gradient of the policy term is computed (advantages not divided by s, so
that nothing but the estimator differs). Over K batches with mean m and total variance v of one batch's gradient:

    signal² = |m|² − v/K (unbiased),   SNR = signal² / v,   trajectories for SNR 1 = rows of a batch / SNR

± is a jackknife over batches, also of the difference from the default, which is paired by batch. `cosine` is between
the mean gradient and that of the default on the same rollouts: a filter that changes what is maximised shows there,
and so does the noise of the smaller signal.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
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
Estimator = tuple[str, str, ObjectiveConfig]
K1 = KLConfig(place="reward", estimator="k1")


def estimators() -> Iterator[Estimator]:
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


def gradients_of_a_batch(
    session: Session, batch: int, states: dict[str, AgentState], chosen: Sequence[Estimator]
) -> dict[str, np.ndarray]:
    """Return the gradient of each estimator chosen on one batch of rollouts, and keep its statistics for the next."""
    config = session.config
    num_articles, group = config.rollout.articles, config.rollout.trajectories
    indices = range(num_articles)
    pool = session.stream(config.corpus, num_probes=config.reward.num_probes, purpose=Purpose.POOL)
    for _ in range(batch):
        pool.next_pool(num_articles)
    pool = pool.next_pool(num_articles).to(session.model.device)
    rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, batch, indices, group))
    wanted, request = {reward for _, reward, _ in chosen}, BranchRequest()
    if "counterfactual" in wanted:
        q0 = session.uniforms(Purpose.COUNTERFACTUAL, batch, indices, group)[:, :, :-1]
        request = BranchRequest(counterfactual_uniforms=q0)
    candidates = unread_candidates(rows, pool)
    if "expected" in wanted:
        request = with_candidates(request, candidates, pool)
    if "held_out" in wanted:
        request = with_probes(request, rows, pool)
    scores = session.reference_scorer.score(rows, request)
    prior = session.reference_scorer.prior(pool, session.template)
    inputs = reward_inputs(rows, scores, pool, prior)
    rewards = {name: reward(inputs).rewards for name, reward in REWARDS.items() if name in wanted}
    if "expected" in wanted:
        rewards["expected"] = expected_rewards(REWARDS["value_prior"], inputs, scores, candidates, rows).rewards
    distribution = session.model.reference_logprobs(scores.query_hidden, config.rollout.temperature)
    ids, _ = rows.query_slots()
    k1 = rows.sampled_logprobs - distribution.gather(-1, ids.flatten(1)[..., None]).view(ids.shape)

    found = {}
    parameters = list(session.model.named_trainable().values())
    for name, reward, options in chosen:
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


def jackknife(statistic: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """Return a statistic of batches (given by their places) over all of them, and its jackknife error."""
    everything = np.arange(count)
    left_out = np.array([statistic(np.delete(everything, i)) for i in everything])
    return statistic(everything), math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())


def signal_to_noise(gram: np.ndarray, places: np.ndarray) -> float:
    """Return the SNR of the batches at `places`, of which `gram` has the inner products of the gradients."""
    count, some = len(places), gram[np.ix_(places, places)]
    mean_square = some.sum() / count**2
    variance = (np.trace(some) - count * mean_square) / (count - 1)
    return float((mean_square - variance / count) / variance)


def main() -> None:
    """Collect gradients and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT")
    options = parser.parse_args()
    overrides = {"evaluation.articles": 0, "corpus.pairs_per_subject": 4}
    if options.run:
        session, _ = runs.open_run(options.run)
    else:
        session = runs.open_untrained(load_config("demo", overrides=overrides))
    default, *others = estimators()
    chosen = [default, *(e for e in others if not options.only or any(text in e[0] for text in options.only))]
    states: dict[str, AgentState] = {}
    batches = [gradients_of_a_batch(session, number, states, chosen) for number in range(options.batches)]
    rows = session.config.rollout.articles * session.config.rollout.trajectories
    print(f"{options.batches} batches of {rows} trajectories")
    print(
        f"{'estimator':52s} {'SNR':>7s} {'±':>6s} {'trajectories for SNR 1':>23s} {'− default':>10s} {'±':>6s} cosine"
    )
    table(np.stack([list(batch.values()) for batch in batches]), list(batches[0]), rows)


def table(gradients: np.ndarray, names: list[str], rows: int) -> None:
    """Print a line for each estimator, given its gradients (batches, estimators, parameters); the default is first."""
    mean_of_default = gradients[:, 0].mean(0)
    for n, name in enumerate(names):
        used = np.abs(gradients[:, n]).sum(1) > 0  # before its warm-up a filter keeps nothing
        own, base = gradients[used, n], gradients[used, 0]
        own_gram, base_gram = own @ own.T, base @ base.T
        ratio, error = jackknife(lambda places, g=own_gram: signal_to_noise(g, places), len(own))
        difference, its_error = jackknife(
            lambda places, g=own_gram, b=base_gram: signal_to_noise(g, places) - signal_to_noise(b, places), len(own)
        )
        mean = own.mean(0)
        cosine = float(mean @ mean_of_default / (np.linalg.norm(mean) * np.linalg.norm(mean_of_default)))
        needed = f"{rows / ratio:.0f}" if ratio > 0 else "–"
        print(f"{name:52s} {ratio:7.3f} {error:6.3f} {needed:>23s} {difference:+10.3f} {its_error:6.3f} {cosine:6.2f}")


if __name__ == "__main__":
    main()
