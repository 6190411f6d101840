"""Trainer: the training loop, read from top to bottom.

    pools → trajectories → rewards → advantages → keep → update → state → log → checkpoint

In: a Config and a run folder. Out: the folder's logs and checkpoints. Every process runs the same loop on its share of
the articles; rewards are gathered, so advantages and statistics are computed from all rows, alike on every process.
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from attention_guided_rl.checkpoint import (
    RunState,
    check_fingerprints,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    verify,
)
from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.diagnostics import AlarmBell, finite, raise_alarms, row_metrics
from attention_guided_rl.errors import CheckpointError, NumericError, PeerLostError
from attention_guided_rl.guard import WEIGHT, first_place
from attention_guided_rl.interruption import collected_signals
from attention_guided_rl.memory import out_of_memory
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Advantages, PairPool, TrajectoryBatch
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.screen import make_console
from attention_guided_rl.session import PaidRows, Session
from attention_guided_rl.tracking import RunLogs, TrainingProgress, pair_records, trajectory_records
from attention_guided_rl.update import Outcome, apply_update, make_optimizer

MAX_NONFINITE_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """An update's articles and the trajectories on them; this process's share."""

    indices: range
    """Places of the articles in the update's global list."""
    pool: PairPool
    rows: TrajectoryBatch
    steerability: Float[Tensor, " A"]


@dataclass(frozen=True, slots=True)
class Learned:
    """What an update made of its trajectories."""

    state: RunState
    metrics: dict[str, Any]
    paid: PaidRows
    advantages: Advantages
    """Of all processes."""
    place: str | None
    """Where the first number was seen that is not finite; None if there was none, and then the update counts."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How training ended."""

    state: RunState
    interrupted_by: int | None
    """Signal number, or None if all updates were done."""
    checkpoint: Path


def train(session: Session, run: Path, *, resume: bool = False) -> Trained:
    """Train until `training.updates` are done or a signal arrives; a checkpoint is written either way.

    Another is written before the first update, so that whatever ends the run, it can be resumed. Numbers that are not
    finite never get into one: an update that meets them is skipped, and a weight that is not finite ends the run.

    Raises:
        NumericError: too many updates in a row had to be skipped, or one never can be.
        AgrlError: of the kind that fits. What a corpus or embedder raises loses no finished update; after other errors
            what was checkpointed stays.
    """
    config, processes = session.config, session.processes
    stream = session.stream(config.corpus, num_probes=session.num_training_probes, purpose=Purpose.POOL)
    optimizer = make_optimizer(session, config.optimizer)
    with processes.meeting():  # on a resume the corpus is read up to where it was left
        state, logs = _start(session, run, stream, optimizer, resume)
    share, total = processes.share(config.rollout.articles), config.training.updates
    saved = checkpoint_path(run, state.update) if resume else None
    bell = AlarmBell(audible=processes.is_main)

    console = make_console() if processes.is_main else Console(quiet=True)
    with (
        out_of_memory("training"),
        logs or contextlib.nullcontext(),
        collected_signals() as received,
        TrainingProgress(console, total, state.update) as progress,
    ):
        if saved is None:
            saved = save(session, run, state, optimizer, logs)
        stop = None
        while state.update < total and stop is None:
            try:
                with processes.meeting():  # corpus and embedder may be remote
                    reading = read(session, stream, state.update, share)
            except PeerLostError:
                raise
            except Exception:  # nothing of this update is anywhere yet
                if saved != checkpoint_path(run, state.update):
                    save(session, run, state, optimizer, logs)
                raise
            learned = learn(session, optimizer, reading, replace(state, position=stream.position))
            state = learned.state
            metrics = {
                **learned.metrics,
                "data/skipped_articles": stream.num_skipped,
                "time/update_s": round(progress.seconds_since_last(), 4),
            }
            metrics |= raise_alarms(metrics)
            written_at = state.update - 1  # the weights that wrote these trajectories, and may be saved
            alarm = learned.place is not None or bell.ring(metrics, state.last_good)
            if not alarm and written_at % config.training.checkpoint_every == 0:
                state = replace(state, last_good=written_at)
            log_update(session, logs, metrics, reading, learned)
            progress.show(metrics)
            _stop_if_it_cannot_go_on(state, learned.place)
            if state.update % config.training.checkpoint_every == 0:
                saved = save(session, run, state, optimizer, logs)
            stop = processes.first_signal(received)
        if saved != checkpoint_path(run, state.update):
            save(session, run, state, optimizer, logs)
    return Trained(state, stop, checkpoint_path(run, state.update))


