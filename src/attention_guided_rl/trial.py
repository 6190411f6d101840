"""Trial: a small batch that goes the way of training, and leaves no trace.

In: a session as training would start with. Out: a Trial: what a first update writes, pays and takes, and its loss one
term at a time, at step 0 and with the weights moved a little (at step 0 an adapter hides half of what can be wrong).
All of it through the session's rollout, pay and objective, and `update.apply_update`; weights, gradients and random
state are put back bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from attention_guided_rl.guard import first_place
from attention_guided_rl.memory import peak_bytes, reset_peak
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import LossOutput, PairPool, TrajectoryBatch, UpdateBatch
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.session import PaidRows, Session
from attention_guided_rl.update import apply_update, make_optimizer, picked_logprobs, reward_weights

MOST_ARTICLES, MOST_TRAJECTORIES = 2, 8  # of the small batch; it has at least 2 trajectories, or nothing could differ
MOVE = 0.01  # of a tensor's RMS, or of 1 where that is 0: about as far as a few updates go

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an update of the configured size would take, by what the small batch took. Estimates."""

    update_s: float
    peak_bytes: int | None
    """None where the system does not tell."""
    stepped: bool
    """Whether the small batch's update took its optimiser step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of the loss alone."""

    loss: float
    reached: frozenset[str]
    """Trainable tensors whose gradient is not 0 everywhere."""
    norm: float
    """Of the whole gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The small batch, and what can be asked of it."""

    session: Session
    pool: PairPool
    uniforms: Float[Tensor, "B S U"]
    paid: PaidRows
    """Written and paid at step 0."""
    moved_rows: TrajectoryBatch
    """Written from the same uniform numbers by the moved weights, before any update."""
    cost: Cost

    @property
    def model(self) -> LanguageModel:
        """The session's model."""
        return self.session.model

    def pay(self, rows: TrajectoryBatch) -> PaidRows:
        """Pay rows of the batch as training would."""
        return _pay(self.session, rows, self.pool)

    @contextlib.contextmanager
    def moved(self) -> Iterator[None]:
        """Move every trainable tensor a little, always the same way; put it back afterwards."""
        with _moved(self.session):
            yield

    def term(self, *, policy: float = 0.0, coefficient: float = 0.0) -> Term:
        """Go back through the policy term (advantages ±`policy`) and the KL (β = `coefficient`), as an update does.

        The rows are those of step 0, paid by the weights of now: so the reference is what an update would find.
        """
        loss, found = self._back(lambda paid: self.objective(paid, policy=policy, coefficient=coefficient).loss)
        return Term(
            loss=loss,
            reached=frozenset(name for name, gradient in found.items() if bool(gradient.any())),
            norm=math.sqrt(_dot(found, found)),
        )

    def along_advantages(self) -> float:
        """Return the cosine of what the signs of the advantages change in the policy term's gradient, to −∇ Σ A log π.

        What does not follow from the advantages cancels out of the change. 0 where they change nothing.
        """
        _, up = self._back(lambda paid: self.objective(paid, policy=1.0, coefficient=0.0).loss)
        _, down = self._back(lambda paid: self.objective(paid, policy=-1.0, coefficient=0.0).loss)
        rows = _first_rows(self.session, self.paid.rows)
        _, should = self._back(lambda _: -(_signs(rows)[:, :, None] * self.query_logprobs(rows)).sum())
        change = {name: up[name] - down[name] for name in up.keys() & down.keys()}
        norms = math.sqrt(_dot(change, change) * _dot(should, should))
        return _dot(change, should) / norms if norms > 0 else 0.0

    def query_logprobs(self, rows: TrajectoryBatch) -> Float[Tensor, "B S Q"]:
        """Return log π of the queries' tokens, by one forward without a cache."""
        states = self.model.hidden(rows.ids, rows.role, rows.layout.query_positions)
        distribution = self.model.policy_logprobs(states, self.session.config.rollout.temperature)
        ids, real = rows.query_slots()
        logprobs = distribution.gather(-1, ids.flatten(1)[:, :, None]).view(ids.shape)
        return logprobs.masked_fill(~real, 0.0)

    def _back(self, loss_of: Callable[[PaidRows], Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Return a loss on the paid rows, and its gradient by trainable tensor (none where the loss has no graph)."""
        paid = self.pay(self.paid.rows)
        _drop_gradients(self.model)
        with self.model.adapter_dropout():
            loss = loss_of(paid)
        if loss.requires_grad:
            loss.backward()
        found = {name: p.grad for name, p in self.model.named_trainable().items() if p.grad is not None}
        return float(loss.detach()), found

    def objective(self, paid: PaidRows, *, policy: float, coefficient: float) -> LossOutput:
        """Apply the configured objective to the first micro-batch."""
        return _objective(self.session, paid, self.pool, policy, coefficient)

    @torch.no_grad()
    def states(self) -> tuple[Float[Tensor, "B SQ D"], Float[Tensor, "B SQ D"]]:
        """Return the hidden states at the query positions, of policy and reference, for the first micro-batch."""
        rows = _first_rows(self.session, self.paid.rows)
        policy = self.model.hidden(rows.ids, rows.role, rows.layout.query_positions)
        with self.model.reference():
            return policy, self.model.hidden(rows.ids, rows.role, rows.layout.query_positions)


@contextlib.contextmanager
def try_out(session: Session) -> Iterator[Trial]:
    """Write, pay and update the small batch; what happens to weights, gradients and random state is undone at the end.

    Its articles and numbers are the first of the first update.
    """
    config, device = session.config, session.model.device
    num_articles = min(MOST_ARTICLES, config.rollout.articles)
    group = min(max(2, config.rollout.trajectories), MOST_TRAJECTORIES)
    stream = session.stream(config.corpus, num_probes=session.num_training_probes, purpose=Purpose.POOL)
    pool = stream.next_pool(num_articles).to(device)
    uniforms = session.uniforms(Purpose.TRAINING, 0, range(num_articles), group)
    with _put_back(session):
        with _moved(session):  # before all else: an update switches off a dropout that had been left on
            moved_rows = session.rollout(pool, uniforms)
        paid, cost = _first_update(session, pool, uniforms)
        yield Trial(session=session, pool=pool, uniforms=uniforms, paid=paid, moved_rows=moved_rows, cost=cost)


def _first_update(session: Session, pool: PairPool, uniforms: Tensor) -> tuple[PaidRows, Cost]:
    """Write and pay the batch and take an update's step, with advantages of ±1 so that rewards do not matter."""
    config, device = session.config, session.model.device
    reset_peak(device)
    at_rest = peak_bytes(device) or 0
    rows, *rollout = _measured(device, lambda: session.rollout(pool, uniforms))
    paid, *pay = _measured(device, lambda: _pay(session, rows, pool))
    group = rows.num_rows // pool.num_articles
    advantages, _ = compute_advantages(paid.rewards.rewards, config.objective, AgentState(), group)
    everything = torch.ones_like(advantages.keep)
    advantages = replace(advantages, advantages=_signs(rows), keep=everything)
    has_gradient = _objective(session, paid, pool, 1.0, config.objective.kl.coefficient).loss.requires_grad

    def step() -> bool:
        optimizer, bad = make_optimizer(session, config.optimizer), first_place(paid.numbers())
        return has_gradient and apply_update(session, optimizer, paid, pool, advantages, 0, bad).stepped

    with _put_back(session):
        stepped, *update = _measured(device, step)
    num_rows = config.rollout.articles * config.rollout.trajectories
    more_rows = num_rows / rows.num_rows

    def more(at_once: int) -> float:
        return min(at_once, num_rows) / min(at_once, rows.num_rows)

    grown = (
        (rollout[1] - at_rest) * more_rows,
        (pay[1] - at_rest) * more(session.micro_batch.forward_rows),
        (update[1] - at_rest) * more(session.micro_batch.rows),
    )
    return paid, Cost(
        update_s=(rollout[0] + pay[0] + update[0]) * more_rows,
        peak_bytes=at_rest + int(max(0.0, *grown)) if at_rest else None,
        stepped=stepped,
    )


def _measured(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float, int]:
    """Return what the work gives, its seconds and its peak of memory."""
    reset_peak(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start, peak_bytes(device) or 0


def _pay(session: Session, rows: TrajectoryBatch, pool: PairPool) -> PaidRows:
    indices, group = range(pool.num_articles), rows.num_rows // pool.num_articles
    return session.pay(rows, pool, session.counterfactual_uniforms(Purpose.COUNTERFACTUAL, 0, indices, group))


def _objective(session: Session, paid: PaidRows, pool: PairPool, policy: float, coefficient: float) -> LossOutput:
    """Apply the objective to the first micro-batch, with the parts that belong to the policy term if there is one."""
    config, rows = session.config, _first_rows(session, paid.rows)
    index = torch.arange(rows.num_rows, device=rows.ids.device)
    batch = UpdateBatch(
        rows=rows,
        advantages=policy * _signs(rows),
        reference_hidden=session.reference_hidden(paid)[: rows.num_rows],
        num_query_tokens=rows.num_rows * rows.num_steps * rows.layout.query_len,
        selection_logprobs=picked_logprobs(session, paid.rows, pool, index) if policy else None,
        reward_weights=reward_weights(session, paid.rows, pool, index, 1.0) if policy else None,
    )
    kl = replace(config.objective.kl, coefficient=coefficient)
    return session.objective(session.model, batch, kl, config.rollout.temperature)


def _first_rows(session: Session, rows: TrajectoryBatch) -> TrajectoryBatch:
    """Return the first micro-batch."""
    return rows.select(torch.arange(rows.num_rows, device=rows.ids.device)[: session.micro_batch_rows])


def _signs(rows: TrajectoryBatch) -> Float[Tensor, "B S"]:
    """Return advantages of ±1 that differ between the trajectories of a group and between steps."""
    row, step = torch.arange(rows.num_rows)[:, None], torch.arange(rows.num_steps)
    return (1.0 - 2.0 * ((row + step) % 2)).to(rows.ids.device)


@contextlib.contextmanager
def _moved(session: Session) -> Iterator[None]:
    seed = int(generator(session.config.training.seed, Purpose.CONTROL).integers(2**62))
    with _put_back(session):
        noise = torch.Generator().manual_seed(seed)  # the CPU's: the same move on any device
        with torch.no_grad():
            for parameter in session.model.named_trainable().values():
                size = MOVE * (float(parameter.float().square().mean().sqrt()) or 1.0)
                parameter.add_((size * torch.randn(parameter.shape, generator=noise)).to(parameter))
        yield


@contextlib.contextmanager
def _put_back(session: Session) -> Iterator[None]:
    """Restore weights and the global generators, and drop the gradients."""
    model = session.model
    saved = {name: p.detach().clone() for name, p in model.named_trainable().items()}
    average = None if session.ema is None else {name: value.clone() for name, value in session.ema.state().items()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in model.named_trainable().items():
                    parameter.copy_(saved[name])
            if session.ema is not None and average is not None:
                session.ema.load(average)
            _drop_gradients(model)


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys())


def _drop_gradients(model: LanguageModel) -> None:
    for parameter in (*model.named_trainable().values(), *model.named_frozen().values()):
        parameter.grad = None
