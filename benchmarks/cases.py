"""What is benchmarked: a model of a shape, a session around it, pools to read, and the size of the task.

Models other than the bundled one have random weights and a vocabulary of words; nothing is downloaded. They are written
to a folder and loaded as a user's would be.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flops import Shape, Trajectories
from peft.tuners.lora import Linear
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from attention_guided_rl.adapter import InPlaceLinear
from attention_guided_rl.config_files import load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.onednn import OneDnnLinear
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Article, PairPool
from attention_guided_rl.session import Session

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def _llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }


LLAMAS = {
    "3 M": _llama(4_096, 192, 512, 6, 6, 3),
    "30 M": _llama(16_384, 512, 1_408, 8, 8, 4),
    "100 M": _llama(32_768, 768, 2_048, 12, 12, 4),
    "Llama-3.2-3B": _llama(128_256, 3_072, 8_192, 28, 24, 8),
    "toy": _llama(64, 32, 48, 2, 4, 2),
}
"""Shapes with random weights. All have tied embeddings."""

LIBRARY_LAYERS: dict[type, type] = {InPlaceLinear: Linear, OneDnnLinear: nn.Linear}
"""What the package's layers are made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The task's sizes; the default is the one that is meant unless said otherwise."""

    articles: int = 1
    trajectories: int = 8
    num_pairs: int = 10
    num_steps: int | None = None
    """None: all pairs are read."""
    query_len: int = 16
    key_len: int = 24
    value_len: int = 24
    micro_batch_rows: int | None = None
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Case:
    """A session with what it reads; `pools` are made up front, so that no repeat pays for them."""

    name: str
    session: Session
    task: Trajectories
    shape: Shape
    stream: Any

    def uniforms(self, repeat: int) -> torch.Tensor:
        """Return the uniform numbers of a repeat, (B, S, Q+1)."""
        rollout = self.session.config.rollout
        return self.session.uniforms(Purpose.TRAINING, repeat, range(rollout.articles), rollout.trajectories)

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.session.config.model.dtype == "bfloat16" else 4


def demo_case(reward: str = "value_prior") -> Case:
    """The demo's shape: bundled model, generated encyclopedia, its preset's sizes; only the weights stand still."""
    config = load_config(
        "demo", overrides={"training.device": "cpu", "optimizer.learning_rate": 0.0, "reward.kind": reward}
    )
    session = Session(config, Processes("cpu"))
    session.calibrate(config.corpus)
    _move_policy(session)
    stream = session.stream(config.corpus, num_probes=0, purpose=Purpose.POOL)
    return _case("demo", session, stream)


def random_case(name: str, sizes: Sizes, folder: Path, *, overrides: dict[str, Any] | None = None) -> Case:
    """A Llama of `LLAMAS[name]` with random weights; changes to its shape are given as `model.vocab_size` and so on."""
    overrides = dict(overrides or {})
    shape = {**LLAMAS[name], **{k[6:]: overrides.pop(k) for k in list(overrides) if k[6:] in LLAMAS[name]}}
    if not (folder / "config.json").exists():
        save_random_llama(shape, sizes, folder)
    empty = folder / "empty.yaml"
    empty.write_text("{}\n", encoding="utf-8")
    config = load_config(files=[empty], overrides={**_overrides(sizes, folder), **overrides})
    session = Session(config, Processes(sizes.device))
    _move_policy(session)
    stream = RandomPools(sizes, len(session.model.tokenizer))
    return _case(name, session, stream)


@contextlib.contextmanager
def shortened(case: Case, num_steps: int) -> Iterator[Case]:
    """Give the case with shorter trajectories, for a while: to warm up, and to try out sizes."""
    session, full = case.session, case.session.num_steps
    session.num_steps = min(num_steps, full)
    try:
        yield replace(case, task=replace(case.task, num_steps=session.num_steps))
    finally:
        session.num_steps = full


def own_layers(session: Session) -> dict[nn.Module, type]:
    """Return the layers that are of the package's making, with their classes."""
    return {m: type(m) for m in session.model.peft_model.modules() if type(m) in LIBRARY_LAYERS}


@contextlib.contextmanager
def with_layers(layers: dict[nn.Module, type]) -> Iterator[None]:
    """Compute with layers of these classes, for a while."""
    before = {layer: type(layer) for layer in layers}
    _set_classes(layers)
    try:
        yield
    finally:
        _set_classes(before)


