"""Session: everything a configuration stands for, loaded and checked, and the one way to write and pay trajectories.

In: Config. Out: model, template, embedder, scorer, environment. Training, evaluation and single rollouts all go
through it, so that they cannot differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_guided_rl.config import Config, CorpusConfig
from attention_guided_rl.data import CORPORA, is_private, open_corpus
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.distributed import Processes
from attention_guided_rl.ema import EmaWeights
from attention_guided_rl.embedders import EMBEDDERS
from attention_guided_rl.environment import (
    Embedder,
    Picker,
    ReadingEnvironment,
    embed_pool_keys,
    picked_logprobs,
    sampled_pick,
)
from attention_guided_rl.errors import NumericError
from attention_guided_rl.fingerprints import fingerprints
from attention_guided_rl.guard import WEIGHT, first_place, first_tensor, row_numbers
from attention_guided_rl.loading import load_model
from attention_guided_rl.memory import Result, RowLimit, out_of_memory, rows_at_once
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network
from attention_guided_rl.objective import OBJECTIVES, Objective
from attention_guided_rl.randomness import Purpose, uniforms
from attention_guided_rl.records import BranchRequest, PairPool, Rewards, Scores, TrajectoryBatch, join_rows
from attention_guided_rl.reward import (
    REWARDS,
    Reward,
    expected_rewards,
    reward_inputs,
    unread_candidates,
    with_candidates,
    with_probes,
)
from attention_guided_rl.rollouts import rollout
from attention_guided_rl.scorer import SCORERS, Scorer, ema_scorer, reference_scorer
from attention_guided_rl.selection import calibrate_temperature, head_scores, query_information, selection_logprobs
from attention_guided_rl.sizes import OpenCorpus, context_tokens, resolve_sizes
from attention_guided_rl.tables import resolve
from attention_guided_rl.template import Template, build_template
from attention_guided_rl.tracking import require_tensorboard

ALL_ROWS = 2**31 - 1
PREPARED_ARTICLES = 8
"""Articles whose keys are tried as queries before a run begins."""


@dataclass(frozen=True, slots=True)
class PaidRows:
    """Trajectories with their scores and rewards."""

    rows: TrajectoryBatch
    scores: Scores
    rewards: Rewards
    prior: Float[Tensor, "A N"]

    def numbers(self) -> dict[str, list[Tensor]]:
        """Return all that must be finite, by the place it comes from."""
        return row_numbers(self.rows, self.scores, self.prior, self.rewards)


class Session:
    """A loaded configuration. `temperature` (τ) is calibrated or restored before the first trajectory."""

    def __init__(
        self, config: Config, processes: Processes, *, account: str = "untitled", goes_on: bool = False
    ) -> None:
        """Check what can be checked without a model, remote services included, then load.

        `account`: what spending on embeddings is added up under; `goes_on`: that of a run begun before.

        Raises:
            AgrlError: of the kind that fits, before any weights load where possible.
        """
        self.config, self.processes = config, processes
        with processes.meeting():
            self._check(account=account, goes_on=goes_on)
        with processes.meeting(), out_of_memory("loading the model"):
            self._load()

    def _check(self, *, account: str, goes_on: bool) -> None:
        """Find out what can be known before weights are loaded; the service is asked by the main process alone."""
        config, processes = self.config, self.processes
        self.reward = _reward(config.reward.kind, "reward.kind")
        self.num_training_probes = config.reward.num_probes if self.reward.needs == "probes" else 0
        self.evaluation_reward = _reward(config.evaluation.reward or config.reward.kind, "evaluation.reward")
        self.objective: Objective = resolve(OBJECTIVES, config.objective.kind, "objective.kind")
        self._make_embedder = resolve(EMBEDDERS, config.embedder.kind, "embedder.kind")
        corpora: list[CorpusConfig] = (
            [config.corpus] if config.evaluation.corpus is None else [config.corpus, config.evaluation.corpus]
        )
        for corpus in corpora:
            resolve(CORPORA, corpus.kind, "corpus.kind")
        private = any(map(is_private, corpora))
        self.network = Network(config.network, account=account, goes_on=goes_on, private_text=private)
        self.corpus: OpenCorpus = cache(partial(open_corpus, network=self.network))  # opening may read a whole file
        processes.share(config.rollout.articles)
        if config.log.tensorboard:
            require_tensorboard()
        self._context = context_tokens(config)
        if processes.is_main and hasattr(self._make_embedder, "preflight"):
            self._make_embedder.preflight(config.embedder, self.network)

    def _load(self) -> None:
        """Load the model and open what it reads."""
        config, processes = self.config, self.processes
        self.model: LanguageModel = load_model(
            config.model, processes.device, seed=config.training.seed, offline=config.network.offline
        )
        self.fingerprints = fingerprints(self.model)
        self.template: Template = build_template(self.model.tokenizer, config.template)
        self.num_pairs, self.num_steps = resolve_sizes(
            config, self.template, self.model.encode, self.corpus, self._context
        )
        self.embedder: Embedder = self._make_embedder(config.embedder, self.network, self.model)
        row_len = self.template.layout(self.num_steps, config.rollout.query_tokens, config.pairs.value_tokens).row_len
        most_rows = config.rollout.articles * config.rollout.trajectories
        if config.training.micro_batch_rows is None:
            at_once = rows_at_once(processes.device, row_len, self.model.config.hidden_size, most_rows)
            more = 4 if processes.device.type == "cpu" else 1  # a GPU takes all rows as it is
            self.micro_batch = RowLimit(at_once, row_len, forward_rows=more * at_once)
        else:
            self.micro_batch = RowLimit(config.training.micro_batch_rows, row_len)
        self.rollout_batch = RowLimit(ALL_ROWS, row_len)
        self.reference_scorer: Scorer = reference_scorer(self.model, self.micro_batch)
        self.ema: EmaWeights | None = None
        if config.reward.scorer == "ema":
            self.ema = EmaWeights(self.model, config.reward.ema_decay)
            self.scorer: Scorer = ema_scorer(self.model, self.ema, self.micro_batch)
        else:
            self.scorer = SCORERS[config.reward.scorer](self.model, self.micro_batch)
        self.temperature = config.selection.temperature

    @property
    def micro_batch_rows(self) -> int:
        """Rows that the update takes at once, now."""
        return self.micro_batch.rows

    def agree_on_rows(self) -> None:
        """Let all processes take as few rows at once as the one with the least memory."""
        limits = (self.micro_batch, self.rollout_batch)
        own = torch.tensor([[limit.forward_rows for limit in limits]], device=self.processes.device)
        for limit, rows in zip(limits, self.processes.gather_rows(own).amin(0).tolist(), strict=True):
            limit.lower(rows)

    def nonfinite_weight(self) -> str | None:
        """Name a weight that is not finite on some process, trained or not; None if all are."""
        average = {} if self.ema is None else self.ema.state()
        everything = (self.model.named_trainable(), self.model.named_frozen(), average)
        own = first_tensor(item for part in everything for item in part.items())
        found = next((name for name in self.processes.gather_objects([own]) if name is not None), None)
        return None if found is None else f"{WEIGHT} {found}"

    def stream(self, corpus: CorpusConfig, *, num_probes: int, purpose: Purpose) -> PoolStream:
        """Return a stream of pools that begins at the beginning, whatever other streams of the corpus have read.

        The evaluation's pools and probes are the same for every training seed, so that runs can be paired by article.
        """
        seed = 0 if purpose is Purpose.EVALUATION_POOL else self.config.training.seed
        return PoolStream(
            self.corpus(corpus),
            self.model.encode,
            self.config.pairs,
            num_pairs=self.num_pairs,
            num_probes=num_probes,
            seed=seed,
            purpose=purpose,
        )

    def uniforms(self, purpose: Purpose, update: int, indices: range, trajectories: int) -> Tensor:
        """Return the uniform numbers of these articles' rows, (B, S, Q+1), on the model's device."""
        c = self.config
        numbers = uniforms(
            c.training.seed, purpose, update, indices, trajectories, self.num_steps, c.rollout.query_tokens
        )
        return numbers.to(self.model.device)

    @torch.no_grad()
    def environment(self, pool: PairPool, trajectories: int) -> ReadingEnvironment:
        """Return an environment in which `trajectories` rows per article have read nothing yet."""
        assert self.temperature is not None, "calibrate or restore the temperature first"
        env = ReadingEnvironment(self.embedder, self.config.selection, self.temperature)
        env.reset(pool, embed_pool_keys(self.embedder, pool), trajectories)
        return env

    def rollout(self, pool: PairPool, uniforms: Tensor, picker: Picker = sampled_pick) -> TrajectoryBatch:
        """Write trajectories with the active weights (`with session.model.reference():` for the untrained ones).

        All at once, unless memory runs out.
        """
        num_rows, temperature = len(uniforms), self.config.rollout.temperature
        env = self.environment(pool, num_rows // pool.num_articles)

        def write() -> TrajectoryBatch:
            parts = []
            with self.rollout_batch.watch("writing queries", num_rows), self.model.folded():
                for rows in torch.arange(num_rows).split(self.rollout_batch.rows):
                    env.begin(None if len(rows) == num_rows else rows.to(self.model.device))
                    parts.append(rollout(self.model, self.template, env, uniforms[rows], temperature, picker))
            return join_rows(parts)

        return self.rollout_batch.fit(num_rows, write)

    def prior(self, pool: PairPool) -> Float[Tensor, "A N"]:
        """Return the reference's Σ log p of every pair's value alone."""
        return self._fitted(
            pool.num_articles * pool.num_pairs, lambda: self.reference_scorer.prior(pool, self.template)
        )

    def score(self, rows: TrajectoryBatch, request: BranchRequest) -> Scores:
        """Let the reference score rows as they are."""
        return self._fitted(rows.num_rows, lambda: self.reference_scorer.score(rows, request))

    def _fitted(self, num_rows: int, work: Callable[[], Result]) -> Result:
        """Score so many rows, fewer at a time where memory runs out. Not in an update, where processes must agree."""

        def watched() -> Result:
            with self.micro_batch.watch("scoring", num_rows, forward=True):
                return work()

        return self.micro_batch.fit(num_rows, watched)

    def counterfactual_uniforms(
        self, purpose: Purpose, update: int, indices: range, trajectories: int
    ) -> Float[Tensor, "B S Q"] | None:
        """Return the numbers that q⁰ is written with, or None where the reward does not need it."""
        reward = self.reward if purpose is Purpose.COUNTERFACTUAL else self.evaluation_reward
        if reward.needs != "counterfactual":
            return None
        return self.uniforms(purpose, update, indices, trajectories)[:, :, :-1]

    def pay(
        self, rows: TrajectoryBatch, pool: PairPool, counterfactual_uniforms: Float[Tensor, "B S Q"] | None = None
    ) -> PaidRows:
        """Score finished rows with the training's scorer, once, and compute the training's rewards."""
        request = self._request(self.reward, rows, pool, counterfactual_uniforms)
        if self.config.reward.pick == "sampled":
            return self._pay(self.scorer, self.reward, rows, pool, request)
        candidates = unread_candidates(rows, pool)
        paid = self._pay(self.scorer, self.reward, rows, pool, with_candidates(request, candidates, pool))
        inputs = reward_inputs(rows, paid.scores, pool, paid.prior)
        return replace(paid, rewards=expected_rewards(self.reward, inputs, paid.scores, candidates, rows))

    def pay_for_evaluation(
        self,
        rows: TrajectoryBatch,
        pool: PairPool,
        counterfactual_uniforms: Float[Tensor, "B S Q"] | None = None,
        *,
        prior: Float[Tensor, "A N"] | None = None,
        scorer: Scorer | None = None,
        probes: bool = True,
    ) -> PaidRows:
        """Score finished rows with the frozen reference and compute the rewards.

        `prior` may be given if this scorer computed it before. Without `probes` those of the pool are left out unless
        the reward is of them.

        Raises:
            NumericError: a number is not finite.
        """
        request = self._request(self.evaluation_reward, rows, pool, counterfactual_uniforms)
        if probes and pool.probe_value_ids.shape[1]:
            request = with_probes(request, rows, pool)
        scorer = scorer or self.reference_scorer
        paid = self._fitted(
            rows.num_rows, lambda: self._pay(scorer, self.evaluation_reward, rows, pool, request, prior)
        )
        if place := first_place(paid.numbers()):
            raise NumericError(f"a number of the evaluation is not finite: {place}")
        return paid

    def _request(
        self, reward: Reward, rows: TrajectoryBatch, pool: PairPool, counterfactual_uniforms: Tensor | None
    ) -> BranchRequest:
        """Return what the reward needs scored besides the values."""
        if reward.needs == "counterfactual" and counterfactual_uniforms is None:
            raise ValueError("this reward needs uniform numbers for the counterfactual queries")
        request = BranchRequest(
            counterfactual_uniforms=counterfactual_uniforms, query_temperature=self.config.rollout.temperature
        )
        return with_probes(request, rows, pool) if reward.needs == "probes" else request

    def _pay(
        self,
        scorer: Scorer,
        reward: Reward,
        rows: TrajectoryBatch,
        pool: PairPool,
        request: BranchRequest,
        prior: Tensor | None = None,
    ) -> PaidRows:
        scores = scorer.score(rows if self.config.reward.query_in_context else rows.without_queries(), request)
        prior = scorer.prior(pool, self.template) if prior is None else prior
        return PaidRows(rows, scores, reward(reward_inputs(rows, scores, pool, prior)), prior)

    def reference_hidden(self, paid: PaidRows, index: Int[Tensor, " M"] | None = None) -> Float[Tensor, "M SQ D"]:
        """Return the reference's hidden states at the query positions of the rows at `index`, or of all rows.

        They come from the scoring pass where it has them.
        """
        if self.config.reward.scorer == "reference" and self.config.reward.query_in_context:
            return paid.scores.query_hidden if index is None else paid.scores.query_hidden[index]
        return self.reference_scorer.score(paid.rows if index is None else paid.rows.select(index)).query_hidden

    @torch.no_grad()
    def kl_of_queries(self, paid: PaidRows) -> Float[Tensor, "B S"]:
        """Return the mean k1 = log π − log π₀ of each query's tokens, as they were sampled."""
        ids, real = paid.rows.query_slots()
        hidden, parts = self.reference_hidden(paid), []
        size = self.micro_batch_rows
        for some_ids, some_hidden in zip(ids.split(size), hidden.split(size), strict=True):
            distribution = self.model.reference_logprobs(some_hidden, self.config.rollout.temperature)
            parts.append(distribution.gather(-1, some_ids.flatten(1)[:, :, None]).view(some_ids.shape))
        k1 = torch.where(real, paid.rows.sampled_logprobs - torch.cat(parts), 0.0)
        return k1.sum(-1) / ids.shape[2]

    def picked_logprobs(self, rows: TrajectoryBatch, pool: PairPool, articles: Int[Tensor, " B"]) -> Tensor:
        """Recompute log σ(pick) of rows, (B, S), with the gradient of a trained embedder; row b reads `articles[b]`."""
        assert self.temperature is not None
        return picked_logprobs(self.embedder, self.config.selection, self.temperature, rows, pool, articles)

    @torch.no_grad()
    def calibrate(self, corpus: CorpusConfig) -> bool:
        """Fix τ on queries that the untrained policy writes at step 1; return whether the target was reached."""
        selection, c = self.config.selection, self.config
        per_article = c.rollout.trajectories
        num_articles = -(-selection.calibration_queries // per_article)
        pool = self.stream(corpus, num_probes=0, purpose=Purpose.POOL).next_pool(num_articles)
        pool = pool.to(self.model.device)
        self.temperature = 1.0
        if self.num_pairs == 1:  # nothing to choose
            return True
        first_query = self.uniforms(Purpose.CALIBRATION, 0, range(num_articles), per_article)[:, :1]
        with self.model.reference():
            rows = self.rollout(pool, first_query)
        ids, mask = rows.query_slots()
        queries = self.embedder.embed_queries(ids[:, 0], mask[:, 0])
        scores = head_scores(queries, embed_pool_keys(self.embedder, pool))
        if first_place({"logits": [rows.sampled_logprobs], "embedding": [scores]}):
            raise NumericError("selection.temperature cannot be calibrated: logits or embeddings are not finite")
        self.temperature, reached = calibrate_temperature(scores, selection.target_entropy, selection.heads)
        return reached

    @torch.no_grad()
    def steerability(self, pool: PairPool) -> Float[Tensor, " A"]:
        """Mean KL(σ(·|q) ‖ mean_q σ) in nats with the pool's own keys as queries: a property of embedder and τ."""
        assert self.temperature is not None
        keys = embed_pool_keys(self.embedder, pool)
        nats: list[Tensor] = []
        for a in range(pool.num_articles):
            queries = self.embedder.embed_queries(pool.key_ids[a], pool.key_mask[a])
            unread = torch.ones(pool.num_pairs, pool.num_pairs, dtype=torch.bool, device=queries.device)
            scores = head_scores(queries, keys[a : a + 1])
            logprobs = selection_logprobs(scores, unread, self.temperature, self.config.selection.heads)
            nats.append(query_information(logprobs))
        return torch.stack(nats)


def _reward(name: str, key: str) -> Reward:
    """Look a reward up; a plain function from outside needs nothing but the values' log-probabilities."""
    found = resolve(REWARDS, name, key)
    return found if isinstance(found, Reward) else Reward(found)
