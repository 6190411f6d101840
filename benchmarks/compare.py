"""Our step beside the others', taken in turn on the same pools, so that a busy moment of the machine meets them all."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import trl_rows
from cases import Case, library_layers
from flops import naive_flops, our_flops, trl_flops
from machine import timed
from measure import COMPARED, add_numbers, compared_row, micro_batch
from naive import best_batch, naive_update, summed, time_step
from ours import Step, flat_gradient, next_pool, our_gradient, our_step, warm_up
from tables import Report

from attention_guided_rl.records import PairPool

TOLERANCE = 1e-3  # nats per value token
LIBRARY_ROW = "this package, PyTorch's and PEFT's layers"
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries (B, S, Q), picks (B, S) and rewards (B, S), of the same rows and steps."""


class OutputsDifferError(AssertionError):
    """A comparator did other work than ours: its time means nothing."""


@dataclass
class Seconds:
    """The seconds of every variant, one number a repeat."""

    ours: list[float] = field(default_factory=list)
    others: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which comparators to run, and how often."""

    repeats: int
    naive_batches: tuple[int | None, ...] = ()
    """None: the fastest, found by trying."""
    naive_in_full: bool = True
    """False: at its first, middle and last step only, summed."""
    trl: bool = False
    with_library_layers: bool = False
    """A row of ours with PyTorch's and PEFT's layers: what is left of the ratios without the package's."""


def compare(report: Report, case: Case, plan: Plan, folder: Path) -> Seconds:
    """Run all variants `repeats` times, check that they did the same, and add their table."""
    warm_up(case)
    found = Seconds()
    batches: dict[str, int] = {}
    trainers: dict[str, trl_rows.TrlTrainer] = {}
    for repeat in range(plan.repeats):
        pool, uniforms = next_pool(case), case.uniforms(repeat)
        ours = our_step(case, pool, uniforms)
        found.ours.append(ours.seconds)
        found.steps.append(ours)
        if plan.with_library_layers:
            with library_layers(case.session):
                same = our_step(case, pool, uniforms, phases=False)
            check(LIBRARY_ROW, outputs(ours), outputs(same))
            found.others.setdefault(LIBRARY_ROW, (str(micro_batch(case)), []))[1].append(same.seconds)
        if repeat == 0:  # not before: what the others leave in the allocator must not count as our memory
            batches = _naive_batches(case, plan, pool, uniforms, ours)
            trainers = _trainers(case, plan, pool, folder)
        for name, size in batches.items():
            seconds = _naive(case, plan, pool, uniforms, size, ours, name)
            found.others.setdefault(name, (str(size), []))[1].append(seconds)
        for name, trainer in trainers.items():
            seconds = trainer.step(pool, uniforms)
            check(name, outputs(ours), trainer.outputs)
            found.others.setdefault(name, (str(trainer.batch_rows), []))[1].append(seconds)
    _add(report, case, found)
    if plan.trl and not trl_rows.INSTALLED:
        report.remark(f"{case.name}: {trl_rows.HOW_TO_INSTALL}")
    return found


def _naive_batches(case: Case, plan: Plan, pool: PairPool, uniforms: torch.Tensor, ours: Step) -> dict[str, int]:
    """Return the batch of each naive row; where the loop runs in full, check its gradient, too."""
    batches = {}
    for wanted in plan.naive_batches:
        own = ", its own best batch" if wanted is None else ""
        name = f"naive loop{own}{'' if plan.naive_in_full else ', three steps summed'}"
        batches[name] = wanted or best_batch(case, pool, uniforms, ours.paid.rows)
    if batches and plan.naive_in_full:
        check_gradient(case, pool, max(batches.values()))
    return batches


def _trainers(case: Case, plan: Plan, pool: PairPool, folder: Path) -> dict[str, trl_rows.TrlTrainer]:
    """Return TRL's two rows with its best batch, if TRL is wanted and there."""
    if not (plan.trl and trl_rows.INSTALLED):
        return {}
    batch = trl_rows.best_batch(case, pool, folder / "trl")
    names = {"plain": "TRL, plain generate with its cache", "ours": "TRL, our rollout inside"}
    return {name: trl_rows.TrlTrainer(case, batch, folder / "trl", rollout=rollout) for rollout, name in names.items()}


def outputs(step: Step, steps: slice = slice(None)) -> Outputs:
    """Return what a comparator's outputs must equal."""
    rows = step.paid.rows
    return rows.query_slots()[0][:, steps], rows.picks[:, steps], step.paid.rewards.rewards[:, steps]


