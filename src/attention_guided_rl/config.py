"""Configuration: every setting, as a field of a frozen dataclass, documented where it is declared.

Nonsense is refused when a section is made, contradictions between sections when the whole is; both before any model
loads. How a configuration comes from presets, files and the command line is in `config_files.py`.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _null_is_a_name(value: Any) -> Any:
    """YAML reads a bare null as nothing; where it is one of the names, it is meant as a name."""
    return "null" if value is None else value


def _require_no_secret(address: str | None, name: str) -> None:
    """Refuse an address that may hold a password or a key: the configuration is printed, and stored with the run."""
    _require(
        address is None or re.search(r"[?#]|(^|//)[^/]*@", address) is None,
        f"{name} must be an address without user name, '?' and '#': what follows them may be a password or a key",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The language model and how it is trained."""

    name: str = "tiny"
    """A model of the Hugging Face hub, a folder, or `tiny`, the bundled model of the generated encyclopedia."""
    revision: str | None = None
    """Revision on the hub; None: the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in memory; log-probabilities are always computed in float32."""
    adapter: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter (reference = adapter off) or all weights (reference = a frozen copy)."""
    lora_rank: int = 16
    """Rank r of the adapter."""
    lora_alpha: float = 32.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter, in the update's forward only."""

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 1, f"model.lora_rank must be at least 1, got {self.lora_rank}")
        _require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"model.lora_alpha must be positive, got {self.lora_alpha}",
        )
        _require(0 <= self.lora_dropout < 1, f"model.lora_dropout must be in [0, 1), got {self.lora_dropout}")
        _require(
            self.adapter == "lora" or self.dtype == "float32",
            "model.adapter: full trains float32 weights (small updates vanish in bfloat16); set model.dtype: float32",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateConfig:
    """How prompt, queries and values become one row of tokens."""

    kind: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: assistant turn = query, user turn = value; `plain`: the two prefixes; `auto`: chat if there is one."""
    prompt: str = "Ask for what to read next."
    """Instruction at the start of every row."""
    query_prefix: str = "\nQuery:"
    """Plain text before each query."""
    value_prefix: str = "\nPassage:"
    """Plain text before each value."""
    date_string: str = "01 Jan 2026"
    """Date given to chat templates that print today's; fixed, so that a run reads the same tomorrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Where articles come from."""

    kind: str = "encyclopedia"
    """`encyclopedia` (generated), `wikipedia` (by title), `hub` (a data set), `dump` (Wikipedia XML), `files`, or
    `package.module:name`."""
    path: Path | None = None
    """`files`: a file or folder of text, Markdown or JSONL; `dump`: pages-articles XML, plain or bz2; `wikipedia`: a
    text file with a title in each line."""
    title: str | None = None
    """Read only the article with this title, again and again; `wikipedia`: its address will do."""
    titles: tuple[str, ...] = ()
    """`wikipedia`: the articles with these titles."""
    category: str | None = None
    """`wikipedia`: the articles of this category, not of those below it."""
    random: int = 0
    """`wikipedia`: so many random articles, drawn once and then kept in the cache."""
    limit: int = 500
    """`wikipedia`: at most so many articles of a category."""
    language: str = "en"
    """`wikipedia`: language code of the edition."""
    site: str | None = None
    """`wikipedia`: address of another wiki's api.php; None: Wikipedia in `language`."""
    requests_per_second: float = 1.0
    """`wikipedia`: at most so many requests a second, one at a time."""
    name: str | None = None
    """`hub`: a data set of the Hugging Face hub, or a folder of one."""
    subset: str | None = None
    """`hub`: the configuration of the data set, such as 20231101.en."""
    revision: str | None = None
    """`hub`: revision of the data set; None: the newest."""
    text_column: str = "text"
    """`hub`: the column to read; title, url and id are taken from columns of those names where they exist."""
    index: Path | None = None
    """`dump`: the index of a multistream dump: reading can then start anywhere, and in random order."""
    split: Literal["all", "train", "dev", "test"] = "all"
    """Which part of the articles, by a hash of the title: 90 % train, 5 % dev, 5 % test; `all`: every article."""
    drop_near_duplicates: bool = True
    """Pass over an article whose text is nearly that of one before it."""
    shuffle: bool = True
    """`files`, `wikipedia`: visit the articles in a new random order in every pass; `hub`, `dump` with an index: in one
    random order; otherwise as they stand."""
    variant: Annotated[Literal["threads", "needle", "chain", "null"], BeforeValidator(_null_is_a_name)] = "threads"
    """`encyclopedia`: what is planted."""
    subjects: int = 7
    """`encyclopedia`: subjects of an article."""
    pairs_per_subject: int = 4
    """`encyclopedia`: pairs about each subject, at most 8."""
    seed: int = 1
    """`encyclopedia`: seed of the articles; held-out articles are those of another seed. Elsewhere: of the order."""

    def __post_init__(self) -> None:
        _require(self.subjects >= 1, f"corpus.subjects must be at least 1, got {self.subjects}")
        _require(
            1 <= self.pairs_per_subject <= 8, f"corpus.pairs_per_subject must be 1 to 8, got {self.pairs_per_subject}"
        )
        names = {"needle": self.num_pairs, "chain": self.num_pairs + 1}.get(self.variant, self.subjects)
        _require(names <= 64, f"corpus.subjects: this {self.variant} article needs {names} names; there are 64")
        _require(0 <= self.seed < 2**63, f"corpus.seed must be 0 to 2^63 − 1, got {self.seed}")
        _require(self.random >= 0 and self.limit >= 1, "corpus.random must not be negative, corpus.limit at least 1")
        _require(
            0 < self.requests_per_second <= 100,
            f"corpus.requests_per_second must be above 0 and at most 100, got {self.requests_per_second}",
        )
        _require_no_secret(self.site, "corpus.site")
        if self.kind in ("files", "dump"):
            _require(self.path is not None, f"corpus.kind: {self.kind} needs corpus.path")
        if self.kind == "hub":
            _require(self.name is not None, "corpus.kind: hub needs corpus.name")
        if self.kind == "wikipedia":
            given = [self.title, self.titles, self.path, self.category, self.random]
            _require(
                sum(bool(source) for source in given) == 1,
                "corpus.kind: wikipedia needs one of corpus.title, titles, path (a file of titles), category, random",
            )
            _require(
                re.fullmatch(r"[a-z]{2,}(-[a-z]+)*", self.language) is not None,
                f"corpus.language must be a code such as en or zh-yue, got {self.language!r}",
            )
        if self.kind == "encyclopedia":
            _require(self.path is None, "corpus.path has no meaning for the generated encyclopedia; set corpus.kind")
            _require(self.title is None, "corpus.title has no meaning for the generated encyclopedia; set corpus.kind")

    @property
    def label(self) -> str:
        """What is read, in a few words and without folders of this machine."""
        if self.kind == "encyclopedia":
            return f"{self.kind} {self.variant}"
        path = self.path and self.path.name
        what = self.title or self.category or path or self.name or (self.random and f"{self.random} random articles")
        return f"{self.kind} {what or ', '.join(self.titles)}"

    @property
    def num_pairs(self) -> int:
        """`encyclopedia`: pairs of an article."""
        return self.subjects * self.pairs_per_subject


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsConfig:
    """How an article is cut into key/value pairs."""

    cut: Literal["tokens", "sentences"] = "tokens"
    """`tokens`: consecutive runs of key_tokens + value_tokens; `sentences`: consecutive sentences, key then value."""
    num_pairs: int | Literal["auto"] = 24
    """N: pairs in the pool of a trajectory; `auto` (needs corpus.title): all of the article that the context holds."""
    key_tokens: int = 8
    """K: tokens of a key (slot length for sentences; longer ones are cut)."""
    value_tokens: int = 10
    """L: tokens of a value (slot length for sentences; longer ones are cut)."""

    def __post_init__(self) -> None:
        for name in ("num_pairs", "key_tokens", "value_tokens"):
            value = getattr(self, name)
            _require(value == "auto" or value >= 1, f"pairs.{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How trajectories are written. An update reads articles × trajectories rows."""

    articles: int = 8
    """A: articles per update, over all processes."""
    trajectories: int = 8
    """G: trajectories per article; a group shares its pool."""
    steps: int | Literal["auto"] = 10
    """S: query/value steps per trajectory; `auto`: as many as fit context_tokens."""
    query_tokens: int = 8
    """Q: tokens of a query."""
    context_tokens: int | None = None
    """Longest row in tokens; None: the model's maximum."""
    temperature: float = 1.0
    """Sampling temperature of query tokens, in the sampler, the policy log-probability and the KL alike."""

    def __post_init__(self) -> None:
        for name in ("articles", "trajectories", "query_tokens"):
            _require(getattr(self, name) >= 1, f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.steps == "auto" or self.steps >= 1, f"rollout.steps must be at least 1 or auto, got {self.steps}")
        _require(
            self.context_tokens is None or self.context_tokens >= 1,
            f"rollout.context_tokens must be at least 1, got {self.context_tokens}",
        )
        _require(
            self.temperature > 0 and math.isfinite(self.temperature),
            f"rollout.temperature must be positive, got {self.temperature}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderConfig:
    """What turns queries and keys into vectors."""

    kind: str = "hashing"
    """`hashing` (words in common), `attention` (the reference's own projections), `openai` (any server with its
    interface), `sentence_transformers`, or `package.module:name`."""
    dimensions: int | None = None
    """Length of the vectors; None: what the model gives, for `hashing` 4096. Words that collide there look alike."""
    model: str | None = None
    """`openai`: name at the service, None: text-embedding-ada-002; `sentence_transformers`: name or folder."""
    revision: str | None = None
    """`sentence_transformers`: revision on the hub; None: the newest."""
    base_url: str | None = None
    """`openai`: address of the service up to /v1; None: $OPENAI_BASE_URL, else OpenAI's. The key is $OPENAI_API_KEY."""
    query_prompt: str | None = None
    """Text encoders: put before each query; None: the model's own prompt, if it has one."""
    key_prompt: str | None = None
    """Text encoders: put before each key; None: the model's own prompt, if it has one."""
    batch_texts: int | None = None
    """Most texts a request or forward; None: 2,048 for `openai`, 64 for `sentence_transformers`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`sentence_transformers`: where to compute."""
    max_usd: float | None = None
    """Most that this run may spend on embeddings, whatever happens; raise it to go on. None: no limit."""
    usd_per_million_tokens: float | None = None
    """Price at the service; None: OpenAI's for its known models, and nothing elsewhere."""
    trained: bool = False
    """`attention`: use the policy's projections: training changes the selection too, and log σ joins the loss."""
    send_local_text: bool = False
    """Allow text of a corpus on this machine to be sent to a remote service."""

    def __post_init__(self) -> None:
        _require_no_secret(self.base_url, "embedder.base_url")
        for name in ("dimensions", "batch_texts"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"embedder.{name} must be at least 1, got {value}")
        for name in ("max_usd", "usd_per_million_tokens"):
            value = getattr(self, name)
            _require(
                value is None or (value >= 0 and math.isfinite(value)),
                f"embedder.{name} must not be negative, got {value}",
            )
        _require(
            not self.trained or self.kind == "attention",
            f"embedder.trained needs embedder.kind: attention; {self.kind} has nothing that training changes",
        )
        _require(
            self.kind != "sentence_transformers" or self.model is not None,
            "embedder.kind: sentence_transformers needs embedder.model, a name on the hub or a folder",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """How scores become a choice among the unread pairs."""

    target_entropy: float = 0.8
    """Calibrate the temperature once, so that the mean of H/ln N at step 1 is this; see docs/method.md."""
    temperature: float | None = None
    """τ of the softmax; None: calibrate; 1: the bare softmax."""
    calibration_queries: int = 64
    """Queries of the untrained policy that τ is calibrated on, at least."""
    heads: Literal["mean_score", "mean_softmax"] = "mean_score"
    """Several heads: softmax of their mean score, or mean of their softmaxes."""

    def __post_init__(self) -> None:
        _require(0 < self.target_entropy < 1, f"selection.target_entropy must be in (0, 1), got {self.target_entropy}")
        _require(
            self.temperature is None or (self.temperature > 0 and math.isfinite(self.temperature)),
            f"selection.temperature must be positive, got {self.temperature}",
        )
        _require(self.calibration_queries >= 1, "selection.calibration_queries must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """What a trajectory is paid for."""

    kind: str = "value_prior"
    """`plain` (log-probability of the value), `value_prior` (minus the value alone's), `counterfactual` (minus the
    value's after a query of the untrained model), `held_out` (log-probability of probes that are never read), or
    `package.module:name`."""
    scorer: Literal["reference", "policy", "ema"] = "reference"
    """Who predicts the values: the frozen reference, the live policy (detached), or a moving average of it."""
    ema_decay: float = 0.99
    """Scorer `ema`: share of the average that an update keeps."""
    query_in_context: bool = True
    """Score values with the queries before them; False deletes the queries, so that only the order counts."""
    num_probes: int = 4
    """P: pairs of each article set aside in training, if the reward needs probes, as `held_out` does."""
    pick: Literal["sampled", "expected"] = "sampled"
    """Pay a step for the pair that was drawn, or for the mean over every unread pair, weighted by the selection."""
    gradient_weight: float = 0.0
    """Weight, 0 to 1, of the gradient through log p(value) itself; with the live scorer `policy`."""

    def __post_init__(self) -> None:
        _require(0 <= self.ema_decay < 1, f"reward.ema_decay must be in [0, 1), got {self.ema_decay}")
        _require(0 <= self.gradient_weight <= 1, f"reward.gradient_weight must be 0 to 1, got {self.gradient_weight}")
        _require(
            self.gradient_weight == 0 or (self.scorer == "policy" and self.kind in ("plain", "value_prior")),
            "reward.gradient_weight needs reward.scorer: policy and reward.kind: plain or value_prior",
        )
        _require(
            self.gradient_weight == 0 or (self.pick == "sampled" and self.query_in_context),
            "reward.gradient_weight needs reward.pick: sampled and reward.query_in_context: true",
        )
        _require(
            self.kind != "counterfactual" or self.query_in_context,
            "reward.kind: counterfactual compares queries; it needs reward.query_in_context: true",
        )
        _require(
            self.pick == "sampled" or self.kind not in ("counterfactual", "held_out"),
            f"reward.pick: expected needs a reward of the pick alone, such as value_prior; {self.kind} is not",
        )
        _require(self.num_probes >= 1, f"reward.num_probes must be at least 1, got {self.num_probes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """Penalty for leaving the untrained policy."""

    coefficient: float = 0.02
    """β; nats of KL per query token."""
    place: Literal["loss", "reward"] = "loss"
    """Add β · KL to the loss, or take β · k1 of a step's query from its reward."""
    estimator: Literal["full", "k1", "k2", "k3"] = "full"
    """`full`: exact reverse KL over the vocabulary. From the sampled token: `k2`, `k3` (loss) and `k1` (reward)."""

    def __post_init__(self) -> None:
        _require(
            self.place != "loss" or self.estimator != "k1",
            "objective.kl.estimator: k1 has a gradient of mean zero in the loss; use full, k2 or k3, or place: reward",
        )
        _require(
            self.place != "reward" or self.estimator == "k1",
            f"objective.kl.place: reward needs objective.kl.estimator: k1, got {self.estimator}",
        )
        _require(
            self.coefficient >= 0 and math.isfinite(self.coefficient),
            f"objective.kl.coefficient must not be negative, got {self.coefficient}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Which trajectories an update keeps."""

    kind: Literal["none", "running_zscore", "group_zscore", "extremes"] = "none"
    """`running_zscore`: those whose reward exceeds the mean of all earlier ones by min_zscore standard deviations;
    `group_zscore`: the mean of their own group by as many of its own; `extremes`: the best and worst of each group."""
    warmup: int = 15
    """`running_zscore`: trajectories seen before any is kept."""
    min_zscore: float = 1.0
    """Standard deviations above the mean."""
    extremes: int = 2
    """`extremes`: so many best and so many worst trajectories of each group."""

    def __post_init__(self) -> None:
        _require(self.warmup >= 2, f"objective.filter.warmup must be at least 2, got {self.warmup}")
        _require(math.isfinite(self.min_zscore), f"objective.filter.min_zscore must be finite, got {self.min_zscore}")
        _require(self.extremes >= 1, f"objective.filter.extremes must be at least 1, got {self.extremes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The policy-gradient objective."""

    kind: str = "policy_gradient"
    """`policy_gradient`, or `package.module:name`."""
    returns: Literal["to_go", "trajectory"] = "to_go"
    """Credit a query with its own and later rewards, or with all of them."""
    advantage_baseline: Literal["leave_one_out", "running_mean", "none"] = "leave_one_out"
    """Subtracted from returns: mean of the group's other rows, mean of earlier updates, or nothing."""
    kl: KLConfig = field(default_factory=KLConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-4
    """Step size after warm-up; constant."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the gradient's running square."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    warmup_updates: int = 5
    """Updates over which the step size rises linearly."""

    def __post_init__(self) -> None:
        _require(
            self.learning_rate >= 0 and math.isfinite(self.learning_rate),
            f"optimizer.learning_rate must be a number ≥ 0, got {self.learning_rate}",
        )
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        _require(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        _require(self.max_grad_norm > 0, f"optimizer.max_grad_norm must be positive, got {self.max_grad_norm}")
        _require(self.warmup_updates >= 0, f"optimizer.warmup_updates must not be negative, got {self.warmup_updates}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long to train, and how the work is divided."""

    updates: int = 1000
    """Optimiser updates. The "number of episodes" is updates × rollout.articles × rollout.trajectories."""
    seed: int = 0
    """Seed of everything random in the run, apart from the corpus."""
    micro_batch_rows: int | None = None
    """Rows per forward of the scorer and the update. Results do not depend on it. Fewer where memory runs out.

    None: all of a process at once; on a CPU as many as have 2^18 numbers in a layer's hidden states (tokens × width),
    four times as many in the scorer, which keeps nothing for a gradient.
    """
    checkpoint_every: int = 50
    """Updates between checkpoints; one is always written at the end."""
    keep_checkpoints: int | None = 3
    """Newest checkpoints to keep, at least 2, and the last without an alarm; None: all."""
    shuffled_rewards: bool = False
    """Control: permute the rewards among the trajectories of a group, so that there is nothing to learn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        _require(self.updates >= 0, f"training.updates must not be negative, got {self.updates}")
        _require(0 <= self.seed < 2**63, f"training.seed must be 0 to 2^63 − 1, got {self.seed}")
        _require(
            self.micro_batch_rows is None or self.micro_batch_rows >= 1,
            f"training.micro_batch_rows must be at least 1, got {self.micro_batch_rows}",
        )
        _require(self.checkpoint_every >= 1, f"training.checkpoint_every must be at least 1: {self.checkpoint_every}")
        _require(
            self.keep_checkpoints is None or self.keep_checkpoints >= 2,
            f"training.keep_checkpoints must be at least 2 (one may be damaged), got {self.keep_checkpoints}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written down besides metrics.jsonl."""

    trajectories_every: int = 1
    """Write the trajectories of every k-th update; 0: only those of the evaluation."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        _require(self.trajectories_every >= 0, "log.trajectories_every must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Measurement on held-out articles after training."""

    corpus: CorpusConfig | None = None
    """Articles to evaluate on; None: the training corpus, with fresh trajectories (and the report says so)."""
    articles: int = 200
    """Number of articles; 0: no evaluation."""
    reward: str | None = None
    """Reward that the arms are compared by; None: that of training."""
    num_probes: int = 4
    """P: pairs of each article set aside before the pool is cut, never read."""
    batch_articles: int = 64
    """Articles evaluated at once; results do not depend on it."""
    oracle: bool = True
    """Also run the greedy search, which scores every unread pair at every step."""
    arms: Literal["standard", "all"] = "standard"
    """`standard`: every picker with its own and with own-key text; `all`: also the arms that take a gain apart, and
    the probes' curves of own-key text (`agrl evaluate` does so unless told otherwise)."""

    def __post_init__(self) -> None:
        _require(self.articles >= 0, f"evaluation.articles must not be negative, got {self.articles}")
        _require(self.num_probes >= 0, f"evaluation.num_probes must not be negative, got {self.num_probes}")
        _require(self.batch_articles >= 1, f"evaluation.batch_articles must be at least 1, got {self.batch_articles}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """What may leave this machine, and what is kept of what came back. None of it changes a result."""

    offline: bool = False
    """Open no connection: what is neither on this machine nor in the cache is an error."""
    cache: Path | None = None
    """Folder of fetched articles and vectors; None: $AGRL_CACHE, or attention-guided-rl in the user's cache folder."""
    contact: str | None = None
    """A mail address or page for the people who run a wiki, sent with each request to it."""
    timeout_s: float = 30.0
    """Longest silence of a server, in seconds."""
    deadline_s: float = 600.0
    """Longest time for a request with all its repetitions, in seconds."""
    backoff_s: float = 0.5
    """Longest wait before the first repetition, in seconds; it doubles with each."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "deadline_s", "backoff_s"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"network.{name} must be positive, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        needs_probes = self.reward.kind == "held_out"
        self._check_encyclopedia(self.corpus, "corpus", self.reward.num_probes if needs_probes else 0)
        if self.evaluation.articles:
            _require(
                (self.evaluation.reward or self.reward.kind) != "held_out" or self.evaluation.num_probes >= 1,
                "evaluation.num_probes must be at least 1 for the reward held_out",
            )
            held_out = self.evaluation.corpus or self.corpus
            self._check_encyclopedia(held_out, "evaluation.corpus", self.evaluation.num_probes)
        steps, num_pairs = self.rollout.steps, self.pairs.num_pairs
        _require(num_pairs != "auto" or self.corpus.title is not None, "pairs.num_pairs: auto needs corpus.title")
        _require(
            steps == "auto" or num_pairs == "auto" or steps <= num_pairs,
            f"rollout.steps ({steps}) exceeds pairs.num_pairs ({num_pairs}): no pair is read twice",
        )
        _require(
            self.objective.advantage_baseline != "leave_one_out" or self.rollout.trajectories >= 2,
            "objective.advantage_baseline: leave_one_out needs rollout.trajectories of at least 2",
        )
        self._check_filter()
        self._check_reward()
        self._check_splits()
        _require(
            not self.training.shuffled_rewards or self.rollout.trajectories >= 2,
            "training.shuffled_rewards needs rollout.trajectories of at least 2",
        )

    def _check_filter(self) -> None:
        filter_, group = self.objective.filter, self.rollout.trajectories
        limit = (group - 1) / math.sqrt(group)
        _require(
            filter_.kind != "group_zscore" or filter_.min_zscore < limit,
            f"objective.filter.min_zscore ({filter_.min_zscore}): no row of a group of {group} can be more than "
            f"{limit:.3f} standard deviations above its mean",
        )
        _require(
            filter_.kind != "extremes" or 2 * filter_.extremes <= group,
            f"objective.filter.extremes ({filter_.extremes}): a group of {group} trajectories has at most {group // 2} "
            "best and as many worst",
        )

    def _check_reward(self) -> None:
        _require(
            self.evaluation.reward != "counterfactual" or self.reward.query_in_context,
            "evaluation.reward: counterfactual compares queries; it needs reward.query_in_context: true",
        )
        _require(
            self.reward.pick == "sampled" or not self.embedder.trained,
            "reward.pick: expected pays a step the same whatever was drawn, so embedder.trained would learn nothing "
            "from it; use reward.pick: sampled",
        )
        _require(
            self.reward.gradient_weight == 0 or not self.training.shuffled_rewards,
            "training.shuffled_rewards does not reach the gradient of reward.gradient_weight, so it would be no "
            "control; set reward.gradient_weight to 0",
        )

    def _check_splits(self) -> None:
        """Of near-duplicates the first one read stays: in another order it is another one, of another split."""
        ours, held_out = self.corpus, self.evaluation.corpus
        by_order = ours.kind == "hub" or (ours.kind == "dump" and ours.index is not None)
        if held_out is None or held_out.split == ours.split or not by_order or not ours.drop_near_duplicates:
            return
        same_source = replace(held_out, split=ours.split, shuffle=ours.shuffle, seed=ours.seed) == ours
        same_order = held_out.shuffle == ours.shuffle and (held_out.seed == ours.seed or not ours.shuffle)
        _require(
            same_order or not same_source,
            "evaluation.corpus.shuffle and seed must be those of corpus: near-duplicates are looked for in the order "
            "of reading, so in another order one of what is trained on could be held out",
        )

    def _check_encyclopedia(self, corpus: CorpusConfig, key: str, num_probes: int) -> None:
        if corpus.kind != "encyclopedia" or self.pairs.num_pairs == "auto":
            return
        needed = self.pairs.num_pairs + num_probes
        _require(
            corpus.num_pairs >= needed,
            f"{key}.subjects × {key}.pairs_per_subject gives {corpus.num_pairs} pairs an article; "
            f"pairs.num_pairs and the probes need {needed}",
        )