def library_layers(session: Session) -> contextlib.AbstractContextManager[None]:
    """Compute with PyTorch's and PEFT's layers in place of the package's, as a comparator would, for a while."""
    return with_layers({layer: LIBRARY_LAYERS[kind] for layer, kind in own_layers(session).items()})


def _set_classes(layers: dict[nn.Module, type]) -> None:
    for layer, kind in layers.items():
        layer.__class__ = kind


def save_random_llama(shape: dict[str, Any], sizes: Sizes, folder: Path) -> None:
    """Write a model with random weights and its tokenizer of words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(sizes.device):
        model = LlamaForCausalLM(config).to({"float32": torch.float32, "bfloat16": torch.bfloat16}[sizes.dtype])
    disable_progress_bar()
    model.save_pretrained(folder)
    words = [*SPECIAL, *(f"w{i}" for i in range(shape["vocab_size"] - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


class RandomPools:
    """A stream of pools of random words, full slots; in place of a corpus, whose texts would not fit every length."""

    def __init__(self, sizes: Sizes, vocabulary: int) -> None:
        self._sizes, self._vocabulary = sizes, vocabulary
        self._generator = torch.Generator().manual_seed(0)

    def next_pool(self, num_articles: int, keep: slice = slice(None)) -> PairPool:
        """Draw the next pools."""
        s = self._sizes
        pairs = s.num_pairs
        article = Article(id="random", title="", text="", source="", revision="", url="", licence="")

        def ids(count: int, length: int) -> torch.Tensor:
            low = len(SPECIAL)
            return torch.randint(low, self._vocabulary, (num_articles, count, length), generator=self._generator)[keep]

        keys, values = ids(pairs, s.key_len), ids(pairs, s.value_len)
        taken = keys.shape[0]
        nothing = ids(0, s.key_len)
        none = torch.zeros(taken, 0, dtype=torch.long)
        return PairPool(
            articles=(article,) * taken,
            pair_ids=(tuple(f"pair-{i}" for i in range(pairs)),) * taken,
            probe_pair_ids=((),) * taken,
            key_ids=keys,
            key_mask=torch.ones_like(keys, dtype=torch.bool),
            value_ids=values,
            value_mask=torch.ones_like(values, dtype=torch.bool),
            probe_key_ids=nothing,
            probe_key_mask=nothing.bool(),
            probe_value_ids=ids(0, s.value_len),
            probe_value_mask=ids(0, s.value_len).bool(),
            position=torch.arange(pairs).expand(taken, -1),
            probe_position=none,
            subject=torch.full((taken, pairs), -1),
            probe_subject=none,
        )


def _overrides(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The template has the lengths of Llama 3.2's chat template: 36 tokens, then 5 before a query, 5 before a value."""
    words = [f"w{i}" for i in range(45)]
    return {
        "model.name": str(folder),
        "model.dtype": sizes.dtype,
        "template.kind": "plain",
        "template.prompt": " ".join(words[:35]),
        "template.query_prefix": " ".join(words[35:40]),
        "template.value_prefix": " ".join(words[40:]),
        "corpus.kind": "files",  # never opened: the pools are random
        "corpus.path": str(folder),
        "pairs.num_pairs": sizes.num_pairs,
        "pairs.key_tokens": sizes.key_len,
        "pairs.value_tokens": sizes.value_len,
        "rollout.articles": sizes.articles,
        "rollout.trajectories": sizes.trajectories,
        "rollout.steps": sizes.num_steps or sizes.num_pairs,
        "rollout.query_tokens": sizes.query_len,
        "selection.temperature": 0.1,
        "optimizer.learning_rate": 0.0,
        "training.micro_batch_rows": sizes.micro_batch_rows,
        "training.device": sizes.device,
        "evaluation.articles": 0,
    }


def _move_policy(session: Session) -> None:
    """Move the policy away from the reference, so that to mistake one for the other would show in what is checked."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in session.model.named_trainable().values():
            parameter += (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter)


def _case(name: str, session: Session, stream: Any) -> Case:
    config, template = session.config, session.template
    task = Trajectories(
        rows=config.rollout.articles * config.rollout.trajectories,
        articles=config.rollout.articles,
        num_pairs=session.num_pairs,
        num_steps=session.num_steps,
        prompt_len=len(template.prompt),
        before_query_len=len(template.before_query),
        query_len=config.rollout.query_tokens,
        before_value_len=len(template.before_value),
        value_len=config.pairs.value_tokens,
    )
    return Case(name, session, task, Shape.of(session.model.config, config.model.lora_rank), stream)
