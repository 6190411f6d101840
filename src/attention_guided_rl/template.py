"""Template: how prompt, queries and values are laid out in a row of tokens.

In: a tokenizer and TemplateConfig. Out: a Template of fixed token pieces, and RowLayout, the one place that knows at
which positions the slots lie. Pieces are tokenised apart, once, so that prefixes are stable; queries and values are
ids all the way and never pass through a chat template as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.config import TemplateConfig
from attention_guided_rl.confined import confined
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.records import PADDING, PROMPT, QUERY, TEMPLATE, VALUE, RowLayout, TrajectoryBatch

_QUERY_MARK, _VALUE_MARK = "QUERYSLOT", "VALUESLOT"  # words that no template changes or trims


@dataclass(frozen=True, slots=True)
class Template:
    """The fixed pieces of a row: prompt, then per step `before_query` Q `before_value` L."""

    prompt: tuple[int, ...]
    before_query: tuple[int, ...]
    before_value: tuple[int, ...]
    prompt_text: str

    def layout(self, num_steps: int, query_len: int, value_len: int) -> RowLayout:
        """Return where everything lies in rows of this many steps."""
        return RowLayout(
            prompt_len=len(self.prompt),
            before_query_len=len(self.before_query),
            query_len=query_len,
            before_value_len=len(self.before_value),
            value_len=value_len,
            num_steps=num_steps,
        )

    def steps_that_fit(self, context_tokens: int, query_len: int, value_len: int) -> int:
        """Return how many whole steps fit a row of `context_tokens`."""
        step_len = self.layout(1, query_len, value_len).step_len
        return (context_tokens - len(self.prompt)) // step_len


def build_template(tokenizer: Any, config: TemplateConfig) -> Template:
    """Render the template once.

    Raises:
        ConfigError: a chat template is asked for that the model lacks, or it renders turns in an unstable way.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if config.kind == "chat" and not has_chat:
        raise ConfigError("template.kind: this model's tokenizer has no chat template; set template.kind: plain")
    if config.kind == "plain" or not has_chat:
        return _plain_template(tokenizer, config)
    return _chat_template(tokenizer, config)


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Encode template text, whose special-token strings are control tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _plain_template(tokenizer: Any, config: TemplateConfig) -> Template:
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return _checked(
        Template(
            prompt=bos + _encode(tokenizer, config.prompt),
            before_query=_encode(tokenizer, config.query_prefix),
            before_value=_encode(tokenizer, config.value_prefix),
            prompt_text=config.prompt + config.query_prefix,
        )
    )


def _checked(template: Template) -> Template:
    """Refuse a template whose slots have no token of their own step before them: padding would predict their first."""
    if not template.before_query or not template.before_value:
        raise ConfigError("template.query_prefix and template.value_prefix must each be at least one token")
    return template


def _chat_template(tokenizer: Any, config: TemplateConfig) -> Template:
    """Assistant turn = query, user turn = value; the pieces between are the same at every step or it is refused."""
    turns = [{"role": "user", "content": config.prompt}]
    for _ in range(3):
        turns.append({"role": "assistant", "content": _QUERY_MARK})
        turns.append({"role": "user", "content": _VALUE_MARK})
    try:  # the template comes with the model, from whoever made that
        text = confined(
            lambda: str(tokenizer.apply_chat_template(turns, tokenize=False, date_string=config.date_string))
        )
    except ValueError as error:
        raise ConfigError(f"template.kind: the chat template fails ({error}); set template.kind: plain") from None
    pieces = [part for chunk in text.split(_QUERY_MARK) for part in chunk.split(_VALUE_MARK)]
    if len(pieces) != 7:
        raise ConfigError("template.kind: this chat template drops or repeats turns; set template.kind: plain")
    start, before_values, before_queries = pieces[0], pieces[1:6:2], pieces[2:6:2]
    stable = len(set(before_values)) == 1 and len(set(before_queries)) == 1 and start.endswith(before_queries[0])
    if not stable:
        raise ConfigError(
            "template.kind: this chat template renders the same turn differently from step to step; "
            "set template.kind: plain"
        )
    return _checked(
        Template(
            prompt=_encode(tokenizer, start.removesuffix(before_queries[0])),
            before_query=_encode(tokenizer, before_queries[0]),
            before_value=_encode(tokenizer, before_values[0]),
            prompt_text=start,
        )
    )


def assemble(
    template: Template,
    query_ids: Int[Tensor, "B S Q"],
    query_mask: Bool[Tensor, "B S Q"],
    value_ids: Int[Tensor, "B S L"],
    value_mask: Bool[Tensor, "B S L"],
    picks: Int[Tensor, "B S"],
    sampled_logprobs: Float[Tensor, "B S Q"],
    selection_logprobs: Float[Tensor, "B S N"],
) -> TrajectoryBatch:
    """Lay prompt, queries and values out as rectangular rows."""
    rows, steps, query_len = query_ids.shape
    layout = template.layout(steps, query_len, value_ids.shape[2])
    device = query_ids.device

    def constant(piece: Sequence[int]) -> Tensor:
        return torch.tensor(piece, dtype=torch.long, device=device).expand(rows, steps, -1)

    def roles(mask: Tensor, role: int) -> Tensor:
        return torch.where(mask, role, PADDING)

    step_ids = torch.cat([constant(template.before_query), query_ids, constant(template.before_value), value_ids], -1)
    step_role = torch.cat(
        [
            torch.full_like(constant(template.before_query), TEMPLATE),
            roles(query_mask, QUERY),
            torch.full_like(constant(template.before_value), TEMPLATE),
            roles(value_mask, VALUE),
        ],
        -1,
    )
    prompt = constant(template.prompt)[:, 0]
    step_index = torch.arange(steps, device=device)[:, None].expand(rows, steps, layout.step_len)
    return TrajectoryBatch(
        ids=torch.cat([prompt, step_ids.flatten(1)], 1),
        role=torch.cat([torch.full_like(prompt, PROMPT), step_role.flatten(1)], 1),
        step=torch.cat([torch.full_like(prompt, -1), step_index.flatten(1)], 1),
        picks=picks,
        sampled_logprobs=sampled_logprobs,
        selection_logprobs=selection_logprobs,
        layout=layout,
    )