def read(session: Session, stream: PoolStream, update: int, share: slice) -> Reading:
    """Draw the update's pools and write this process's trajectories on them; all that may need the network."""
    rollout = session.config.rollout
    pool = stream.next_pool(rollout.articles, keep=share).to(session.model.device)
    indices = range(rollout.articles)[share]
    with out_of_memory("embedding texts"):
        rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, update, indices, rollout.trajectories))
        return Reading(indices, pool, rows, session.steerability(pool))


def learn(session: Session, optimizer: torch.optim.Optimizer, reading: Reading, state: RunState) -> Learned:
    """Pay the trajectories, turn rewards into advantages, and take the optimiser's step.

    Done again from its start, with half the rows at a time on all processes, where memory runs out on one.
    """
    session.agree_on_rows()
    return session.micro_batch.fit(reading.rows.num_rows, lambda: _learn(session, optimizer, reading, state))


def _learn(session: Session, optimizer: torch.optim.Optimizer, reading: Reading, state: RunState) -> Learned:
    config, processes, group = session.config, session.processes, session.config.rollout.trajectories
    q0 = session.counterfactual_uniforms(Purpose.COUNTERFACTUAL, state.update, reading.indices, group)
    with processes.meeting(), session.micro_batch.watch("scoring", reading.rows.num_rows, forward=True):
        paid = session.pay(reading.rows, reading.pool, q0)
        own_kl = None if config.objective.kl.place == "loss" else session.kl_of_queries(paid)
    rewards = control_rewards(session, processes.gather_rows(paid.rewards.rewards), state.update)
    kl = None if own_kl is None else processes.gather_rows(own_kl)
    advantages, agent = compute_advantages(
        rewards, config.objective, state.agent, group, is_level=session.reward.is_level, kl=kl
    )
    numbers = paid.numbers()
    numbers["embedding"].append(reading.steerability)
    numbers |= {"KL": [] if own_kl is None else [own_kl], "advantage": [advantages.returns, advantages.advantages]}
    place = first_place(numbers, processes.gather_rows)
    outcome = apply_update(session, optimizer, paid, reading.pool, advantages, state.update, place)
    state = _next_state(session, state, agent, outcome)
    metrics = {
        "update": state.update,
        "episodes": state.update * config.rollout.articles * group,
        **outcome.metrics,
        **row_metrics(session, paid, advantages, rewards),
        "advantage/scale": state.agent.scale,
        "filter/empty_updates": state.empty_updates,
        "guard/nonfinite_updates": state.nonfinite_updates,
        "guard/place": session.nonfinite_weight() or outcome.place if outcome.place else None,
        "memory/micro_batch_rows": session.micro_batch.rows,
        "memory/rollout_rows": session.rollout_batch.lowered_to,
        "selection/steerability": finite(processes.gather_rows(reading.steerability).mean()),
        "selection/temperature": state.temperature,
    }
    return Learned(state, metrics, paid, advantages, metrics["guard/place"])


def control_rewards(session: Session, rewards: Tensor, update: int) -> Tensor:
    """Return the rewards, permuted among the trajectories of each group if the shuffled control is on."""
    if not session.config.training.shuffled_rewards:
        return rewards
    groups = rewards.unflatten(0, (-1, session.config.rollout.trajectories)).clone()
    rng = generator(session.config.training.seed, Purpose.CONTROL, update)
    for a in range(groups.shape[0]):
        groups[a] = groups[a][torch.from_numpy(rng.permutation(groups.shape[1]))]
    return groups.flatten(0, 1)


