"""Ordering: score any reading order of any articles, say one made by somebody else's method.

In: a session, articles, and for each a list of pair positions. Out: Rewards, with own-key text in the query slots, so
that only the order counts.
"""

from collections.abc import Sequence

import torch

from attention_guided_rl.data.pairs import cut_article, whole_pool
from attention_guided_rl.errors import CorpusError
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Article, Rewards, slot
from attention_guided_rl.scorer import Scorer
from attention_guided_rl.session import Session
from attention_guided_rl.template import assemble
from attention_guided_rl.texts import with_key_text


def score_order(
    session: Session, articles: Sequence[Article], orders: Sequence[Sequence[int]], scorer: Scorer | None = None
) -> Rewards:
    """Return the configured reward of reading article a's pairs in the order `orders[a]` (positions in the article).

    All articles must be cut into equally many pairs, and all orders be equally long. The frozen reference scores
    unless another scorer is given.

    Raises:
        CorpusError: an order repeats a pair or names one that the article does not have.
    """
    cuts = [cut_article(article, session.model.encode, session.config.pairs) for article in articles]
    for cut, order in zip(cuts, orders, strict=True):
        wrong = [p for p in order if not 0 <= p < len(cut.pairs)]
        if wrong or len(set(order)) < len(order):
            raise CorpusError(
                f"order for {cut.article.title!r}: {'no pair ' + str(wrong[0]) if wrong else 'a pair is repeated'}; "
                f"the article has pairs 0 to {len(cut.pairs) - 1}"
            )
    pool = whole_pool(cuts, session.config.pairs).to(session.model.device)
    picks = torch.tensor([list(order) for order in orders], device=session.model.device)
    values, mask = slot(pool.value_ids, picks), slot(pool.value_mask, picks)
    shape = (*picks.shape, session.config.rollout.query_tokens)
    rows = assemble(
        session.template,
        torch.zeros(shape, dtype=torch.long, device=picks.device),
        torch.zeros(shape, dtype=torch.bool, device=picks.device),
        values,
        mask,
        picks,
        torch.zeros(shape, device=picks.device),
        torch.zeros(*picks.shape, pool.num_pairs, device=picks.device),
    )
    q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, range(len(cuts)), 1)
    return session.pay_for_evaluation(with_key_text(session, rows, pool), pool, q0, scorer=scorer).rewards
