"""Fingerprints: elements are sampled from the first to the last, however large a tensor."""

import pytest

from attention_guided_rl.fingerprints import sampled_places


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1_000, 2**24 + 1, 25_165_824, 394_002_432])
def test_places_lie_within_the_tensor_and_reach_both_ends(count):
    places = sampled_places(count).tolist()
    assert places[0] == 0
    assert places[-1] == count - 1
    assert len(set(places)) == len(places) == min(64, count)


def test_no_places_in_an_empty_tensor():
    assert sampled_places(0).tolist() == []