def log_update(
    session: Session,
    logs: RunLogs | None,
    metrics: dict[str, Any],
    reading: Reading,
    learned: Learned,
) -> None:
    """Write an update's metrics and, if it is its turn, its trajectories; in global order whatever the processes."""
    processes, every = session.processes, session.config.log.trajectories_every
    if every and (metrics["update"] - 1) % every == 0:
        paid, pool = learned.paid, reading.pool
        start = processes.rank * paid.rows.num_rows
        labels = {
            "phase": "train",
            "arm": "trained",
            "update": metrics["update"],
            "scorer": session.config.reward.scorer,
        }
        records = trajectory_records(
            paid.rows, paid.rewards, paid.scores, pool, session.model, labels, reading.indices.start,
            learned.advantages.keep[start : start + paid.rows.num_rows],
        )  # fmt: skip
        trajectories = processes.gather_objects(records)
        prior = paid.prior
        if session.scorer.live:
            with processes.meeting():
                prior = session.prior(pool)
        pairs = processes.gather_objects(pair_records(pool, prior, session.model))
        articles = processes.gather_objects(list(pool.articles))
        if logs is not None:
            logs.write("trajectories.jsonl", trajectories)
            logs.pairs(pairs)
            logs.attribute(articles)
    if logs is not None:
        logs.metrics(metrics)


def save(session: Session, run: Path, state: RunState, optimizer: torch.optim.Optimizer, logs: RunLogs | None) -> Path:
    """Write a checkpoint (main process) and wait until it is there (all); its error is raised on all."""
    with session.processes.meeting():
        if logs is not None:
            config = session.config
            readme = (
                f"# Query policy, {state.update} updates\n\n"
                f"- base model: {config.model.name} (revision {config.model.revision or 'newest'})\n"
                f"- corpus: {config.corpus.label}\n"
                "- loads with `peft.PeftModel.from_pretrained` (adapter/) or `from_pretrained` (model/)\n"
                "- the licences of base model and corpus apply\n"
            )
            save_checkpoint(
                run, state, session.model, optimizer, logs.sync(), readme, session.ema,
                config=config_to_yaml(config), fingerprints=session.fingerprints,
            )  # fmt: skip
            remove_old_checkpoints(run, config.training.keep_checkpoints, state.last_good)
    return checkpoint_path(run, state.update)


def _start(
    session: Session, run: Path, stream: PoolStream, optimizer: torch.optim.Optimizer, resume: bool
) -> tuple[RunState, RunLogs | None]:
    """Begin at update 0, or where the newest good checkpoint ends."""
    main = session.processes.is_main
    if resume:
        path = latest_checkpoint(run)
        manifest = verify(path)
        check_fingerprints(path, manifest["fingerprints"], session.fingerprints)
        state = load_checkpoint(path, session.model, optimizer, session.ema)
        session.temperature = state.temperature
        session.micro_batch.lower(state.micro_batch_rows)
        session.rollout_batch.lower(state.rollout_rows)
        if state.embedder != session.embedder.identity:
            raise CheckpointError(f"{path}: made with embedder {state.embedder}, this is {session.embedder.identity}")
        stream.resume(state.position)
        if not main:
            return state, None
        remove_old_checkpoints(run, session.config.training.keep_checkpoints, state.last_good)
        return state, RunLogs(run, session.config.log, manifest["log_bytes"])
    assert session.temperature is not None
    state = RunState(temperature=session.temperature, embedder=session.embedder.identity)
    return state, RunLogs(run, session.config.log) if main else None


def _next_state(session: Session, state: RunState, agent: AgentState, outcome: Outcome) -> RunState:
    """Count the update; one with non-finite numbers leaves the agent's statistics as they were."""
    return replace(
        state,
        agent=agent if outcome.finite else state.agent,
        update=state.update + 1,
        empty_updates=state.empty_updates + (outcome.finite and not outcome.stepped),
        nonfinite_updates=state.nonfinite_updates + (not outcome.finite),
        nonfinite_in_a_row=0 if outcome.finite else state.nonfinite_in_a_row + 1,
        micro_batch_rows=session.micro_batch.lowered_to,
        rollout_rows=session.rollout_batch.lowered_to,
    )


def _stop_if_it_cannot_go_on(state: RunState, place: str | None) -> None:
    """Raise NumericError for a weight that is not finite, which no skipping mends, and for too many skipped updates."""
    if place is not None and place.startswith(WEIGHT):
        raise NumericError(
            f"update {state.update}: the {place} is not finite; no checkpoint has it, so resuming goes back to before"
        )
    if state.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW:
        raise NumericError(
            f"{MAX_NONFINITE_IN_A_ROW} updates in a row had non-finite numbers, the last one first in: {place}; see "
            "guard/place in metrics.jsonl"
        )
