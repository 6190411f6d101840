"""An embedder whose service fails on purpose: `embedder.kind: failing:FailingEmbedder`."""

import os

from attention_guided_rl.embedders.hashing import HashingEmbedder
from attention_guided_rl.errors import SpendError


class FailingEmbedder(HashingEmbedder):
    """Words in common, until the number of query batches in $FAIL_AT; on the process $FAIL_RANK alone, if it is set."""

    calls = 0

    def __init__(self, config, network, model):
        super().__init__(config, model)

    def embed_queries(self, ids, mask):
        FailingEmbedder.calls += 1
        here = os.environ.get("FAIL_RANK") in (None, os.environ.get("RANK"))
        if here and FailingEmbedder.calls > int(os.environ.get("FAIL_AT", "1000000")):
            raise SpendError("the cap is reached")
        return super().embed_queries(ids, mask)
