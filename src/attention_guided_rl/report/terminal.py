"""Trajectories for the terminal. Text of articles and models is untrusted: control characters are shown."""

from rich.console import Console
from rich.text import Text

from attention_guided_rl.records import PairPool
from attention_guided_rl.screen import visible
from attention_guided_rl.session import PaidRows, Session


def print_trajectory(console: Console, session: Session, paid: PaidRows, pool: PairPool, row: int = 0) -> None:
    """Print one trajectory: query, best three keys with probabilities, the value and its gain over its prior."""
    rows, model = paid.rows, session.model
    article = row // (rows.num_rows // pool.num_articles)
    query_ids, real = rows.query_slots()
    queries = model.decode_rows(query_ids[row], real[row])
    keys = model.decode_rows(pool.key_ids[article], pool.key_mask[article])
    values = model.decode_rows(pool.value_ids[article], pool.value_mask[article])
    console.print(Text(visible(pool.articles[article].title), style="bold"))
    for step in range(rows.num_steps):
        logprobs = rows.selection_logprobs[row, step]
        pick = int(rows.picks[row, step])
        console.print(Text(f"step {step + 1:2d}  query  {visible(queries[step])}", style="cyan"))
        best = logprobs.topk(min(3, int((logprobs > float("-inf")).sum()))).indices.tolist()
        for j in best if pick in best else [*best, pick]:
            mark = "→" if j == pick else " "
            console.print(Text(f"       {mark} {float(logprobs[j].exp()):5.2f}  {visible(keys[j])}"))
        gain = float(paid.rewards.rewards[row, step])
        console.print(
            Text(f"         read  {visible(values[pick])}   {gain:+.2f}", style="green" if gain > 0 else "red")
        )
    mean = float(paid.rewards.rewards[row].mean())
    console.print(Text(f"reward {mean:+.3f} nats per value token", style="bold"))
