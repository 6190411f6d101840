"""Pickers: the simple ways to choose what is read next, which the learned way is compared with.

In: pools and priors. Out: functions for `ReadingEnvironment.step`. They choose; what text stands in the query slots is
another matter (`texts.py`).
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.data.encyclopedia import planted_pick
from attention_guided_rl.environment import Picker, ReadingEnvironment, sampled_pick
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import PairPool
from attention_guided_rl.selection import sample

PICKERS = ("trained", "untrained", "random", "article_order", "easy_to_hard", "nearest_key", "planted")
"""Pickers that write queries of their own, in the order in which they are run; the search comes on top."""


def simple_pickers(pool: PairPool, prior: Float[Tensor, "A N"], variant: str) -> Mapping[str, Picker]:
    """Return every picker that goes with untrained text, by name; `planted*` need a corpus that labels subjects."""
    return {
        "untrained": sampled_pick,
        "random": _random_pick,
        "article_order": _article_order_pick,
        "easy_to_hard": _easy_to_hard(prior),
        "nearest_key": _nearest_key_pick,
        "planted": _planted(pool.subject, variant),
        "planted_shuffled": _planted(_shuffle_labels(pool), variant),
    }


def replay(picks: Int[Tensor, "B S"]) -> Picker:
    """Choose what was chosen before, step by step."""

    def pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
        num_read = env.unread.shape[1] - int(env.unread[0].sum())
        return picks[env.rows, num_read]

    return pick


def _random_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    return sample(env.unread.float().log().log_softmax(-1), uniform)


def _first_unread(preference: Float[Tensor, "B N"], unread: Bool[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Return the unread position of largest preference; ties go to the first in the article."""
    return preference.masked_fill(~unread, -math.inf).argmax(-1)


def _article_order_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    return _first_unread(
        -torch.arange(env.unread.shape[1], device=uniform.device).float().expand_as(env.unread), env.unread
    )


def _easy_to_hard(prior: Float[Tensor, "A N"]) -> Picker:
    """Prefer the largest u_j; dividing by L̄ would not change the order."""

    def pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
        return _first_unread(prior[env.articles], env.unread)

    return pick


def _nearest_key_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    if env.last_pick is None:
        return _article_order_pick(env, logprobs, uniform)
    return _first_unread(env.value_scores(), env.unread)


def _planted(subject: Int[Tensor, "A N"], variant: str) -> Picker:
    def pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
        picks = []
        for b in range(len(uniform)):
            last = None if env.last_pick is None else int(env.last_pick[b])
            unread = env.unread[b].nonzero()[:, 0].tolist()
            picks.append(planted_pick(variant, subject[env.articles[b]].tolist(), unread, last))
        return torch.tensor(picks, device=uniform.device)

    return pick


def _shuffle_labels(pool: PairPool) -> Int[Tensor, "A N"]:
    """Permute the subject labels within each article, by its own seed: the control."""
    rows = [
        labels[torch.from_numpy(generator(0, Purpose.CONTROL, int(ids[0][:8], 16)).permutation(len(labels)))]
        for labels, ids in zip(pool.subject, pool.pair_ids, strict=True)
    ]
    return torch.stack(rows)
