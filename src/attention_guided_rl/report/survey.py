"""A survey in words, for the terminal."""

import contextlib
import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_guided_rl.config import Config
from attention_guided_rl.screen import make_console, visible
from attention_guided_rl.survey import require_usable, survey
from attention_guided_rl.survey_counts import MAX_COMPARED, Pairs, Places, Speed, Survey


def show(config: Config, *, num_places: int, num_sample: int, as_json: bool = False) -> None:
    """Survey and print; raise CorpusError, once all is printed, if training would find nothing to read."""
    console = make_console()
    if as_json:
        found = survey(config, num_places, num_sample=num_sample)
        print(json.dumps(asdict(found), indent=1, allow_nan=False))
    else:
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
            found = survey(
                config,
                num_places,
                num_sample=num_sample,
                announce=lambda line: status.update(Text(visible(line))) if status else None,
            )
        print_survey(console, found)
    require_usable(found)


def print_survey(console: Console, found: Survey) -> None:
    """Print a survey, what it means for the run, and the sample."""
    console.print(Text(visible(found.source), style="bold"))
    _print_grid(console, facts(found))
    if found.places.articles:
        console.print(_sizes(found.pairs))
    _print_grid(console, prospects(found))
    if found.overlap is not None and found.overlap.articles:
        titles = ", ".join(repr(visible(title)) for title in found.overlap.titles)
        more = ", …" if found.overlap.articles > len(found.overlap.titles) else ""
        console.print(Text(f"warning: evaluation.corpus has articles that are trained on: {titles}{more}", style="red"))
    if found.sample is not None:
        console.print(Text(f"\n{visible(found.sample.title)}", style="bold"))
        _print_grid(console, [(visible(key), f"→ {visible(value)}") for key, value in found.sample.pairs])


def facts(found: Survey) -> list[tuple[str, str]]:
    """Return what was counted, as (name, words)."""
    places, pairs, need, memory = found.places, found.pairs, found.need, found.speed.peak_memory
    total = 0 if pairs.pairs_per_article is None else pairs.pairs_per_article.total
    of_other_splits = sum(places.by_split.values()) - places.articles
    near_duplicates = places.near_duplicates + places.near_duplicates_on_opening
    left_out = f"{places.empty:,} empty, {near_duplicates:,} near-duplicates"
    left_out += f", {places.skipped_on_opening:,} titles without an article" if places.skipped_on_opening else ""
    with_key = f", {pairs.repeated_pairs:,} with its key" if pairs.repeated_values else ""
    rows = [
        ("places", f"{places.read:,} read, a whole pass" if places.whole_pass else f"the first {places.read:,} read"),
        ("left out", left_out + (f", {of_other_splits:,} of other splits" if of_other_splits else "")),
        ("by title", ", ".join(f"{count:,} {split}" for split, count in places.by_split.items())),
        ("articles", _enough(found)),
    ]
    if pairs.enough_to_train != pairs.enough_to_evaluate:
        rows.append(("", f"{pairs.enough_to_train:,} give at least {need.num_pairs:,}, enough to train on"))
    if pairs.key_len is not None and (pairs.key_len, pairs.value_len) != (need.key_tokens, need.value_tokens):
        rows.append(("lengths", f"keys of {pairs.key_len:.1f}, values of {pairs.value_len:.1f} tokens in the mean"))
    rows += [
        ("repeats", f"{_share(pairs.repeated_values, total)} repeat a value of the article{with_key}"),
        ("wikitext", f"{_share(pairs.with_residue, total)} have some left"),
        ("reading", _reading_words(found.speed)),
        ("tokenising", f"{found.speed.tokenising_s:.1f} s with the tokenizer of {visible(need.tokenizer)}"),
    ]
    return rows if memory is None else [*rows, ("memory", f"{memory / 1e6:,.0f} MB at the peak")]


def prospects(found: Survey) -> list[tuple[str, str]]:
    """Return what the counts mean for training and evaluation, as (name, words)."""
    need, evaluated = found.need, found.held_out
    rows = [("training", _supply(need.training_articles, found.pairs.enough_to_train, found.places))]
    if not need.evaluation_articles:
        return rows
    if evaluated is None:
        supply = _supply(need.evaluation_articles, found.pairs.enough_to_evaluate, found.places)
        return [*rows, ("evaluation", f"on the same articles, for evaluation.corpus names no other: {supply}")]
    supply = _supply(need.evaluation_articles, evaluated.pairs.enough_to_evaluate, evaluated.places)
    rows += [("evaluation", f"{visible(evaluated.source)}: {supply}"), ("", _enough(evaluated))]
    if found.overlap is not None:
        among = "" if found.overlap.compared < MAX_COMPARED else f", looked for among its first {MAX_COMPARED:,}"
        rows.append(("overlap", f"{found.overlap.articles:,} articles, by id or as near-duplicates{among}"))
    return rows


def _enough(found: Survey) -> str:
    """Say how many articles have N + P pairs."""
    need = found.need
    wanted = f"{need.num_pairs:,}" + (f" + {need.num_probes}" if need.num_probes else "")
    lengths = f"{'at most ' if need.cut == 'sentences' else ''}{need.key_tokens} + {need.value_tokens} tokens"
    return f"{found.pairs.enough_to_evaluate:,} of {found.places.articles:,} give at least {wanted} pairs of {lengths}"


def _supply(needed: int, has: int, places: Places) -> str:
    """Say whether so many articles come up before one comes up again."""
    if not has:
        return f"{needed:,} articles are needed"
    if has >= needed:
        return f"{needed:,} articles are needed, {has:,} have enough: none is read twice"
    if places.whole_pass:
        return f"{needed:,} articles are needed, {has:,} have enough: {needed / has:.1f} passes over them"
    likely = -(-needed * places.read // has)
    return f"{needed:,} articles are needed, {has:,} have enough so far: at this rate, the first {likely:,} places do"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} pairs ({100 * count / total:.2f} %)" if total else "none of no pairs"


def _reading_words(speed: Speed) -> str:
    if speed.bytes_read is None:
        return f"{speed.reading_s:.1f} s"
    megabytes, bare = speed.bytes_read / 1e6, speed.bare_bytes_per_s
    words = f"{megabytes:,.1f} MB of XML in {speed.reading_s:.1f} s: {megabytes / speed.reading_s:.1f} MB/s"
    return words if bare is None else f"{words}; bare parse {bare / 1e6:.1f} MB/s"


def _sizes(pairs: Pairs) -> Table:
    table = Table(title="Sizes", title_justify="left")
    for column in ("", "min", "median", "mean", "max", "total"):
        table.add_column(column, justify="right" if column else "left")
    named = {"pairs of an article": pairs.pairs_per_article, "tokens of an article": pairs.tokens_per_article}
    for name, spread in named.items():
        if spread is not None:
            numbers = (f"{spread.median:,.10g}", f"{spread.mean:,.1f}", f"{spread.max:,}", f"{spread.total:,}")
            table.add_row(name, f"{spread.min:,}", *numbers)
    return table


def _print_grid(console: Console, rows: list[tuple[str, str]]) -> None:
    """Print two columns whose text is wrapped in its column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=10)  # the longest name
    for name, words in rows:
        grid.add_row(Text(name), Text(words))
    console.print(grid, soft_wrap=False)
