"""Counter-based random numbers: every draw is a pure function of what it is for, so nothing needs to be saved.

Philox with key (seed, purpose) and the remaining coordinates as counter. `index` is an article's place in the
update's global list, never a process rank; so one process and many draw the same numbers.
"""

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Purpose(IntEnum):
    """What a stream of numbers is for; streams of different purposes are independent."""

    TRAINING = 1
    EVALUATION = 2
    CALIBRATION = 3
    POOL = 4
    EVALUATION_POOL = 5
    SHUFFLE = 6
    CONTROL = 7
    DROPOUT = 8
    COUNTERFACTUAL = 9
    EVALUATION_COUNTERFACTUAL = 10


def generator(seed: int, purpose: Purpose, *coordinates: int) -> np.random.Generator:
    """Return the generator of at most three non-negative coordinates."""
    padded = (*coordinates, *(0,) * (3 - len(coordinates)))
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, *reversed(padded)]))


def uniforms(
    seed: int,
    purpose: Purpose,
    update: int,
    indices: range,
    trajectories: int,
    steps: int,
    query_len: int,
) -> Float[Tensor, "B S U"]:
    """Return each row's uniform numbers: Q for the query tokens of a step, the last for its pick.

    Rows are articles `indices` × `trajectories`; a row's numbers depend on (seed, purpose, update, index, trajectory).
    """
    draws = [
        generator(seed, purpose, update, index, trajectory).random((steps, query_len + 1))
        for index in indices
        for trajectory in range(trajectories)
    ]
    return torch.from_numpy(np.stack(draws))
