"""Attention embedder: the model's own last-layer projections, q for queries and k for keys."""

import contextlib

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.model import LanguageModel


class AttentionEmbedder:
    """Mean of a text's projections over its positions, before rotary position; the text stands alone after BOS.

    The first position is left out of the mean: attention sinks make it an outlier. By default the projections are the
    reference's, so selection does not depend on what is trained. With `trained` they are those of the weights in use,
    and have gradients.
    """

    def __init__(self, config: EmbedderConfig, model: LanguageModel) -> None:
        self._model = model
        self.depends_on_policy = config.trained
        name = getattr(model.config, "_name_or_path", "") or model.config.model_type
        self.identity = f"attention/{name}/last layer" + ("/trained" if config.trained else "")

    def embed_queries(self, ids: Int[Tensor, "B Q"], mask: Bool[Tensor, "B Q"]) -> Float[Tensor, "B H D"]:
        """Embed queries by the query projection; whitespace gives the zero vector."""
        queries, _, keep = self._project(ids, mask)
        blank = [not text.strip() for text in self._model.decode_rows(ids, mask)]
        mean = _masked_mean(queries, keep)
        return mean.masked_fill(torch.tensor(blank, device=ids.device)[:, None, None], 0.0)

    def embed_keys(self, ids: Int[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, "M Hk D"]:
        """Embed keys by the key projection."""
        _, keys, keep = self._project(ids, mask)
        return _masked_mean(keys, keep)

    def _project(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bos = self._model.tokenizer.bos_token_id
        if bos is not None:
            ids = torch.cat([torch.full_like(ids[:, :1], bos), ids], 1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        frozen = contextlib.ExitStack()
        if not self.depends_on_policy:
            frozen.enter_context(self._model.reference())
            frozen.enter_context(torch.no_grad())
        with frozen:
            queries, keys = self._model.attention_projections(ids, mask)
        keep = mask.clone()
        keep[:, 0] = False
        return queries.float(), keys.float(), keep


def _masked_mean(values: Float[Tensor, "M T H D"], keep: Bool[Tensor, "M T"]) -> Float[Tensor, "M H D"]:
    weight = keep[:, :, None, None].float()
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1.0)
