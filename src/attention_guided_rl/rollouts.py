"""Rollout: the model writes queries, the environment answers with values, until every step is read.

In: model, template, environment, uniform numbers. Out: a TrajectoryBatch. The key/value cache is carried through the
whole trajectory and nothing is encoded twice: per step one forward over [last query token, template, value, template]
and one for each further query token. Wrap it in `model.reference()` for the untrained writer.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.environment import Picker, ReadingEnvironment, sampled_pick
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import PADDING, PROMPT, QUERY, TEMPLATE, VALUE, TrajectoryBatch
from attention_guided_rl.selection import draw_tokens
from attention_guided_rl.template import Template, assemble


@torch.no_grad()
def rollout(
    model: LanguageModel,
    template: Template,
    env: ReadingEnvironment,
    uniforms: Float[Tensor, "B S U"],
    temperature: float,
    picker: Picker = sampled_pick,
) -> TrajectoryBatch:
    """Write B trajectories in an environment that has just been reset to B rows."""
    uniforms = uniforms.to(model.device, torch.float32)
    rows, num_steps = uniforms.shape[:2]
    layout = template.layout(num_steps, uniforms.shape[2] - 1, env.pool.value_ids.shape[2])
    row = _GrowingRow(model, rows, layout.row_len)
    row.append(template.prompt, PROMPT)
    queries, sampled, readings = [], [], []
    for step in range(num_steps):
        row.append(template.before_query, TEMPLATE)
        query_ids, logprobs = _write_query(model, row, uniforms[:, step, :-1], temperature)
        reading = env.step(query_ids, torch.ones_like(query_ids, dtype=torch.bool), uniforms[:, step, -1], picker)
        row.append(template.before_value, TEMPLATE)
        row.append_tensor(reading.value_ids, torch.where(reading.value_mask, VALUE, PADDING))
        row.padded = row.padded or not bool(reading.value_mask.all())
        queries.append(query_ids)
        sampled.append(logprobs)
        readings.append(reading)
    query_ids = torch.stack(queries, 1)
    return assemble(
        template,
        query_ids,
        torch.ones_like(query_ids, dtype=torch.bool),
        torch.stack([r.value_ids for r in readings], 1),
        torch.stack([r.value_mask for r in readings], 1),
        torch.stack([r.picks for r in readings], 1),
        torch.stack(sampled, 1),
        torch.stack([r.selection_logprobs for r in readings], 1),
    )


def _write_query(
    model: LanguageModel, row: "_GrowingRow", uniforms: Float[Tensor, "B Q"], temperature: float
) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B Q"]]:
    """Sample a query token by token; return its ids and their log-probabilities."""
    ids, logprobs = [], []
    for i in range(uniforms.shape[1]):
        distribution = model.policy_logprobs(row.encode()[:, -1], temperature)
        token, logprob = draw_tokens(distribution, uniforms[:, i], model.query_vocabulary)
        ids.append(token)
        logprobs.append(logprob)
        row.append_tensor(token[:, None], torch.full_like(token[:, None], QUERY))
    return torch.stack(ids, 1), torch.stack(logprobs, 1)


class _GrowingRow:
    """Rows under construction: what the cache holds, and what still waits to be encoded."""

    def __init__(self, model: LanguageModel, rows: int, length: int) -> None:
        self._model, self._rows = model, rows
        self.cache: DynamicCache = model.new_cache(room=length)
        self.role = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self.padded = False  # known here, where to ask the rows at every token would be to wait for a GPU
        self._waiting: list[Tensor] = []

    def append(self, piece: tuple[int, ...], role: int) -> None:
        """Append the same tokens to every row."""
        ids = torch.tensor(piece, dtype=torch.long, device=self._model.device).expand(self._rows, -1)
        self.append_tensor(ids, torch.full_like(ids, role))

    def append_tensor(self, ids: Int[Tensor, "B M"], role: Int[Tensor, "B M"]) -> None:
        """Append tokens that differ by row."""
        self._waiting.append(ids)
        self.role = torch.cat([self.role, role], 1)

    def encode(self) -> Float[Tensor, "B M D"]:
        """Run everything that waits through the model, in one forward; return its hidden states."""
        ids = torch.cat(self._waiting, 1)
        self._waiting = []
        return self._model.extend(self.cache, ids, self.role, self.padded)
