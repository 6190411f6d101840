"""Templates: fixed pieces, slots where the layout says, and chat templates that behave like Llama's."""

import datetime

import pytest
import torch
from torch import tensor

from attention_guided_rl.config import TemplateConfig
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.template import Template, assemble, build_template

# Pieces of two, one and three tokens: no two lengths are equal.
TEMPLATE = Template(prompt=(90, 91), before_query=(80,), before_value=(70, 71, 72), prompt_text="")
PLAIN = TemplateConfig(kind="plain", prompt="ba be", query_prefix=" bi bo bu", value_prefix=" by")


# -- the plain template ------------------------------------------------------------------------------------------------


def test_a_plain_template_is_prompt_and_prefixes_tokenised_apart(word_tokenizer):
    tokenizer = word_tokenizer()  # ids: <pad> <s> </s> <unk> ba be bi bo bu by …
    template = build_template(tokenizer, PLAIN)
    assert template.prompt == (1, 4, 5)  # begins with BOS, once
    assert template.before_query == (6, 7, 8)  # no BOS inside a row
    assert template.before_value == (9,)
    assert template.prompt_text == "ba be bi bo bu"


def test_without_a_bos_token_the_prompt_begins_the_row(word_tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    assert build_template(tokenizer, PLAIN).prompt == (4, 5)


@pytest.mark.parametrize("field", ["query_prefix", "value_prefix"])
def test_an_empty_prefix_is_refused_by_name(word_tokenizer, field):
    """Something real must stand before every slot: its last token is what predicts the slot's first."""
    settings = {"kind": "plain", "query_prefix": " ba", "value_prefix": " be", field: ""}
    with pytest.raises(ConfigError, match=rf"template\.{field}"):
        build_template(word_tokenizer(), TemplateConfig(**settings))


def test_auto_is_plain_without_a_chat_template_and_chat_with_one(word_tokenizer, chat_tokenizer):
    plain, auto = TemplateConfig(kind="plain"), TemplateConfig(kind="auto")
    assert build_template(word_tokenizer(), auto) == build_template(word_tokenizer(), plain)
    assert build_template(chat_tokenizer, auto) == build_template(chat_tokenizer, TemplateConfig(kind="chat"))
    assert build_template(chat_tokenizer, plain) != build_template(chat_tokenizer, auto)


def test_chat_without_a_chat_template_is_refused(word_tokenizer):
    with pytest.raises(ConfigError, match=r"template\.kind"):
        build_template(word_tokenizer(), TemplateConfig(kind="chat"))


# -- chat templates ----------------------------------------------------------------------------------------------------

# As Llama 3.2's: BOS, a system turn with a date, every content trimmed.
LLAMA_LIKE = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start|>system<|end|>\n\nToday Date: {{ date_string }}\n\n<|eot|>"
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
)
SPECIAL = ("<|start|>", "<|end|>", "<|eot|>")


def test_a_llama_like_chat_template_is_cut_into_turns(byte_tokenizer):
    tokenizer = byte_tokenizer(SPECIAL, LLAMA_LIKE)
    template = build_template(tokenizer, TemplateConfig(prompt="  Ask.  ", date_string="05 Feb 1999"))
    assert tokenizer.decode(template.prompt) == (
        "<s><|start|>system<|end|>\n\nToday Date: 05 Feb 1999\n\n<|eot|><|start|>user<|end|>\n\nAsk."
    )
    # each piece ends the turn before it and begins the next
    assert tokenizer.decode(template.before_query) == "<|eot|><|start|>assistant<|end|>\n\n"
    assert tokenizer.decode(template.before_value) == "<|eot|><|start|>user<|end|>\n\n"


def test_a_chat_row_reads_as_the_model_was_taught(byte_tokenizer):
    """Pieces and slots laid end to end are the chat template's own rendering, up to the end of the last turn."""
    tokenizer = byte_tokenizer(SPECIAL, LLAMA_LIKE)
    template = build_template(tokenizer, TemplateConfig(prompt="Ask.", date_string="05 Feb 1999"))
    turns = [{"role": "user", "content": "Ask."}]
    for query, value in (("who?", "the herald"), ("and?", "the seal")):
        turns += [{"role": "assistant", "content": query}, {"role": "user", "content": value}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, date_string="05 Feb 1999")

    row = list(template.prompt)
    for query, value in (("who?", "the herald"), ("and?", "the seal")):
        row += [*template.before_query, *tokenizer.encode(query, add_special_tokens=False)]
        row += [*template.before_value, *tokenizer.encode(value, add_special_tokens=False)]
    assert tokenizer.decode(row) == whole.removesuffix("<|eot|>")


