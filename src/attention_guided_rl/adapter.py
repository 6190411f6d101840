"""Adapter: LoRA's layers as they are trained, and the adapter folded into the weights while nothing is trained.

In: a model and PEFT's description of its adapter. Out: PEFT's functions up to rounding, with fewer passes over memory;
what is saved is PEFT's own.
"""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional


class InPlaceLinear(Linear):
    """A linear layer whose adapter is added to its output in place.

    PEFT's own scales the adapter's output and adds it, by tensors as wide as the layer, and in float32 where the weights
    have 16 bits; here what is scaled is as narrow as the rank, and the product itself adds, in the weights' precision.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, with the adapter unless it is off or folded in."""
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        flat = x.flatten(0, -2)
        down, up = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
        narrow = functional.linear(self.lora_dropout[name](flat), down) * self.scaling[name]
        return self.base_layer(flat).addmm_(narrow, up.t()).unflatten(0, x.shape[:-1])


def in_place(config: LoraConfig) -> LoraConfig:
    """Return the configuration with linear layers of the kind above."""
    config._register_custom_module({nn.Linear: InPlaceLinear})
    return config


class Fold:
    """Weights with the adapter as it is now added in; `toggle` exchanges them with the model's own.

    One matrix product a layer instead of three. The weights themselves are kept and put back, never subtracted from, so
    the reference stays the same to the bit.
    """

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
