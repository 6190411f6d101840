"""Trajectories per second of one update, beside the naive loop: same model, same work, same outputs (checked).

    python benchmarks/throughput.py [--repeats 5]

Prints medians and ranges over interleaved repeats, and peak memory. Runs on the CPU with PyTorch's number of threads.
"""

import argparse
import resource
import statistics
import time
import warnings

import torch
from naive import naive_update

from attention_guided_rl.config_files import load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import UpdateBatch
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.session import Session


def our_update(session, pool, uniforms):
    """Roll out, score and accumulate the gradient with the package's own functions."""
    config = session.config
    rows = session.rollout(pool, uniforms)
    paid = session.pay(rows, pool)
    advantages, _ = compute_advantages(
        paid.rewards.rewards, config.objective, AgentState(), config.rollout.trajectories
    )
    batch = UpdateBatch(
        rows=rows,
        advantages=advantages.advantages,
        reference_hidden=session.reference_hidden(paid),
        num_query_tokens=rows.num_rows * rows.num_steps * rows.layout.query_len,
    )
    session.objective(session.model, batch, config.objective.kl, config.rollout.temperature).loss.backward()
    return rows.picks, paid.rewards.rewards


def gradient(session):
    """Take the accumulated gradient as one vector, and clear it."""
    parameters = list(session.model.named_trainable().values())
    flat = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main():
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = load_config()
    session = Session(config, Processes("cpu"))
    session.calibrate(config.corpus)
    stream = session.stream(config.corpus, num_probes=0, purpose=Purpose.POOL)
    rows = config.rollout.articles * config.rollout.trajectories
    print(f"demo configuration: {rows} rows, {session.num_steps} steps, {torch.get_num_threads()} threads")

    variants = {
        "this package": lambda pool, u: our_update(session, pool, u),
        f"naive, batch {rows}": lambda pool, u: naive_update(session, pool, u, rows),
        "naive, batch 2": lambda pool, u: naive_update(session, pool, u, 2),
    }
    seconds = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):  # the first is a warm-up
        pool = stream.next_pool(config.rollout.articles)
        uniforms = session.uniforms(
            Purpose.TRAINING, repeat, range(config.rollout.articles), config.rollout.trajectories
        )
        outputs = {}
        for name, run in variants.items():
            result, elapsed = timed(lambda run=run, pool=pool, uniforms=uniforms: run(pool, uniforms))
            picks, rewards = (result.picks, result.rewards) if hasattr(result, "picks") else result
            outputs[name] = (picks, rewards, gradient(session))
            if repeat:
                seconds[name].append(elapsed)
            if name == "this package" and repeat == 0:  # a high-water mark: read before the naive loops raise it
                ours_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        check_equal(outputs)
    report(seconds, rows, ours_peak)


def check_equal(outputs):
    """Every variant must have made the same picks, rewards and gradient."""
    picks, rewards, direction = outputs["this package"]
    for name, (other_picks, other_rewards, other_direction) in outputs.items():
        assert torch.equal(picks, other_picks), f"{name} made other picks"
        assert torch.allclose(rewards, other_rewards, atol=1e-3), f"{name} has other rewards"
        assert torch.allclose(direction, other_direction, atol=1e-3 * float(direction.norm())), f"{name}: gradient"


def report(seconds, rows, ours_peak):
    ours = seconds["this package"]
    print(f"{'':18s} {'trajectories/s':>15s} {'range':>17s} {'ours is faster by':>19s}")
    for name, times in seconds.items():
        rates = sorted(rows / s for s in times)
        ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        print(f"{name:18s} {statistics.median(rates):15.1f} {rates[0]:8.1f}–{rates[-1]:<8.1f} {ratio:18.2f}×")
    print(f"peak memory after our first update: {ours_peak:.0f} MiB (whole process, weights and libraries included)")


if __name__ == "__main__":
    main()