def check(name: str, ours: Outputs, theirs: Outputs) -> int:
    """Raise OutputsDifferError unless a variant's queries, picks and rewards (to TOLERANCE) are ours.

    Returns how many rows rounding led another way.

    Rounding moves the border between two tokens, and now and then a draw falls in between (3 of 5,120 of the 30 M
    model): a row may differ from a query on whose first other token is the next id or the one before, two rows or one
    for every 250 tokens, and half of them at most. One row of eight, two of 64, may differ for other reasons: a pick on
    a border, or tokens between that are never drawn. Rewards must be finite.
    """
    (queries, picks, rewards), (other_queries, other_picks, other_rewards) = (
        [tensor.cpu() for tensor in both] for both in (ours, theirs)
    )
    rows, num_steps, query_len = queries.shape
    apart = (queries - other_queries).abs().flatten(1)
    apart = torch.cat([apart, torch.ones(rows, 1, dtype=apart.dtype)], 1)  # behind the end, where none is other
    first = (apart != 0).int().argmax(1)
    astray = first < num_steps * query_len
    on_border = apart.gather(1, first[:, None])[:, 0] == 1
    together = torch.arange(num_steps) < (first // query_len)[:, None]
    difference = (rewards - other_rewards).abs()
    differs = (picks != other_picks) | ~(difference <= TOLERANCE)
    differing = int(((differs & together).any(1) | (astray & ~on_border)).sum())
    bordering = int((astray & on_border).sum())
    too_many = differing > max(rows // 32, int(rows >= 8)) or bordering > max(2, min(rows // 2, queries.numel() // 250))
    if too_many or not bool(other_rewards.isfinite().all()):
        raise OutputsDifferError(
            f"{name}: {differing} rows of {rows} differ, {int((picks != other_picks).any(1).sum())} in their picks, "
            f"{bordering} more from a border on; rewards by {float(difference.max()):.2g}"
        )
    return bordering


def check_gradient(case: Case, pool: PairPool, batch_rows: int) -> None:
    """Raise OutputsDifferError unless the naive loop's gradient is ours, to TOLERANCE of its norm.

    On the first numbers with which both write the same rows (see `check`).
    """
    parameters = list(case.session.model.named_trainable().values())
    for number in range(10**5, 10**5 + 5):
        uniforms = case.uniforms(number)
        ours = our_gradient(case, pool, uniforms)
        rows = case.session.rollout(pool, uniforms)
        with library_layers(case.session):
            queries, picks, _ = naive_update(case.session, pool, uniforms, batch_rows)
        torch.nn.utils.clip_grad_norm_(parameters, case.session.config.optimizer.max_grad_norm)
        difference = float((flat_gradient(case) - ours).norm() / ours.norm())
        for parameter in parameters:
            parameter.grad = None
        if torch.equal(queries, rows.query_slots()[0]) and torch.equal(picks, rows.picks):
            break
    else:
        raise OutputsDifferError("naive loop: it never wrote our rows")
    if not difference <= TOLERANCE:
        raise OutputsDifferError(f"naive loop: its gradient differs from ours by {difference:.2g} of its norm")


def sampled_naive(case: Case, pool: PairPool, uniforms: torch.Tensor, batch_rows: int, ours: Step) -> dict[int, float]:
    """Time the naive loop at its first, middle and last step; return seconds by step, outputs checked."""
    found = {}
    for number in sorted({0, case.task.num_steps // 2, case.task.num_steps - 1}):
        seconds, theirs = time_step(case, pool, uniforms, ours.paid.rows, number, batch_rows)
        check(f"naive loop, step {number + 1}", outputs(ours, slice(number, number + 1)), theirs)
        found[number] = seconds
    return found


def _naive(case: Case, plan: Plan, pool: PairPool, uniforms: torch.Tensor, size: int, ours: Step, name: str) -> float:
    """Return the seconds of the naive loop, in full or summed from three steps; outputs checked."""
    if not plan.naive_in_full:
        return summed(list(sampled_naive(case, pool, uniforms, size, ours).values()), case.task.num_steps)
    results = []
    device = case.session.model.device
    with library_layers(case.session):
        seconds = timed(lambda: results.append(naive_update(case.session, pool, uniforms, size)), device)
    for parameter in case.session.model.named_trainable().values():
        parameter.grad = None
    check(name, outputs(ours), results[0])
    return seconds


def _add(report: Report, case: Case, found: Seconds) -> None:
    rows = [
        compared_row(
            case,
            "this package",
            str(micro_batch(case)),
            found.ours,
            found.ours,
            our_flops(case.shape, case.task),
            "",
        )
    ]
    for name, (at_once, seconds) in found.others.items():
        if name == LIBRARY_ROW:
            work = our_flops(case.shape, case.task)
        elif name.startswith("naive"):
            work = naive_flops(case.shape, case.task)
        else:
            work = trl_flops(case.shape, case.task, folded="our rollout" in name)
        rows.append(compared_row(case, name, at_once, seconds, found.ours, work, "equal"))
    report.table(f"{case.name}: one update ({len(found.ours)} repeats)", COMPARED, rows)
    add_numbers(report, case, "seconds", {"this package": found.ours} | {k: v for k, (_, v) in found.others.items()})
    add_numbers(report, case, "rows_at_once", {name: at_once for name, (at_once, _) in found.others.items()})
