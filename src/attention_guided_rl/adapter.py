"""Adapter: LoRA's layers as they are trained, and the adapter folded into the weights while nothing is trained.

In: a model and PEFT's description of its adapter. Out: PEFT's functions up to rounding, with fewer passes over memory;
what is saved is PEFT's own.
"""

from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from attention_guided_rl.onednn import OneDnnLinear, pack


class InPlaceLinear(Linear):
    """A linear layer whose adapter is added to its output in place.

    PEFT's own scales the adapter's output and adds it, by tensors as wide as the layer, in float32 even where the
    weights have 16 bits. Here the product scales and adds, in the weights' precision. Python is kept short, too: when a
    token is written on a GPU, or by a small model, it takes longer than the arithmetic.

    `held`: Aᵀ and Bᵀ as they are needed, while nothing is trained.
    """

    held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, with the adapter unless it is off or folded in."""
        off, merged = self.disable_adapters, self.merged
        if args or kwargs or (off and merged):
            return super().forward(x, *args, **kwargs)
        if off or merged:
            return cast(Tensor, self.base_layer(x))
        (name,) = self.active_adapters
        flat = x.flatten(0, -2)
        if self.held is None:
            down, up = (cast(Tensor, part[name].weight).to(x.dtype).t() for part in (self.lora_A, self.lora_B))
            narrow = self.lora_dropout[name](flat) @ down
        else:
            down, up = self.held
            narrow = flat @ down
        output: Tensor = self.base_layer(flat)
        return output.addmm_(narrow, up, alpha=self.scaling[name]).unflatten(0, x.shape[:-1])


def in_place(config: LoraConfig) -> LoraConfig:
    """Give the configuration linear layers of the kind above, and return it."""
    config._register_custom_module({nn.Linear: InPlaceLinear})
    return config


class Fold:
    """What to compute with while nothing is trained; `toggle` exchanges it with the model's own, and back.

    In float32 a layer's weights with its adapter's product added: one matrix product instead of three. 16 bits would
    round a small adapter away; there it is the adapter in 16 bits, which is otherwise rounded anew in every forward.
    What is exchanged is kept and put back, never subtracted from, so the reference stays the same to the bit.
    """

    def __init__(self, peft_model: Any) -> None:
        """Compute it from the adapter as it is now."""
        self._adapter: str = peft_model.active_adapter
        self._layers: list[Any] = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        dtype = self._layers[0].get_base_layer().weight.dtype
        self._merges = dtype == torch.float32
        self._others: list[tuple[Any, str, Any]]
        if self._merges:
            self._others = [self._merged(layer) for layer in self._layers]
            head = peft_model.get_output_embeddings()
            if isinstance(head, OneDnnLinear):
                self._others.append((head, "packed", pack(head.weight)))  # anew each time: kept, it would take room
        else:
            self._others = [
                (layer, "held", self._held(layer, dtype)) for layer in self._layers if isinstance(layer, InPlaceLinear)
            ]  # PEFT's own compute in float32

    def toggle(self) -> None:
        """Put this in the model, or its own back."""
        for n, (owner, name, other) in enumerate(self._others):
            self._others[n] = owner, name, getattr(owner, name)
            setattr(owner, name, other)
        for layer in self._layers if self._merges else ():
            layer.merged_adapters = [] if layer.merged else [self._adapter]

    def _held(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a layer's Aᵀ and Bᵀ in the weights' precision."""
        down, up = (part[self._adapter].weight.data.to(dtype).t() for part in (layer.lora_A, layer.lora_B))
        return down, up

    def _merged(self, layer: Any) -> tuple[Any, str, Tensor | None]:
        """Return what of a layer to replace by what: its weights, or what is packed in their place."""
        base = layer.get_base_layer()
        weight: Tensor = base.weight.data + layer.get_delta_weight(self._adapter).detach()
        return (base, "packed", pack(weight)) if isinstance(base, OneDnnLinear) else (base.weight, "data", weight)
