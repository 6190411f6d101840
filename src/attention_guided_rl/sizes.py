"""Sizes: how many pairs and steps a configuration comes to, known from the tokenizer before any weights load."""

from collections.abc import Callable

from attention_guided_rl.config import Config, CorpusConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.pairs import CutArticle, Encode, cut_article
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.loading import max_positions
from attention_guided_rl.template import Template

OpenCorpus = Callable[[CorpusConfig], Corpus]


def context_tokens(config: Config) -> int:
    """Return the longest row allowed, in tokens; raise ConfigError if the model cannot hold what is asked for."""
    available = max_positions(config.model, offline=config.network.offline)
    context = config.rollout.context_tokens or available
    if context > available:
        raise ConfigError(f"rollout.context_tokens ({context}) exceeds the model's context of {available} tokens")
    return context


def resolve_sizes(
    config: Config, template: Template, encode: Encode, open_corpus: OpenCorpus, context: int
) -> tuple[int, int]:
    """Return N, pairs of a pool, and S, steps of a trajectory, with `auto` resolved.

    Raises:
        ConfigError: the steps do not fit the context.
        CorpusError: `auto`, and the article has too few pairs.
    """
    query_tokens, value_tokens = config.rollout.query_tokens, config.pairs.value_tokens
    fits = template.steps_that_fit(context, query_tokens, value_tokens)
    if config.pairs.num_pairs == "auto":
        has = len(only_article(config, encode, open_corpus).pairs)
        num_pairs = min(fits, has)
        if num_pairs < 2:
            raise CorpusError(
                f"corpus.title: {config.corpus.title!r} gives {has} pairs, of which the context holds {fits}; choose a "
                "longer article or shorter pairs"
            )
    else:
        num_pairs = config.pairs.num_pairs
    steps = min(fits, num_pairs) if config.rollout.steps == "auto" else config.rollout.steps
    if not 1 <= steps <= fits:
        needed = template.layout(max(steps, 1), query_tokens, value_tokens).row_len
        raise ConfigError(
            f"rollout.steps: {max(steps, 1)} steps need {needed} tokens, more than the context of {context}; lower the "
            "steps or the token counts"
        )
    if steps > num_pairs:
        raise ConfigError(f"rollout.steps ({steps}) exceeds the {num_pairs} pairs there are: no pair is read twice")
    return num_pairs, steps


def only_article(config: Config, encode: Encode, open_corpus: OpenCorpus) -> CutArticle:
    """Return the article of `corpus.title`, cut into pairs."""
    article = next(filter(None, open_corpus(config.corpus).articles(0, 0)), None)
    if article is None:
        raise CorpusError(f"corpus.title: {config.corpus.title!r} is not in corpus.split: {config.corpus.split}")
    return cut_article(article, encode, config.pairs)
