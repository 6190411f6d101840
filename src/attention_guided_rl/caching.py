"""Caching: keys and values in a buffer with room to spare, so that a new token costs one write and no copy of the rest.

In: transformers' cache for a model's config. Out: the same cache with its plain layers replaced. Not for training: a
buffer that is written in place keeps no history for a gradient.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values of one attention layer, (B, Hk, T, D); what is read is a view of the buffer's filled part.

    Cropping leaves the buffer; whatever else replaces `keys` and `values` (a selection of rows) is taken into a new
    buffer at the next token.
    """

    def __init__(self, room: int) -> None:
        """Allocate `room` tokens at the first one; 0 if it is not known how many will come."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all that there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._keys = self._with_room(self._keys, self.keys, key_states, start)
        self._values = self._with_room(self._values, self.values, value_states, start)
        self._keys[..., start:end, :], self._values[..., start:end, :] = key_states, value_states
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values

    def _with_room(self, buffer: Tensor | None, held: Tensor | None, new: Tensor, start: int) -> Tensor:
        """Return the buffer if it holds what is held and has room for what is new, else a copy that has."""
        end = start + new.shape[-2]
        if buffer is not None and end <= buffer.shape[-2] and held is not None and held.data_ptr() == buffer.data_ptr():
            return buffer
        capacity = max(self._room, end + end // 4 if start else end)  # a quarter more: few copies, little waste
        larger = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
        if start and held is not None:
            larger[..., :start, :] = held
        return larger


def buffered_cache(config: Any, room: int = 0) -> DynamicCache:
    """Return an empty cache for a model's config; layers of other kinds (sliding windows) stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
