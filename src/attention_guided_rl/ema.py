"""Exponential moving average of the policy's trained weights, as a third set of weights beside policy and reference."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from attention_guided_rl.model import LanguageModel


class EmaWeights:
    """w ← decay · w + (1 − decay) · policy after every optimiser step; at first the policy's own."""

    def __init__(self, model: LanguageModel, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: p.detach().clone() for name, p in model.named_trainable().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the policy as it is now."""
        for name, parameter in self._model.named_trainable().items():
            self._average[name].lerp_(parameter, 1 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the average in the policy's place."""
        parameters = self._model.named_trainable()
        policy = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._average[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = policy[name]

    def state(self) -> dict[str, Tensor]:
        """Return the average by parameter name, for a checkpoint."""
        return {name: value.cpu().contiguous() for name, value in self._average.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved average back.

        Raises:
            KeyError: it is of another model.
        """
        for name, value in self._average.items():
            value.copy_(state[name])
