"""Tables of evaluations and comparisons for the terminal; no model and no tensor is needed."""

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_guided_rl.report.verdict import verdict as verdict_of

METHOD_SEEDS = 3
"""Runs that differ by their seed before anything is said of the method."""
GAPS = {"oracle_gap_closed": "the greedy oracle", "possible_gap_closed": "planted/possible"}


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the arms, the contrasts and the verdict of an evaluation."""
    _print_arms(console, summary)
    title = f"Paired differences; the unit of resampling is the {summary['resampled']}"
    _print_contrasts(console, title, "contrast", summary["contrasts"])
    lines = [f"trained: {subject_of_claims(len(summary['seeds']))}"]
    if summary["choice_gain"] is not None:
        choice = summary["choice_gain"]
        lines.append(
            f"choice gain (text held equal, only the picks differ): {choice['mean']:+.3f} "
            f"[{choice['low']:+.3f} … {choice['high']:+.3f}], p (Holm) {choice['p_holm']:.4f}"
        )
    lines += [f"{name} {_seeds(values)}" for name, values in summary.get("by_seed", {}).items()]
    for name, bound in GAPS.items():
        if summary.get(name) is not None:
            lines.append(f"gap to {bound} closed: {summary[name]:.0%}")
    console.print(Text("\n".join(lines)))


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Print one group of runs minus another, arm by arm."""
    console.print(Text(f"{', '.join(comparison['ours'])}  minus  {', '.join(comparison['theirs'])}"))
    title = (
        f"{comparison['articles']} articles, reward {comparison['reward_kind']}, {comparison['unit']}, 95 % interval; "
        f"the unit of resampling is the {comparison['resampled']}"
    )
    if comparison["contrasts"]:
        _print_contrasts(console, title, "arm", comparison["contrasts"])
    if comparison["identical"]:
        console.print(Text(f"equal on every article: {', '.join(comparison['identical'])}"))
    trained = comparison["contrasts"].get("trained")
    subject = subject_of_claims(comparison["seeds"])
    if trained is None:
        verdict = "no difference shown: trained is equal on every article, or one group lacks it"
    elif verdict_of(trained) == "no difference shown":
        seen, units = trained["smallest_detectable"], f"{comparison['units']} {comparison['resampled']}s"
        verdict = "no difference shown" + (
            f"; at least {seen:.3f} nats could have been seen with these {units}" if seen is not None else ""
        )
    else:
        verdict = f"{verdict_of(trained)} by {abs(trained['mean']):.3f} nats per value token"
    console.print(Text(f"trained: {verdict} ({subject})"))
    if len(comparison["by_seed"]) > 1:
        console.print(Text(f"trained {_seeds(comparison['by_seed'])}"))


def _seeds(values: Sequence[float]) -> str:
    """Say what each seed gave: intervals resample articles (or trajectories), with the seeds as they are."""
    each = ", ".join(f"{value:+.3f}" for value in values)
    return f"by seed: {each} (SD {stdev(values):.3f}); the intervals above leave this spread out"


def subject_of_claims(num_seeds: int) -> str:
    """Say what a verdict may be about."""
    if num_seeds >= METHOD_SEEDS:
        return f"{num_seeds} seeds, so this speaks of the method"
    if num_seeds == 1:
        return f"one seed, so this speaks of this adapter only; the method needs {METHOD_SEEDS}"
    return f"{num_seeds} seeds, so this speaks of these adapters only; the method needs {METHOD_SEEDS}"


def _print_arms(console: Console, summary: Mapping[str, Any]) -> None:
    where = "held-out articles" if summary["held_out"] else "articles that were trained on, fresh trajectories"
    table = Table(title=f"{summary['articles']} {where}, {summary['unit']}, 95 % interval", title_justify="left")
    table.add_column("arm")
    for column in ("reward", "interval", "subjects read", "area under the probes' curve"):
        table.add_column(column, justify="right")
    for name, arm in sorted(summary["arms"].items(), key=lambda item: -item[1]["mean"]):
        subjects = f"{arm['subjects']:.2f}" if "subjects" in arm else "–"
        area = f"{arm['probe_area']:+.3f}" if "probe_area" in arm else "–"
        style = "bold" if name.startswith("trained") else None
        interval = f"{arm['low']:.3f} … {arm['high']:.3f}"
        table.add_row(Text(name), f"{arm['mean']:.3f}", interval, subjects, area, style=style)
    console.print(table)


def _print_contrasts(
    console: Console, title: str, first_column: str, contrasts: Mapping[str, Mapping[str, Any]]
) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0)  # fits 100 columns
    for column in (first_column, "mean", "interval", "p", "p (Holm)", "could see", "verdict"):
        table.add_column(column, justify="left" if column in (first_column, "verdict") else "right")
    for name, c in contrasts.items():
        seen = "–" if c["smallest_detectable"] is None else f"{c['smallest_detectable']:.3f}"
        interval = f"{c['low']:+.3f} … {c['high']:+.3f}"
        table.add_row(
            Text(name), f"{c['mean']:+.3f}", interval, f"{c['p']:.4f}", f"{c['p_holm']:.4f}", seen, verdict_of(c)
        )
    console.print(table)
