"""The one count of floating-point operations and bytes, for this package and for every comparator.

A multiplication and an addition are two operations. Counted is what the mathematics needs: matrix products of the
transformer's body, LoRA, attention over the keys a token can see, and the output head where it is asked for. Not
counted: norms, rotations, softmax, sampling, recomputation, and positions or keys that are computed and masked away. So
work that could have been left out lowers the utilisation.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama-shaped decoder: what the counts depend on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    lora_rank: int = 0

    @classmethod
    def of(cls, config: Any, lora_rank: int = 0) -> "Shape":
        """Read the shape from a transformers configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            lora_rank=lora_rank,
        )

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's linear maps: q, k, v, then o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            *((self.hidden, q), (self.hidden, kv), (self.hidden, kv)),
            *((q, self.hidden), (self.hidden, self.intermediate), (self.hidden, self.intermediate)),
            (self.intermediate, self.hidden),
        )

    @property
    def body_weights(self) -> int:
        """Weights of all linear maps of the body, without LoRA."""
        return self.layers * sum(i * o for i, o in self.projections)

    @property
    def lora_weights(self) -> int:
        """Weights of the adapter."""
        return self.layers * self.lora_rank * sum(i + o for i, o in self.projections)

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked of the model: numbers over all rows."""

    tokens: int
    """Tokens that go through the body."""
    pairs: int
    """(token, visible token) pairs of attention, in each layer."""
    head: int = 0
    """Positions that go through the output head."""
    adapter: bool = True
    """Whether the adapter is on."""
    backward: bool = False
    """Whether the gradient with respect to the adapter follows (everything else frozen)."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations, by part."""

    body: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.body + self.attention + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.body + other.body, self.attention + other.attention, self.head + other.head)


NOTHING = Flops(0, 0, 0)


def flops(shape: Shape, work: Work) -> Flops:
    """Count the operations of one piece of work.

    Backward: every frozen map passes the gradient on to its input (once the forward), an adapter takes twice its
    forward (inputs and weights), attention twice (four products for two). The inputs of the first layer's q, k and v
    need no gradient.
    """
    body = 2 * shape.body_weights * work.tokens
    adapter = 2 * shape.lora_weights * work.tokens if work.adapter else 0
    attention = 4 * shape.layers * shape.heads * shape.head_dim * work.pairs
    head = 2 * shape.head_weights * work.head
    if work.backward:
        first = shape.projections[:3]
        unneeded = sum(i * o for i, o in first) + (shape.lora_rank * sum(i for i, _ in first) if work.adapter else 0)
        body, adapter = 2 * body - 2 * unneeded * work.tokens, 3 * adapter
        attention, head = 3 * attention, 2 * head
    return Flops(body + adapter, attention, head)


def causal_pairs(tokens: int, cached: int = 0) -> int:
    """Pairs of one row: `tokens` new ones, each seeing what is cached, the new ones before it, and itself."""
    return tokens * cached + tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """The rectangular task that everybody does: B rows of S steps, N pairs in each of A pools."""

    rows: int
    articles: int
    num_pairs: int
    num_steps: int
    prompt_len: int
    before_query_len: int
    query_len: int
    before_value_len: int
    value_len: int

    @property
    def step_len(self) -> int:
        """Tokens of a step."""
        return self.before_query_len + self.query_len + self.before_value_len + self.value_len

    @property
    def prior_len(self) -> int:
        """Tokens of a value after the prompt and an empty query slot."""
        return self.prompt_len + self.before_query_len + self.before_value_len + self.value_len

    @property
    def row_len(self) -> int:
        """T: tokens of a row."""
        return self.prompt_len + self.num_steps * self.step_len

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.row_len

    @property
    def query_tokens(self) -> int:
        """Query tokens of all rows."""
        return self.rows * self.num_steps * self.query_len


