"""Tables and trajectories for the terminal. Text of articles and models is untrusted: control characters are shown."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_guided_rl.records import PairPool
from attention_guided_rl.report.verdict import verdict
from attention_guided_rl.session import PaidRows, Session
from attention_guided_rl.tracking import visible


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the arms, the contrasts and the verdict of an evaluation."""
    where = "held-out articles" if summary["held_out"] else "articles that were trained on, fresh trajectories"
    table = Table(title=f"{summary['articles']} {where}, {summary['unit']}, 95 % interval", title_justify="left")
    for column, justify in (("arm", "left"), ("reward", "right"), ("interval", "right"), ("subjects read", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, arm in sorted(summary["arms"].items(), key=lambda item: -item[1]["mean"]):
        subjects = f"{arm['subjects']:.2f}" if "subjects" in arm else "–"
        style = "bold" if name.startswith("trained") else None
        table.add_row(name, f"{arm['mean']:.3f}", f"{arm['low']:.3f} … {arm['high']:.3f}", subjects, style=style)
    console.print(table)
    contrasts = Table(
        title=f"Paired differences; the unit of resampling is the {summary['resampled']}", title_justify="left"
    )
    for column in ("contrast", "mean", "interval", "p (Holm)", "verdict"):
        contrasts.add_column(column, justify="left" if column in ("contrast", "verdict") else "right")
    for name, c in summary["contrasts"].items():
        contrasts.add_row(
            name, f"{c['mean']:+.3f}", f"{c['low']:+.3f} … {c['high']:+.3f}", f"{c['p_holm']:.4f}", verdict(c)
        )
    console.print(contrasts)
    if summary["choice_gain"] is not None:
        choice = summary["choice_gain"]
        console.print(
            f"choice gain (text held equal, only the picks differ): {choice['mean']:+.3f} "
            f"[{choice['low']:+.3f} … {choice['high']:+.3f}]",
            highlight=False,
            markup=False,
        )
    if summary["oracle_gap_closed"] is not None:
        console.print(f"gap to the greedy oracle closed: {summary['oracle_gap_closed']:.0%}", highlight=False)


def print_trajectory(console: Console, session: Session, paid: PaidRows, pool: PairPool, row: int = 0) -> None:
    """Print one trajectory: query, best three keys with probabilities, the value and its gain over its prior."""
    rows, model = paid.rows, session.model
    article = row // (rows.num_rows // pool.num_articles)
    query_ids, real = rows.query_slots()
    console.print(Text(visible(pool.articles[article].title), style="bold"))
    for step in range(rows.num_steps):
        query = model.decode(query_ids[row, step][real[row, step]].tolist())
        logprobs = rows.selection_logprobs[row, step]
        pick = int(rows.picks[row, step])
        console.print(Text(f"step {step + 1:2d}  query  {visible(query)}", style="cyan"))
        best = logprobs.topk(min(3, int((logprobs > float("-inf")).sum()))).indices.tolist()
        for j in best if pick in best else [*best, pick]:
            key = model.decode(pool.key_ids[article, j][pool.key_mask[article, j]].tolist())
            mark = "→" if j == pick else " "
            console.print(Text(f"       {mark} {float(logprobs[j].exp()):5.2f}  {visible(key)}"))
        value = model.decode(pool.value_ids[article, pick][pool.value_mask[article, pick]].tolist())
        gain = float(paid.rewards.rewards[row, step])
        console.print(Text(f"         read  {visible(value)}   {gain:+.2f}", style="green" if gain > 0 else "red"))
    mean = float(paid.rewards.rewards[row].mean())
    console.print(Text(f"reward {mean:+.3f} nats per value token", style="bold"))
