"""Doctor: an audit of a configuration on its real model, before anything is spent on training.

In: a session as training would start with, of which `trial.Trial` is a small batch. Out: a CheckResult for each check.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from attention_guided_rl.diagnostics import STEERABILITY_WARNING
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.memory import total_bytes
from attention_guided_rl.records import PADDING, has_padding
from attention_guided_rl.report.audit import CheckResult, print_audit
from attention_guided_rl.screen import make_console
from attention_guided_rl.selection import entropy
from attention_guided_rl.session import Session
from attention_guided_rl.trial import Trial, try_out

KL_FLOOR = 1e-6  # nats per query token, once the policy has moved
SPREAD_FLOOR = 1e-6  # nats
ALONG = 0.1  # cosine; dropout and a trained selection turn the gradient, a wrong sign turns it round
UNIFORM_MARGIN = 0.01  # nats below the uniform choice, and above a certain one


def examine(session: Session) -> list[CheckResult]:
    """Audit and print.

    Raises:
        ConfigError: something is wrong; what it is has been printed.
    """
    console = make_console()
    with console.status("auditing") if console.is_terminal else contextlib.nullcontext():
        results = audit(session)
    print_audit(console, results)
    failed = [result.name for result in results if not result.passed]
    if failed:
        raise ConfigError(f"{len(failed)} of {len(results)} checks failed: {'; '.join(failed)}")
    return results


def audit(session: Session) -> list[CheckResult]:
    """Run every check; the session is left as it was.

    Raises:
        ConfigError: there are several processes.
    """
    if session.processes.count > 1:
        raise ConfigError("agrl doctor works in one process; start it without torchrun")
    with try_out(session) as trial:
        return [check(trial) for check in CHECKS]


def _tolerance(trial: Trial, float32: float, bfloat16: float) -> float:
    return float32 if trial.session.config.model.dtype == "float32" else bfloat16


def adapter_is_a_no_op(trial: Trial) -> CheckResult:
    """At step 0 policy and reference must agree to the bit."""
    policy, reference = trial.states()
    apart = float((policy - reference).abs().max())
    return CheckResult(
        "adapter is a no-op",
        torch.equal(policy, reference),
        f"step 0: policy and reference differ by {apart:.2g}",
        "the policy starts away from its reference: an adapter whose B is not 0, or weights trained before. Initialise "
        "LoRA's B to 0 (model.adapter), or merge the adapter into the model first",
    )


def reference_stays(trial: Trial) -> CheckResult:
    """Moving the policy must move the policy and not the reference."""
    before = trial.states()[1]
    with trial.moved():
        policy, reference = trial.states()
    moved, stayed = (float((x.float() - before.float()).norm() / before.float().norm()) for x in (policy, reference))
    return CheckResult(
        "reference stays put",
        torch.equal(reference, before) and moved > 0,
        f"hidden states moved: policy {moved:.1%}, reference {stayed:.1%}",
        "what should be the untrained model is a copy of the current one, or shares its weights: the KL is always 0, "
        "and rewards drift with training. Freeze the copy once, before the first update",
    )


def sampling_repeats(trial: Trial) -> CheckResult:
    """The moved policy must write the same for the same uniform numbers, before and after an update."""
    before = trial.moved_rows
    with trial.moved():
        after = trial.session.rollout(trial.pool, trial.uniforms)
    alike = int((before.ids == after.ids).all(1).sum())
    apart = float((before.sampled_logprobs - after.sampled_logprobs).abs().max())
    return CheckResult(
        "sampling repeats itself",
        alike == before.num_rows and apart <= _tolerance(trial, 1e-4, 0.01),
        f"{alike} of {before.num_rows} rows alike, log-probabilities within {apart:.2g} nats",
        "the same uniform numbers gave other queries: dropout is on while sampling, so the gradient is not that of the "
        "policy that wrote them. Keep the model in eval mode outside the update's forward",
    )


def learner_agrees(trial: Trial) -> CheckResult:
    """The objective's forward must find the log-probabilities that the sampler, with its cache, found."""
    rows = trial.moved_rows
    with trial.moved(), torch.no_grad():
        output = trial.objective(trial.pay(rows), policy=1.0, coefficient=0.0)
        logprobs = trial.query_logprobs(rows)
    _, real = rows.query_slots()
    apart = float((logprobs - rows.sampled_logprobs).abs()[real].mean())
    stated = output.metrics.get("policy/sampler_mismatch")  # of the objective itself, if it states it
    apart = max(apart, 0.0 if stated is None else float(stated))
    return CheckResult(
        "learner agrees with sampler",
        apart <= _tolerance(trial, 1e-4, 0.01),
        f"mean |difference| {apart:.2g} nats a query token",
        "the log-probabilities in the loss are not those that the queries were drawn with: another temperature, mask, "
        "shift or padding, or dropout. Compare objective.kind with objective.policy_gradient",
    )