def phase_flops(shape: Shape, task: Trajectories, *, folded: bool = True) -> dict[str, Flops]:
    """Return the least work of each phase of one update.

    Each token goes once through the rollout, once through the frozen pass, and forward and backward through the update;
    the head runs at query positions (rollout; update and its reference) and at value positions (frozen pass, priors).
    Templates and values of the rollout, and the last token of each query, are encoded together: the value prefill. The
    rest is decoded token by token. `folded`: without gradients the adapter can be added to the weights beforehand, and
    then costs the rollout nothing.
    """
    decoded = task.num_steps * (task.query_len - 1)  # per row; the first query token comes out of a prefill
    decode_pairs = sum(
        causal_pairs(task.query_len - 1, task.prompt_len + t * task.step_len + task.before_query_len)
        for t in range(task.num_steps)
    )
    all_pairs = causal_pairs(task.row_len)
    pool = task.articles * task.num_pairs
    last = 1 + task.before_value_len + task.value_len  # after the last query nothing need be encoded
    rows, heads = task.rows, task.query_tokens
    return {
        "decode": flops(shape, Work(tokens=rows * decoded, pairs=rows * decode_pairs, head=heads, adapter=not folded)),
        "value prefill": flops(
            shape,
            Work(
                tokens=rows * (task.row_len - decoded - last),
                pairs=rows * (all_pairs - decode_pairs - causal_pairs(last, task.row_len - last)),
                adapter=not folded,
            ),
        ),
        "value priors": flops(
            shape,
            Work(
                tokens=pool * task.prior_len,
                pairs=pool * causal_pairs(task.prior_len),
                head=pool * task.value_len,
                adapter=False,
            ),
        ),
        "frozen pass": flops(
            shape,
            Work(
                tokens=task.tokens,
                pairs=rows * all_pairs,
                head=rows * task.num_steps * task.value_len,
                adapter=False,
            ),
        ),
        "update": flops(shape, Work(tokens=task.tokens, pairs=rows * all_pairs, head=heads, backward=True))
        + flops(shape, Work(tokens=0, pairs=0, head=heads, adapter=False)),
    }


def decode_bytes(shape: Shape, task: Trajectories, width: int, rows_at_once: int | None = None) -> int:
    """Bytes that decoding must move: weights (adapter folded in) and every row's cache once a token, and new entries.

    `width`: bytes of a number; `rows_at_once`: rows that share one reading of the weights (all).
    """
    passes = -(-task.rows // (rows_at_once or task.rows)) * task.num_steps * (task.query_len - 1)
    weights = shape.body_weights + shape.head_weights
    entry = 2 * shape.layers * shape.kv_heads * shape.head_dim
    seen = sum(
        causal_pairs(task.query_len - 1, task.prompt_len + t * task.step_len + task.before_query_len)
        for t in range(task.num_steps)
    )
    written = task.num_steps * (task.query_len - 1)
    return width * (passes * weights + task.rows * entry * (seen + written))


def cache_bytes(shape: Shape, task: Trajectories, width: int) -> int:
    """Bytes of the keys and values of all rows at their full length."""
    return width * 2 * shape.layers * shape.kv_heads * shape.head_dim * task.tokens


def our_flops(shape: Shape, task: Trajectories) -> int:
    """Return the least operations of one update."""
    return sum(count.total for count in phase_flops(shape, task).values())


def naive_flops(shape: Shape, task: Trajectories) -> int:
    """Return the operations of one update of the naive loop.

    Every step: the context and the query's tokens, the value, the prior, and the loss under reference and policy. A
    scored text goes through the head as a whole, for that is how its log-probabilities are first written.
    """
    rows, q = task.rows, task.query_len

    def whole(tokens: int, head: int, *, adapter: bool = True, backward: bool = False) -> int:
        work = Work(
            tokens=rows * tokens,
            pairs=rows * causal_pairs(tokens),
            head=rows * head,
            adapter=adapter,
            backward=backward,
        )
        return flops(shape, work).total

    total = 0
    for step in range(task.num_steps):
        before = task.prompt_len + step * task.step_len + task.before_query_len
        text = before + q + task.before_value_len + task.value_len
        total += whole(before + q - 1, q)
        total += whole(text, text, adapter=False) + whole(task.prior_len, task.prior_len, adapter=False)
        total += whole(before + q, q, adapter=False) + whole(before + q, q, backward=True)
    return total


def trl_flops(shape: Shape, task: Trajectories, *, folded: bool) -> int:
    """Return the operations of one update by TRL, our rollout inside (`folded`) or plain `generate`.

    Rollout, priors and frozen pass as ours, then its reference pass and its loss, both with the head at every position.
    """
    ours = phase_flops(shape, task, folded=folded)
    pairs = task.rows * causal_pairs(task.row_len)
    reference = Work(tokens=task.tokens, pairs=pairs, head=task.tokens, adapter=False)
    loss = Work(tokens=task.tokens, pairs=pairs, head=task.tokens, backward=True)
    own = flops(shape, reference) + flops(shape, loss)
    return own.total + sum(count.total for name, count in ours.items() if name != "update")