def test_the_date_of_today_is_not_in_the_prompt(byte_tokenizer):
    today = datetime.date.today().strftime("%d %b %Y")
    template = build_template(byte_tokenizer(SPECIAL, LLAMA_LIKE), TemplateConfig())
    assert today not in template.prompt_text
    assert "01 Jan 2026" in template.prompt_text


UNSTABLE = {
    "numbered turns": "{% for m in messages %}<|start|>{{ loop.index }}: {{ m['content'] }}<|eot|>{% endfor %}",
    "first turn apart": "{% for m in messages %}{{ '' if loop.first else '<|eot|>' }}{{ m['content'] }}"
    "{{ '!' if loop.index == 3 else '' }}{% endfor %}",
    "only the last turn": "<|start|>{{ messages[-1]['content'] }}<|eot|>",
    "user turns only": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|eot|>{% endfor %}",
    "turns repeated": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "roles it does not know": "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ raise_exception('only system turns') }}{% endif %}{% endfor %}",
    "no template at all": "{{ messages",
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTABLE)
def test_a_chat_template_that_changes_from_turn_to_turn_is_refused(byte_tokenizer, name):
    with pytest.raises(ConfigError, match=r"template\.kind"):
        build_template(byte_tokenizer(SPECIAL, UNSTABLE[name]), TemplateConfig(kind="chat"))


# -- layout and rows ---------------------------------------------------------------------------------------------------


def test_slots_lie_where_prompt_and_pieces_put_them():
    layout = TEMPLATE.layout(num_steps=2, query_len=2, value_len=4)
    # 2 of prompt; then per step 1 + 2 + 3 + 4 = 10: queries at 3 4 and 13 14, values at 8…11 and 18…21
    assert layout.step_len == 10
    assert layout.row_len == 22
    assert layout.query_positions.tolist() == [3, 4, 13, 14]
    assert layout.value_positions.tolist() == [8, 9, 10, 11, 18, 19, 20, 21]


@pytest.mark.parametrize(("context", "steps"), [(11, 0), (12, 1), (21, 1), (22, 2), (1000, 99)])
def test_only_whole_steps_fit(context, steps):
    assert TEMPLATE.steps_that_fit(context, query_len=2, value_len=4) == steps


def test_a_row_of_two_steps_by_hand():
    rows = assemble(
        TEMPLATE,
        query_ids=tensor([[[1, 2], [3, 0]]]),
        query_mask=tensor([[[True, True], [True, False]]]),
        value_ids=tensor([[[11, 12, 0], [13, 14, 15]]]),
        value_mask=tensor([[[True, True, False], [True, True, True]]]),
        picks=tensor([[4, 0]]),
        sampled_logprobs=torch.zeros(1, 2, 2),
        selection_logprobs=torch.zeros(1, 2, 5),
    )
    #        prompt  | tmpl query  template    value    | tmpl query  template    value
    assert rows.ids.tolist() == [
        [90, 91,       80,  1, 2,  70, 71, 72, 11, 12, 0,  80,  3, 0,  70, 71, 72, 13, 14, 15]
    ]  # fmt: skip
    assert rows.role.tolist() == [
        [0, 0,         1,   2, 2,  1, 1, 1,    3, 3, 4,    1,   2, 4,  1, 1, 1,    3, 3, 3]
    ]  # fmt: skip
    assert rows.step.tolist() == [[-1, -1, *[0] * 9, *[1] * 9]]
    assert rows.picks.tolist() == [[4, 0]]

    query_ids, query_mask = rows.query_slots()
    value_ids, value_mask = rows.value_slots()
    assert query_ids.tolist() == [[[1, 2], [3, 0]]]
    assert query_mask.tolist() == [[[True, True], [True, False]]]
    assert value_ids.tolist() == [[[11, 12, 0], [13, 14, 15]]]
    assert value_mask.tolist() == [[[True, True, False], [True, True, True]]]


def test_rows_keep_their_own_contents():
    rows = assemble(
        TEMPLATE,
        query_ids=tensor([[[1]], [[2]]]),
        query_mask=torch.ones(2, 1, 1, dtype=torch.bool),
        value_ids=tensor([[[11]], [[12]]]),
        value_mask=tensor([[[True]], [[False]]]),
        picks=tensor([[0], [1]]),
        sampled_logprobs=torch.zeros(2, 1, 1),
        selection_logprobs=torch.zeros(2, 1, 2),
    )
    assert rows.ids.tolist() == [[90, 91, 80, 1, 70, 71, 72, 11], [90, 91, 80, 2, 70, 71, 72, 12]]
    assert rows.role[:, -1].tolist() == [3, 4]
    assert rows.without_queries().role.tolist() == [[0, 0, 1, 4, 1, 1, 1, 3], [0, 0, 1, 4, 1, 1, 1, 4]]
