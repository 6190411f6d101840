"""Fixtures: tiny models of three shapes, tokenizers, a corpus and sessions, all made here; nothing is downloaded.

Sizes are unequal on purpose, so that a mixed-up axis shows: A = 2 articles, G = 3 trajectories, N = 5 pairs, S = 3,
Q = 2, K = 3, L = 4 tokens, H = 4 query heads on Hk = 2 key heads, and a model vocabulary larger than the tokenizer's.
Weights are drawn widely (0.2 to 0.3), or log-probabilities would hardly depend on the context.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from browser import find_chromium, open_browser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from attention_guided_rl.config import Config, ModelConfig
from attention_guided_rl.config_files import load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.loading import prepare
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.session import Session

WORDS = [a + b for a in "bdfgklmn" for b in "aeiouy"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCABULARY = 64  # of the model; the word tokenizer has 52 ids, so 12 ids exist that mean nothing
CHAT_TEMPLATE = (  # as Llama 3's: a date in the system turn, contents trimmed
    "{{ bos_token }}<|start|>system<|end|>\n\n"
    "Today: {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}<|eot|>"
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
)


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 on transformers 5.23: neither is about our code
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing.*:FutureWarning")
    config.addinivalue_line("filterwarnings", "ignore:fan_in_fan_out is set to False:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # sums in one order, and no fight for the cores


@pytest.fixture(autouse=True)
def _offline_ends_with_the_test() -> Iterator[None]:
    """`agrl --offline` sets this for its process, which here is that of all tests and hands it on to its children."""
    before = os.environ.get("HF_HUB_OFFLINE")
    yield
    if before is None:
        os.environ.pop("HF_HUB_OFFLINE", None)
    else:
        os.environ["HF_HUB_OFFLINE"] = before


def build_word_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **SPECIAL)


def build_byte_tokenizer(extra: tuple[str, ...] = (), chat_template: str | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    if extra:
        fast.add_special_tokens({"additional_special_tokens": list(extra)})
    fast.chat_template = chat_template
    return fast


def build_causal_lm(shape: str, vocab_size: int = VOCABULARY, seed: int = 0):
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wide = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(seed)
    if shape == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, **wide, initializer_range=0.3))
    if shape == "qwen3":  # q/k norms, tied embeddings, heads wider than hidden / H
        return Qwen3ForCausalLM(
            Qwen3Config(**common, **wide, head_dim=12, tie_word_embeddings=True, initializer_range=0.3)
        )
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}  # fused c_attn, learned positions, tied
    return GPT2LMHeadModel(GPT2Config(**common, **sizes, initializer_range=0.2))


def build_model(shape: str, *, tokenizer=None, vocab_size: int = VOCABULARY, **model_options) -> LanguageModel:
    config = ModelConfig(**{"name": shape, "lora_rank": 3, "lora_alpha": 6.0, **model_options})
    return prepare(build_causal_lm(shape, vocab_size), tokenizer or build_word_tokenizer(), config, seed=1)


def shake(model: LanguageModel, size: float = 0.1, seed: int = 5) -> LanguageModel:
    """Move the policy away from the reference, as training would; every LoRA B stops being 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.named_trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def word_tokenizer():
    return build_word_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return build_byte_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(("<|start|>", "<|end|>", "<|eot|>"), CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def causal_lm():
    return build_causal_lm


@pytest.fixture(scope="session")
def make_model():
    """Return the factory of prepared models: `make_model("llama", lora_dropout=0.1)`."""
    return build_model


@pytest.fixture(scope="session")
def shaken():
    return shake


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return where a tiny model of a shape is saved, as a user would name it in `model.name`."""
    made: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("models") / shape
            build_causal_lm(shape).save_pretrained(made[shape])
            build_word_tokenizer().save_pretrained(made[shape])
        return made[shape]

    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """Eight articles of seven ready pairs, keys of 3 words and values of 2 to 4; the third article is too short."""
    path = tmp_path_factory.mktemp("corpus") / "articles.jsonl"
    word = itertools.cycle(WORDS[i * 29 % 48] for i in range(47))  # 47 and the lengths below share no factor

    def text(count: int) -> str:
        return " ".join(itertools.islice(word, count))

    with path.open("w", encoding="utf-8") as file:
        for article in range(8):
            for pair in range(2 if article == 2 else 7):
                line = {"article": f"article {article}", "key": text(3), "value": text(2 + (article + pair) % 3)}
                file.write(json.dumps(line) + "\n")
    return path


BASE = {
    "model.lora_rank": 3,
    "model.lora_alpha": 6.0,
    "template.kind": "plain",
    "template.prompt": "ba be bi",
    "template.query_prefix": "bo",
    "template.value_prefix": "bu by",
    "corpus.kind": "files",
    "corpus.shuffle": False,
    "pairs.num_pairs": 5,
    "pairs.key_tokens": 3,
    "pairs.value_tokens": 4,
    "rollout.articles": 2,
    "rollout.trajectories": 3,
    "rollout.steps": 3,
    "rollout.query_tokens": 2,
    "embedder.kind": "attention",
    "selection.temperature": 0.5,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_updates": 0,
    "training.device": "cpu",
    "training.updates": 4,
    "evaluation.articles": 0,
    "evaluation.num_probes": 1,
    "evaluation.oracle": False,
}


@pytest.fixture(scope="session")
def make_config(model_folder, corpus_file, tmp_path_factory):
    """Return the factory of configurations: the base above, changed by dotted overrides. No preset is involved."""
    empty = tmp_path_factory.mktemp("config") / "empty.yaml"
    empty.write_text(yaml.safe_dump({}), encoding="utf-8")

    def make(overrides: dict | None = None, *, shape: str = "llama") -> Config:
        values = {**BASE, "model.name": str(model_folder(shape)), "corpus.path": str(corpus_file), **(overrides or {})}
        return load_config(files=[empty], overrides=values)

    return make


@pytest.fixture(scope="session")
def make_session(make_config):
    """Return the factory of sessions: `make_session({"reward.kind": "plain"}, shape="gpt2")`."""

    def make(overrides: dict | None = None, *, shape: str = "llama") -> Session:
        return Session(make_config(overrides, shape=shape), Processes("cpu"))

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A page of a headless Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on PATH")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page