def policy_term(trial: Trial) -> CheckResult:
    """The policy term alone must reach every trainable tensor (at step 0, with B = 0, every B and no A), and raise
    log π of the queries whose advantage is positive."""
    trainable = frozenset(trial.model.named_trainable())
    first = frozenset(n for n in trainable if "lora_B" in n) if trial.model.peft_model is not None else trainable
    start = trial.term(policy=1.0)
    with trial.moved():
        moved = trial.term(policy=1.0)
        along = trial.along_advantages()
        stray = [n for n, p in trial.model.named_frozen().items() if p.requires_grad or p.grad is not None]
    return CheckResult(
        "gradient of the policy term",
        start.reached == first and moved.reached == trainable and not stray and along > ALONG,
        f"step 0: {len(start.reached & first)} of {len(first)}, {len(start.reached - first)} others; "
        f"moved: {len(moved.reached)} of {len(trainable)}; frozen: {len(stray)}; cosine to −∇ Σ A log π {along:.2f}",
        "the rewards do not reach the weights as they should: log-probabilities are detached, a layer is out of the "
        "graph, frozen weights are trained, or the advantages are not heeded or have the wrong sign. Look at "
        "objective.kind and at what requires a gradient",
    )


def kl_term(trial: Trial) -> CheckResult:
    """The KL alone must be 0 at step 0, and pull on every trainable tensor once the policy has moved."""
    name = "gradient of the KL term"
    kl = trial.session.config.objective.kl
    if kl.coefficient == 0 or kl.place == "reward":
        return CheckResult(name, True, "there is none in the loss (objective.kl)", "")
    start = trial.term(coefficient=1.0)
    with trial.moved():
        moved = trial.term(coefficient=1.0)
    still = start.loss <= _tolerance(trial, 1e-9, 1e-3) and start.norm <= _tolerance(trial, 1e-3, 0.1) * moved.norm
    pulls = moved.loss > max(KL_FLOOR, 10 * start.loss) and moved.reached == frozenset(trial.model.named_trainable())
    return CheckResult(
        name,
        still and pulls,
        f"step 0: {start.loss:.2g} nats; moved: {moved.loss:.2g} nats, {len(moved.reached)} tensors",
        "the penalty is not the way from the untrained model: the reference is a copy of the policy (always 0), the "
        "policy starts elsewhere (not 0 at step 0), or the term is detached. Look at objective.kind and the reference",
    )


