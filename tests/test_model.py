"""The model's edges: text of ids."""


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
