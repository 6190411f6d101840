"""The cache's buffers: what is read from them is what was put in, whatever was cropped or selected in between."""

import pytest
import torch

from attention_guided_rl.caching import BufferedLayer


def tokens(*numbers: int, rows: int = 2) -> torch.Tensor:
    """(B, 1 head, T, 1), row b holding 10·b + number."""
    return torch.stack([10.0 * b + torch.tensor(numbers) for b in range(rows)])[:, None, :, None]


@pytest.mark.parametrize("room", [0, 3, 10])
def test_a_buffered_layer_reads_what_was_written(room):
    layer = BufferedLayer(room)
    layer.update(tokens(1, 2), -tokens(1, 2))
    layer.update(tokens(3, 4, 5), -tokens(3, 4, 5))
    layer.crop(-2)
    keys, values = layer.update(tokens(6), -tokens(6))
    assert keys.flatten(1).tolist() == [[1, 2, 3, 6], [11, 12, 13, 16]]
    assert values.flatten(1).tolist() == [[-1, -2, -3, -6], [-11, -12, -13, -16]]
    layer.batch_select_indices(torch.tensor([1, 1]))
    keys, _ = layer.update(tokens(7), tokens(7))
    assert keys.flatten(1).tolist() == [[11, 12, 13, 16, 7], [11, 12, 13, 16, 17]]
    assert layer.get_seq_length() == 5


def test_with_enough_room_a_token_moves_nothing():
    layer = BufferedLayer(4)
    first, _ = layer.update(tokens(1), tokens(1))
    last = first
    for number in (2, 3, 4):
        last, _ = layer.update(tokens(number), tokens(number))
    assert last.data_ptr() == first.data_ptr()
