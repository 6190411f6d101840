"""The model's edges: text of ids, and weights that are exchanged for a while."""

import pytest
import torch


def test_token_texts_join_to_the_text_and_a_split_character_goes_to_the_token_that_completes_it(
    make_model, byte_tokenizer
):
    tokenizer = byte_tokenizer()
    model = make_model("llama", tokenizer=tokenizer, vocab_size=len(tokenizer))
    ids = tokenizer.encode("né 日.", add_special_tokens=False)
    assert len(ids) == 8  # UTF-8: 1 + 2 + 1 + 3 + 1 bytes
    assert model.decode_tokens(ids) == ["n", "", "é", " ", "", "", "日", "."]
    assert model.decode_tokens([]) == []


def test_token_texts_of_words_hold_the_space_before_them(make_model, word_tokenizer):
    tokenizer = word_tokenizer()
    model = make_model("llama", tokenizer=tokenizer)
    assert model.decode_tokens(tokenizer.encode("ba be bi", add_special_tokens=False)) == ["ba", " be", " bi"]


def states_of(model):
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        return model.hidden(ids, torch.zeros_like(ids), torch.arange(1, 10))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_folding_the_adapter_changes_rounding_alone_and_nothing_afterwards(make_model, shaken, shape):
    model = shaken(make_model(shape))
    weights = {name: p.clone() for name, p in model.named_frozen().items()}
    apart = states_of(model)
    with model.reference():
        reference = states_of(model)
    with model.folded():
        torch.testing.assert_close(states_of(model), apart, atol=1e-4, rtol=0)
        with model.reference(), model.folded():  # as an embedder in the middle of a rollout
            assert torch.equal(states_of(model), reference)
        torch.testing.assert_close(states_of(model), apart, atol=1e-4, rtol=0)
    assert torch.equal(states_of(model), apart)
    assert (apart - reference).abs().max() > 1e-2
    assert all(torch.equal(p, weights[name]) for name, p in model.named_frozen().items())
    assert all(p.requires_grad for p in model.named_trainable().values())
