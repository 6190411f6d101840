"""Session: everything a configuration stands for, loaded and checked, and the one way to write and pay trajectories.

In: Config. Out: model, template, embedder, scorer, environment. Training, evaluation and single rollouts all go
through it, so that they cannot differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attention_guided_rl.config import Config, CorpusConfig
from attention_guided_rl.data import CORPORA, is_private, open_corpus
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.distributed import Processes
from attention_guided_rl.embedders import EMBEDDERS
from attention_guided_rl.environment import Embedder, Picker, ReadingEnvironment, embed_pool_keys, sampled_pick
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.loading import load_model
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network
from attention_guided_rl.objective import OBJECTIVES, Objective
from attention_guided_rl.randomness import Purpose, uniforms
from attention_guided_rl.records import PairPool, Rewards, Scores, TrajectoryBatch
from attention_guided_rl.reward import REWARDS, RewardInputs
from attention_guided_rl.rollouts import rollout
from attention_guided_rl.scorer import SCORERS, Scorer, reference_scorer
from attention_guided_rl.selection import calibrate_temperature, head_scores, query_information, selection_logprobs
from attention_guided_rl.sizes import context_tokens, resolve_sizes
from attention_guided_rl.tables import resolve
from attention_guided_rl.template import Template, build_template
from attention_guided_rl.tracking import require_tensorboard


@dataclass(frozen=True, slots=True)
class PaidRows:
    """Trajectories with their scores and rewards."""

    rows: TrajectoryBatch
    scores: Scores
    rewards: Rewards
    prior: Float[Tensor, "A N"]


class Session:
    """A loaded configuration. `temperature` (τ) is calibrated or restored before the first trajectory."""

    def __init__(self, config: Config, processes: Processes, *, account: str = "untitled") -> None:
        """Check what can be checked without a model, remote services included, then load.

        `account`: the name under which spending on embeddings is added up, that of the run.

        Raises:
            AgrlError: of the kind that fits, before any weights load where possible.
        """
        self.config, self.processes = config, processes
        self._reward: Callable[[RewardInputs], Rewards] = resolve(REWARDS, config.reward.kind, "reward.kind")
        self.objective: Objective = resolve(OBJECTIVES, config.objective.kind, "objective.kind")
        make_embedder = resolve(EMBEDDERS, config.embedder.kind, "embedder.kind")
        corpora: list[CorpusConfig] = (
            [config.corpus] if config.evaluation.corpus is None else [config.corpus, config.evaluation.corpus]
        )
        for corpus in corpora:
            resolve(CORPORA, corpus.kind, "corpus.kind")
        self.network = Network(config.network, account=account, private_text=any(map(is_private, corpora)))
        processes.share(config.rollout.articles)
        if config.log.tensorboard:
            require_tensorboard()
        context = context_tokens(config)

        if processes.is_main and hasattr(make_embedder, "preflight"):
            make_embedder.preflight(config.embedder, self.network)
        processes.rendezvous()

        self.model: LanguageModel = load_model(
            config.model, processes.device, seed=config.training.seed, offline=config.network.offline
        )
        self.template: Template = build_template(self.model.tokenizer, config.template)
        self.num_pairs, self.num_steps = resolve_sizes(config, self.template, self.model.encode, self.network, context)
        self.embedder: Embedder = make_embedder(config.embedder, self.network, self.model)
        if self.embedder.depends_on_policy:
            raise ConfigError(f"embedder.kind: {config.embedder.kind!r} depends on the policy, which is not supported")
        self.scorer: Scorer = SCORERS[config.reward.scorer](self.model, config.training.micro_batch_rows)
        self.reference_scorer: Scorer = reference_scorer(self.model, config.training.micro_batch_rows)
        self.temperature = config.selection.temperature

    def stream(self, corpus: CorpusConfig, *, num_probes: int, purpose: Purpose) -> PoolStream:
        """Open a corpus as a stream of pools."""
        return PoolStream(
            open_corpus(corpus, self.network),
            self.model.encode,
            self.config.pairs,
            num_pairs=self.num_pairs,
            num_probes=num_probes,
            seed=self.config.training.seed,
            purpose=purpose,
        )

    def uniforms(self, purpose: Purpose, update: int, indices: range, trajectories: int) -> Tensor:
        """Return the uniform numbers of these articles' rows, (B, S, Q+1)."""
        c = self.config
        return uniforms(c.training.seed, purpose, update, indices, trajectories, self.num_steps, c.rollout.query_tokens)

    def environment(self, pool: PairPool, trajectories: int) -> ReadingEnvironment:
        """Return an environment in which `trajectories` rows per article have read nothing yet."""
        assert self.temperature is not None, "calibrate or restore the temperature first"
        env = ReadingEnvironment(self.embedder, self.config.selection, self.temperature)
        env.reset(pool, embed_pool_keys(self.embedder, pool), trajectories)
        return env

    def rollout(self, pool: PairPool, uniforms: Tensor, picker: Picker = sampled_pick) -> TrajectoryBatch:
        """Write trajectories with the active weights (`with session.model.reference():` for the untrained ones)."""
        env = self.environment(pool, uniforms.shape[0] // pool.num_articles)
        return rollout(self.model, self.template, env, uniforms, self.config.rollout.temperature, picker)

    def pay(
        self, rows: TrajectoryBatch, pool: PairPool, prior: Tensor | None = None, scorer: Scorer | None = None
    ) -> PaidRows:
        """Score finished rows and compute their rewards; `prior` may be given if this scorer computed it before."""
        scorer = scorer or self.scorer
        scores = scorer.score(rows if self.config.reward.query_in_context else rows.without_queries())
        if prior is None:
            prior = scorer.prior(pool, self.template)
        return PaidRows(rows, scores, self.reward(rows.picks, scores.value_logprobs, pool, prior), prior)

    def reward(self, picks: Tensor, value_logprobs: Tensor, pool: PairPool, prior: Tensor) -> Rewards:
        """Apply the configured reward."""
        return self._reward(RewardInputs(picks=picks, value_logprobs=value_logprobs, pool=pool, prior=prior))

    def reference_hidden(self, paid: PaidRows) -> Tensor:
        """Return the reference's hidden states at the query positions, from the scoring pass where it has them."""
        if self.config.reward.scorer == "reference" and self.config.reward.query_in_context:
            return paid.scores.query_hidden
        return self.reference_scorer.score(paid.rows).query_hidden

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
        self.temperature, reached = calibrate_temperature(scores, selection.target_entropy, selection.heads)
        return reached

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