def reward_follows_its_query(trial: Trial) -> CheckResult:
    """Another token in query t must change reward t, and none before it."""
    rows, in_context = trial.paid.rows, trial.session.config.reward.query_in_context
    before, own, earlier = trial.paid.rewards.rewards, [], [0.0]
    allowed = trial.model.query_vocabulary.nonzero()[:, 0]
    for t in sorted({0, rows.num_steps // 2, rows.num_steps - 1}):
        place = int(rows.layout.query_positions.view(rows.num_steps, -1)[t, -1])
        ids = rows.ids.clone()
        rank = torch.searchsorted(allowed, ids[:, place].contiguous())
        ids[:, place] = allowed[(rank + len(allowed) // 2) % len(allowed)]
        change = (trial.pay(replace(rows, ids=ids)).rewards.rewards - before).abs()
        own.append(float(change[:, t].mean()))
        earlier += change[:, :t].flatten().tolist()
    depends = min(own) > max(1e-6, 10 * max(earlier)) if in_context else max(own) <= 1e-6
    return CheckResult(
        "reward t follows query t" if in_context else "reward is of the order only",
        depends and max(earlier) <= _tolerance(trial, 1e-5, 1e-2),
        f"with another token: reward t by {min(own):.2g}, earlier ones by {max(earlier):.2g}",
        "a reward that does not answer its own query, or answers later ones, teaches nothing: a shift by one step or "
        "token, or a look ahead. Look at reward.kind and reward.query_in_context",
    )


def selection_entropy(trial: Trial) -> CheckResult:
    """The choice must be neither uniform nor certain."""
    logprobs = trial.paid.rows.selection_logprobs
    num_unread = (logprobs > -math.inf).sum(-1)
    choices = num_unread >= 2
    nats, most = (float(x[choices].sum() / choices.sum().clamp_min(1)) for x in (entropy(logprobs), num_unread.log()))
    return CheckResult(
        "selection entropy",
        UNIFORM_MARGIN < nats < most - UNIFORM_MARGIN,
        f"{nats:.2f} nats (uniform: {most:.2f})",
        "uniform: no query steers the choice; certain: nothing is explored. Let selection.temperature be calibrated "
        "(null), change selection.target_entropy, or the embedder",
    )


def steerability(trial: Trial) -> CheckResult:
    """Different queries must lead to different choices."""
    nats = float(trial.session.steerability(trial.pool).mean())
    return CheckResult(
        "steerability of selection",
        nats >= STEERABILITY_WARNING,
        f"{nats:.2f} nats (at least {STEERABILITY_WARNING})",
        "whatever the query, the choice is nearly the same, so there is nothing to learn about it. Lower "
        "selection.target_entropy (or selection.temperature), or change the embedder",
    )


def rewards_spread(trial: Trial) -> CheckResult:
    """The trajectories of a group must earn differently, or every advantage is 0."""
    groups = trial.paid.rewards.rewards.unflatten(0, (trial.pool.num_articles, -1))
    spread = groups.std(1, correction=0).amax(-1)
    flat = int((spread <= SPREAD_FLOOR).sum())
    return CheckResult(
        "rewards differ in a group",
        flat == 0,
        f"standard deviation {float(spread.mean()):.2g} nats; {flat} of {len(spread)} groups flat",
        "all trajectories of an article earn the same, so there is no advantage to learn from: a constant reward, or "
        "queries and picks that are all alike. Look at reward.kind and rollout.temperature",
    )


def reference_is_finite(trial: Trial) -> CheckResult:
    """Everything that the scoring pass gives must be a number."""
    paid = trial.paid
    parts = (paid.scores.value_logprobs, paid.scores.query_hidden, paid.prior, paid.rewards.rewards)
    bad, of = sum(int((~torch.isfinite(part)).sum()) for part in parts), sum(part.numel() for part in parts)
    return CheckResult(
        "numbers are finite",
        bad == 0,
        f"{bad} of {of} are not",
        "the model overflows on these rows. Try model.dtype: float32, and rows within the context that the model was "
        "trained with (rollout.context_tokens)",
    )


def queries_are_words(trial: Trial) -> CheckResult:
    """The vocabulary of queries must leave tokens to write with, and nothing else must have been written."""
    allowed = trial.model.query_vocabulary
    ids, real = trial.paid.rows.query_slots()
    masked = int((~allowed[ids[real]]).sum())
    texts = trial.model.decode_rows(ids.flatten(0, 1), real.flatten(0, 1))
    blank = sum(not text.strip() for text in texts)
    return CheckResult(
        "queries are real tokens",
        int(allowed.sum()) >= 2 and masked == 0 and blank < len(texts),
        f"{int(allowed.sum())} of {len(allowed)} ids allowed, {masked} others written; {blank} of {len(texts)} blank",
        "the mask leaves nothing to ask with, is not obeyed, or the model writes only blanks. Does the tokenizer "
        "belong to the model, and are its special tokens only the control tokens?",
    )


def padding_changes_nothing(trial: Trial) -> CheckResult:
    """Deleting padding must change no log-probability."""
    rows, model = trial.paid.rows, trial.model
    rows = rows if trial.session.config.reward.query_in_context else rows.without_queries()
    name = "padding changes nothing"
    if not has_padding(rows.role):
        return CheckResult(name, True, "every slot is full", "")
    row = (rows.role == PADDING).sum(1).argmax()[None]
    ids, role, positions = rows.ids[row], rows.role[row], rows.layout.value_positions.to(rows.ids.device)
    keep = role[0] != PADDING
    positions = positions[keep[positions]]
    with torch.no_grad():
        padded = model.token_logprobs(ids, role, positions)
        short = model.token_logprobs(ids[:, keep], role[:, keep], keep.cumsum(0)[positions] - 1)
    apart = float((padded - short).abs().max())
    return CheckResult(
        name,
        apart <= _tolerance(trial, 1e-3, 0.5),
        f"largest difference {apart:.2g} nats a token",
        "this model sees its padding, so scores depend on the lengths of other passages. Use full slots (pairs.cut: "
        "tokens, reward.query_in_context: true) or another model",
    )


def memory_and_time(trial: Trial) -> CheckResult:
    """An update must go through, and fit the memory there is."""
    config, cost = trial.session.config, trial.cost
    there, needed = total_bytes(trial.model.device), cost.peak_bytes
    size = "unknown" if needed is None else f"{needed / 2**30:.1f} GiB" + (f" of {there / 2**30:.0f}" if there else "")
    hours = cost.update_s * config.training.updates / 3600
    whole = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
    return CheckResult(
        "time and memory (estimate)",
        cost.stepped and (there is None or needed is None or needed <= there),
        f"{cost.update_s:.1f} s an update, {whole} for {config.training.updates}; peak {size}",
        "the update took no step (see the other checks), or training is likely to run out of memory: then lower "
        "training.micro_batch_rows, rollout.articles or rollout.trajectories",
    )


CHECKS: tuple[Callable[[Trial], CheckResult], ...] = (
    adapter_is_a_no_op, reference_stays, sampling_repeats, learner_agrees, policy_term, kl_term,
    reward_follows_its_query, rewards_spread, selection_entropy, steerability, reference_is_finite, queries_are_words,
    padding_changes_nothing, memory_and_time,
)  # fmt: skip
