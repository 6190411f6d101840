"""Folding: while nothing is trained, a LoRA adapter's product is added into the weights beside it.

In: a model with its adapter. Out: the same function, up to rounding, by one matrix product a layer instead of three.
The weights themselves are kept and put back, never subtracted from, so the reference stays the same to the bit.
"""

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn


class Fold:
    """Weights with the adapter as it is now added in; `toggle` exchanges them with the model's own."""

    def __init__(self, peft_model: Any) -> None:
        self._layers: list[Any] = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        self._adapter: str = peft_model.active_adapter
        self._others = [_weight(layer).data + layer.get_delta_weight(self._adapter).detach() for layer in self._layers]

    def toggle(self) -> None:
        """Put the folded weights in the model, or its own back."""
        for n, layer in enumerate(self._layers):
            weight = _weight(layer)
            weight.data, self._others[n] = self._others[n], weight.data
            layer.merged_adapters = [] if layer.merged else [self._adapter]


def _weight(layer: Any) -> nn.Parameter:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight
