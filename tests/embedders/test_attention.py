"""The attention embedder against projections computed from the model's weights, one text at a time, without hooks."""

import pytest
import torch
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.attention import AttentionEmbedder
from attention_guided_rl.model import LanguageModel

SHAPES = ["llama", "qwen3", "gpt2"]
BOS = 1
TEXTS = [[5, 9, 33], [7, 20, 6, 41, 12], [50]]  # word ids; the batch is padded to five


def batch(texts: list[list[int]] = TEXTS) -> tuple[Tensor, Tensor]:
    length = max(map(len, texts))
    ids = torch.tensor([text + [30] * (length - len(text)) for text in texts])  # 30 would be a word
    mask = torch.tensor([[i < len(text) for i in range(length)] for text in texts])
    return ids, mask


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@torch.no_grad()
def projections(causal_lm, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Queries (T, H, D) and keys (T, Hk, D) of the last layer, from its input and its weights."""
    output = causal_lm.eval().base_model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    below = output.hidden_states[-2][0]  # what the last layer reads
    if causal_lm.config.model_type == "gpt2":
        layer = causal_lm.transformer.h[-1]
        centred = below - below.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.ln_1.eps).sqrt()
        fused = (scaled * layer.ln_1.weight + layer.ln_1.bias) @ layer.attn.c_attn.weight + layer.attn.c_attn.bias
        return fused[:, :32].reshape(-1, 4, 8), fused[:, 32:64].reshape(-1, 4, 8)
    layer, eps = causal_lm.model.layers[-1], causal_lm.config.rms_norm_eps
    attention, x = layer.self_attn, rms_norm(below, layer.input_layernorm.weight, eps)
    head_dim = causal_lm.config.head_dim
    queries = (x @ attention.q_proj.weight.T).reshape(len(ids), 4, head_dim)
    keys = (x @ attention.k_proj.weight.T).reshape(len(ids), 2, head_dim)
    if causal_lm.config.model_type == "qwen3":  # normalises each head after its projection
        queries = rms_norm(queries, attention.q_norm.weight, eps)
        keys = rms_norm(keys, attention.k_norm.weight, eps)
    return queries, keys


def embedder(model: LanguageModel) -> AttentionEmbedder:
    return AttentionEmbedder(EmbedderConfig(kind="attention"), model)


def distinct_norms(causal_lm):
    """Give norms weights that are not all one, as trained models have."""
    numbers = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in causal_lm.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=numbers)
    return causal_lm


@pytest.fixture(params=SHAPES)
def shape(request) -> str:
    return request.param


@pytest.fixture
def base(causal_lm, shape):
    """The model as transformers makes it."""
    return distinct_norms(causal_lm(shape))


@pytest.fixture
def model(make_model, shape) -> LanguageModel:
    """The same weights with an adapter on top."""
    model = make_model(shape)
    distinct_norms(model.peft_model.get_base_model())
    return model


def test_queries_are_means_of_the_query_projection_after_bos(base, model):
    found = embedder(model).embed_queries(*batch())
    for vectors, text in zip(found, TEXTS, strict=True):
        queries, _ = projections(base, [BOS, *text])
        torch.testing.assert_close(vectors, queries[1:].mean(0), atol=1e-5, rtol=1e-4)


def test_keys_are_means_of_the_key_projection_after_bos(base, model):
    found = embedder(model).embed_keys(*batch())
    for vectors, text in zip(found, TEXTS, strict=True):
        _, keys = projections(base, [BOS, *text])
        torch.testing.assert_close(vectors, keys[1:].mean(0), atol=1e-5, rtol=1e-4)


def test_heads_are_those_of_the_model(model, shape):
    num_key_heads, head_dim = (4, 8) if shape == "gpt2" else (2, 12 if shape == "qwen3" else 8)
    assert embedder(model).embed_queries(*batch()).shape == (3, 4, head_dim)
    assert embedder(model).embed_keys(*batch()).shape == (3, num_key_heads, head_dim)


def test_what_stands_in_padding_changes_nothing(model):
    ids, mask = batch()
    other = torch.where(mask, ids, 17)
    for embed in (embedder(model).embed_queries, embedder(model).embed_keys):
        assert torch.equal(embed(ids, mask), embed(other, mask))


def test_a_text_is_embedded_alike_alone_and_in_a_batch(model):
    together = embedder(model).embed_keys(*batch())
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(embedder(model).embed_keys(*batch([text]))[0], together[i], atol=1e-5, rtol=1e-4)


def test_training_the_adapter_changes_no_vector(model, shaken):
    queries, keys = embedder(model).embed_queries(*batch()), embedder(model).embed_keys(*batch())
    shaken(model, 1.0)
    assert torch.equal(embedder(model).embed_queries(*batch()), queries)
    assert torch.equal(embedder(model).embed_keys(*batch()), keys)


def test_training_all_weights_changes_no_vector(make_model, shaken):
    model = make_model("llama", adapter="full")
    keys = embedder(model).embed_keys(*batch())
    shaken(model, 1.0)
    assert torch.equal(embedder(model).embed_keys(*batch()), keys)


def test_without_a_bos_token_the_first_token_is_left_out(make_model, causal_lm, word_tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    vectors = embedder(make_model("llama", tokenizer=tokenizer)).embed_keys(*batch([[5, 9, 33, 7]]))
    _, keys = projections(causal_lm("llama"), [5, 9, 33, 7])
    torch.testing.assert_close(vectors[0], keys[1:].mean(0), atol=1e-5, rtol=1e-4)


def test_a_query_of_whitespace_gives_the_zero_vector(make_model, byte_tokenizer):
    model = make_model("llama", tokenizer=byte_tokenizer(), vocab_size=272)
    ids = torch.tensor([model.encode(" \n\t"), model.encode(" a ")])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    blank, letter = embedder(model).embed_queries(ids, torch.ones_like(mask))
    assert not blank.any()
    assert letter.any()
    assert not embedder(model).embed_queries(ids, mask)[1].any()  # its letter is padding now


def test_no_hook_stays_behind(model):
    before = sum(len(m._forward_hooks) for m in model.peft_model.modules())
    embedder(model).embed_queries(*batch())
    assert sum(len(m._forward_hooks) for m in model.peft_model.modules()) == before


def test_the_selection_does_not_depend_on_the_policy(model):
    assert embedder(model).depends_on_policy is False
    assert embedder(model).identity.startswith("attention/")
