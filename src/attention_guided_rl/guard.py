"""Guard: whether an update met a number that is not finite, and where first; decided alike on all processes.

In: what was computed, by the place it comes from, in the order in which the places come. Out: the first with a NaN or
an infinity. An update in which there is one is skipped and counted; a weight cannot be skipped and ends the run.

    logits → embedding → value log-probability → reward → KL → advantage → loss → gradient; weight
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from attention_guided_rl.records import Rewards, Scores, TrajectoryBatch

WEIGHT = "weight"
"""The place that no skipping mends; the weight's name stands behind it."""


def row_numbers(
    rows: TrajectoryBatch, scores: Scores, prior: Float[Tensor, "A N"], rewards: Rewards
) -> dict[str, list[Tensor]]:
    """Return the numbers of paid rows by place. A vector that is not finite shows in the selection it led to."""
    asked = (scores.counterfactual_logprobs, scores.probe_logprobs, scores.candidate_logprobs)
    return {
        "logits": [rows.sampled_logprobs],
        "embedding": [rows.selection_logprobs.masked_fill(rows.selection_logprobs == -torch.inf, 0.0)],  # −inf: read
        "value log-probability": [scores.value_logprobs, prior, *(part for part in asked if part is not None)],
        "reward": [rewards.rewards],
    }


def first_place(
    numbers: Mapping[str, Iterable[Tensor]], gather: Callable[[Tensor], Tensor] = lambda flags: flags
) -> str | None:
    """Return the first place with a number that is not finite; None if there is none.

    `gather` puts the rows of all processes together, so that all come to the same.
    """
    named = [(place, part) for place, parts in numbers.items() for part in parts]
    bad = torch.stack([~part.isfinite().all() for _, part in named])
    anywhere = gather(bad[None]).any(0).tolist()
    return next((place for (place, _), here in zip(named, anywhere, strict=True) if here), None)


def first_tensor(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a number that is not finite; None if there is none."""
    return next((name for name, tensor in named if not bool(tensor.isfinite().all())), None)
