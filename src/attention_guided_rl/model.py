"""Model: one causal language model as policy (adapter on) and reference (adapter off, or a frozen copy).

In: token ids with roles. Out: hidden states, log-probabilities, caches. Every forward of the package happens here, and
so does the shift: `token_logprobs(...)[b, m]` is log p(id at positions[m] | all ids before it); nobody else slices
logits. Inside `with model.reference():` everything is computed by the reference instead of the policy.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from attention_guided_rl.adapter import Fold
from attention_guided_rl.caching import buffered_cache
from attention_guided_rl.records import PADDING, has_padding, position_ids

HEAD_CHUNK = 2**24
"""Elements of (tokens, vocabulary) that exist at once: 64 MiB in float32, and a handful of tensors of that size."""

LOGPROB_FLOOR = -100.0
"""Nats. A value token of probability 0 counts as this improbable: about where float32 has no smaller probability."""


class LanguageModel:
    """A causal LM of transformers with two sets of weights, policy and reference."""

    def __init__(
        self, causal_lm: Any, tokenizer: Any, *, name: str, peft_model: Any = None, frozen_copy: Any = None
    ) -> None:
        """Wrap a model; `loading.load_model` makes it. Exactly one of `peft_model` and `frozen_copy` is given."""
        self.tokenizer, self.name = tokenizer, name
        self.config = causal_lm.config.get_text_config()
        self.peft_model = peft_model
        self._policy, self._frozen_copy = causal_lm, frozen_copy
        self._active = causal_lm
        self._fold: Fold | None = None
        self._is_reference = False
        self.device = next(causal_lm.parameters()).device
        self.query_vocabulary = self._query_vocabulary()

    # -- policy and reference ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Compute with the reference: same weights with the adapter off, or the frozen copy."""
        before = self._is_reference, self._active
        self._is_reference = True
        try:
            if self.peft_model is None:
                self._active = self._frozen_copy
                yield
            else:
                with self._using(None), self.peft_model.disable_adapter():
                    yield
        finally:
            self._is_reference, self._active = before

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """Compute, without training, with the weights of a Fold; inside `reference` nothing changes.

        Not with dropout, which it would hide.
        """
        dropout = any(layer.training for layer in self._dropout_layers())
        if self.peft_model is None or self._is_reference or dropout:
            yield
            return
        with self._using(self._fold or Fold(self.peft_model)):
            yield

    @contextlib.contextmanager
    def adapter_dropout(self) -> Iterator[None]:
        """Switch the adapter's dropout on; everything else of the model is always in eval mode."""
        layers = self._dropout_layers()
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: p for name, p in self._policy.named_parameters() if p.requires_grad}

    def named_frozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters that nothing may change: those under the adapter, or the frozen copy's."""
        if self._frozen_copy is not None:
            return dict(self._frozen_copy.named_parameters())
        return {name: p for name, p in self._policy.named_parameters() if "lora_" not in name}

    def save(self, folder: str) -> None:
        """Write the adapter (loadable by `PeftModel.from_pretrained`) or the whole model as safetensors."""
        target = self._policy if self.peft_model is None else self.peft_model
        target.save_pretrained(folder, safe_serialization=True)
        if self.peft_model is not None:  # the base by the name that was asked for, not by where it lies on this machine
            path = Path(folder) / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": self.name}, indent=1))

    def load(self, folder: str) -> None:
        """Put weights written by `save` into the policy; the reference is untouched."""
        if self.peft_model is not None:
            weights = load_file(f"{folder}/adapter_model.safetensors")
            result: Any = set_peft_model_state_dict(self.peft_model, weights)
            if result.unexpected_keys or any("lora_" in key for key in result.missing_keys):
                raise ValueError("the adapter's tensors are not those of this model and rank")
            return
        saved = type(self._policy).from_pretrained(folder, use_safetensors=True, dtype=self._dtype)
        self._policy.load_state_dict(saved.state_dict())

    # -- forward -------------------------------------------------------------------------------------------------

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        role: Int[Tensor, "B T"],
        positions: Int[Tensor, " M"],
        cache: DynamicCache | None = None,
    ) -> Float[Tensor, "B M D"]:
        """Return the final hidden states that predict the tokens at `positions`: those one place to the left.

        An empty `cache` is filled on the way, for branches off the rows.
        """
        states = self._body(ids, role, cache=cache)
        return states[:, positions.to(states.device) - 1]

    def extend(
        self, cache: DynamicCache, ids: Int[Tensor, "B M"], role_so_far: Int[Tensor, "B T"], padded: bool | None = None
    ) -> Float[Tensor, "B M D"]:
        """Append ids to the cache (`role_so_far` includes theirs) and return their final hidden states.

        `padded`: whether `role_so_far` has padding, if that is known.
        """
        return self._body(ids, role_so_far, cache=cache, padded=padded)

    def new_cache(self, room: int = 0) -> DynamicCache:
        """Return an empty key/value cache, with room for so many tokens if that is known. Not for training."""
        return buffered_cache(self.config, room)

    def extend_where(
        self,
        cache: DynamicCache,
        ids: Int[Tensor, "B M"],
        visible: Bool[Tensor, "B M T"],
        places: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B M D"]:
        """Append ids to the cache, each attending to what is `visible` to it of the T tokens then cached."""
        additive = torch.zeros_like(visible, dtype=self._dtype).masked_fill(~visible, torch.finfo(self._dtype).min)
        return self._active.base_model(
            input_ids=ids,
            attention_mask=additive[:, None],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def token_logprobs(
        self, ids: Int[Tensor, "B T"], role: Int[Tensor, "B T"], positions: Int[Tensor, " M"]
    ) -> Float[Tensor, "B M"]:
        """Return log p(id at position | all ids before it) under the full distribution, nats; 0 at padding.

        Never below LOGPROB_FLOOR.
        """
        states = self.hidden(ids, role, positions)
        places = positions.to(ids.device)
        return self.logprobs_of(states, ids[:, places], role[:, places] != PADDING)

    def logprobs_of(
        self, states: Float[Tensor, "B M D"], ids: Int[Tensor, "B M"], real: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        """Return the log-probability of ids under the states that predict them; 0 where they are not real."""
        (logprobs,) = self.in_chunks(self._chosen_logprobs, states.flatten(0, 1), ids.flatten())
        return torch.where(real, logprobs.view(ids.shape), 0.0)

    def policy_logprobs(self, states: Float[Tensor, "*shape D"], temperature: float) -> Float[Tensor, "*shape V"]:
        """Return the query distribution: tempered, without control tokens (−inf there)."""
        return self._query_logprobs(self._logits(states), temperature)

    @torch.no_grad()
    def reference_logprobs(self, states: Float[Tensor, "*shape D"], temperature: float) -> Float[Tensor, "*shape V"]:
        """Return the reference's query distribution, of hidden states that it computed."""
        reference = self._policy if self._frozen_copy is None else self._frozen_copy  # no adapter sits on the head
        return self._query_logprobs(self._logits(states, reference), temperature)

    def in_chunks(
        self, function: Callable[..., tuple[Float[Tensor, " C"], ...]], *tensors: Shaped[Tensor, "M ..."]
    ) -> tuple[Float[Tensor, " M"], ...]:
        """Apply a function of tokens that needs the vocabulary to so many at a time that no (M, V) tensor is whole.

        On the way back of a gradient every chunk is computed again, unless there is only one.
        """
        size = max(1, HEAD_CHUNK // self.config.vocab_size)
        chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        if len(chunks) > 1 and torch.is_grad_enabled():
            parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        else:
            parts = [function(*chunk) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def encode(self, text: str) -> list[int]:
        """Encode article text; strings that look like control tokens stay ordinary text."""
        return encode_text(self.tokenizer, text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, for display and for text embedders only."""
        return decode_ids(self.tokenizer, ids)

    def decode_rows(self, ids: Int[Tensor, "M T"], real: Bool[Tensor, "M T"]) -> list[str]:
        """Return the text of each row's real tokens, read back from a GPU in two transfers and not row by row."""
        return [self.decode(row[kept].tolist()) for row, kept in zip(ids.cpu(), real.cpu(), strict=True)]

    def decode_tokens(self, ids: list[int]) -> list[str]:
        """Return the text of each id, cut so that the pieces join to `decode(ids)`.

        A character spread over several tokens goes to the one that completes it; the others get nothing.
        """
        text, ends = self.decode(ids), [0]
        for n in range(1, len(ids)):
            agreeing = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(self.decode(ids[:n]), text, strict=False)
            )
            ends.append(max(ends[-1], sum(1 for _ in agreeing)))
        return [text[start:end] for start, end in itertools.pairwise([*ends, len(text)])] if ids else []

    def attention_projections(
        self, ids: Int[Tensor, "M T"], mask: Bool[Tensor, "M T"]
    ) -> tuple[Float[Tensor, "M T H D"], Float[Tensor, "M T Hk D"]]:
        """Return the last layer's queries and keys, after its norms and before rotary position."""
        attention = _last_attention(self._active.base_model)
        captured: dict[str, Tensor] = {}
        names = _projection_modules(attention)
        hooks = [
            getattr(attention, module).register_forward_hook(lambda m, i, out, key=key: captured.update({key: out}))
            for key, module in names.items()
        ]
        try:
            self._body(ids, torch.where(mask, 0, PADDING), cache=None)
        finally:
            for hook in hooks:
                hook.remove()
        return _split_heads(captured, self.config, attention)

    # -- inside --------------------------------------------------------------------------------------------------

    def _dropout_layers(self) -> list[nn.Module]:
        return [m for name, m in self._policy.named_modules() if "lora_dropout" in name.split(".")]

    @contextlib.contextmanager
    def _using(self, fold: Fold | None) -> Iterator[None]:
        """Compute with folded weights, or with none."""
        before = self._fold
        self._exchange(fold)
        try:
            yield
        finally:
            self._exchange(before)

    def _exchange(self, fold: Fold | None) -> None:
        if fold is not self._fold:
            for one in (self._fold, fold):
                if one is not None:
                    one.toggle()
            self._fold = fold

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._policy.parameters()).dtype

    def _body(self, ids: Tensor, role: Tensor, cache: DynamicCache | None, padded: bool | None = None) -> Tensor:
        """Run the transformer without its output head; `role` covers cached tokens too."""
        padded = has_padding(role) if padded is None else padded
        states = self._active.base_model(
            input_ids=ids,
            attention_mask=(role != PADDING).long() if padded else None,
            position_ids=position_ids(role)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return states

    def _logits(self, states: Tensor, weights: Any = None) -> Tensor:
        """Apply the output head, in float32, as the model's own forward does (checked when it is loaded)."""
        logits = (weights or self._active).get_output_embeddings()(states).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _query_logprobs(self, logits: Tensor, temperature: float) -> Tensor:
        """Temper and mask in place: nothing needs the logits themselves."""
        logits = logits if temperature == 1.0 else logits.div_(temperature)
        return logits.masked_fill_(~self.query_vocabulary, -torch.inf).log_softmax(-1)

    def _chosen_logprobs(self, states: Tensor, ids: Tensor) -> tuple[Tensor]:
        logits = self._logits(states)
        total = logits.logsumexp(-1)
        total = total.masked_fill(total == torch.inf, torch.nan)  # an overflow must not pass for probability 0
        return ((logits.gather(-1, ids[:, None]).squeeze(-1) - total).clamp_min(LOGPROB_FLOOR),)

    def _query_vocabulary(self) -> Bool[Tensor, " V"]:
        """True at ids a query may contain: real tokens that are not control tokens."""
        allowed = torch.arange(self.config.vocab_size) < len(self.tokenizer)
        allowed[[i for i in control_ids(self.tokenizer) if i < len(allowed)]] = False
        return allowed.to(self.device)


@functools.lru_cache(maxsize=8)  # asked for every text, and a tokenizer makes a new table each time
def control_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of control tokens: those that the tokenizer marks as special."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode article text; strings that look like control tokens stay ordinary text.

    A tokenizer whose model holds them as words of its own (Unigram, say) cannot write them as text: they are left out.
    """
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    control = control_ids(tokenizer)
    if control.isdisjoint(ids):
        return ids
    return [i for i in ids if i not in control or i == tokenizer.unk_token_id]  # an unknown word commands nothing


def decode_ids(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of ids, special tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _last_attention(body: nn.Module) -> nn.Module:
    """Return the attention module of the last layer: the last one with query and key projections."""
    found = [m for m in body.modules() if hasattr(m, "q_proj") or hasattr(m, "c_attn") or hasattr(m, "qkv_proj")]
    if not found:
        raise ValueError(f"no query and key projections found in {type(body).__name__}; use another embedder")
    return found[-1]


def _projection_modules(attention: nn.Module) -> dict[str, str]:
    """Name the modules whose outputs are the projections: separate (normed or not), or fused."""
    if hasattr(attention, "q_proj"):
        return {
            "q": "q_norm" if hasattr(attention, "q_norm") else "q_proj",
            "k": "k_norm" if hasattr(attention, "k_norm") else "k_proj",
        }
    return {"fused": "c_attn" if hasattr(attention, "c_attn") else "qkv_proj"}


def _split_heads(captured: dict[str, Tensor], config: Any, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Shape captured projections to (M, T, heads, D)."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(attention, "head_dim", config.hidden_size // num_heads)
    if "fused" in captured:
        q, k, _ = captured["fused"].split(
            [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=-1
        )
    else:
        q, k = captured["q"], captured["k"]
    rows, length = q.shape[:2]
    return q.reshape(rows, length, num_heads, head_dim), k.reshape(rows, length, num_kv_heads, head_dim)
