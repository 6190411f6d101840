"""From the steps of a case to the rows of its tables: rates, phases against the machine's limits, memory."""

import statistics
from typing import Any

from cases import Case
from flops import cache_bytes, decode_bytes, phase_flops
from machine import Limits
from ours import Step, weight_bytes
from phases import PHASES
from tables import Report, mib, spread

COMPARED = [
    *("", "rows at once", "seconds a step", "trajectories/s", "trajectory tokens/s", "GFLOP", "GFLOP/s"),
    *("ours is faster by", "outputs"),
]


def micro_batch(case: Case) -> int:
    """Return how many rows the frozen pass and the update take at once."""
    return min(case.session.micro_batch_rows, case.task.rows)


def size_of(case: Case) -> str:
    """Say what the case is, in one line."""
    task, config = case.task, case.session.config
    return (
        f"{case.name}: {task.articles} × {task.rows // task.articles} = {task.rows} rows of T = {task.row_len} tokens; "
        f"N = {task.num_pairs}, S = {task.num_steps}, Q = {task.query_len}, L = {task.value_len}, "
        f"template {task.prompt_len} + {task.before_query_len} + {task.before_value_len}; "
        f"{case.shape.body_weights / 1e6:.1f} M body + {case.shape.head_weights / 1e6:.1f} M head weights, "
        f"LoRA rank {case.shape.lora_rank}, {config.model.dtype}; micro-batch {micro_batch(case)} rows"
    )


def compared_row(
    case: Case, name: str, at_once: str, seconds: list[float], ours: list[float], work: int, checked: str
) -> list[str]:
    """Return one variant's row; `work`: its operations; ratios are of steps taken next to each other."""
    rows, tokens = case.task.rows, case.task.tokens
    pairs = list(zip(seconds, ours, strict=False))
    return [
        name,
        at_once,
        spread(seconds),
        spread([rows / s for s in seconds]),
        spread([tokens / s for s in seconds]),
        f"{work / 1e9:.4g}",
        spread([work / s / 1e9 for s in seconds]),
        "" if seconds is ours else spread([s / o for s, o in pairs]) + " ×",
        checked,
    ]


def phase_table(report: Report, case: Case, steps: list[Step], limits: Limits) -> None:
    """Add the table of phases, and the whole step against the 4 U roofline."""
    counted = phase_flops(case.shape, case.task)
    total = statistics.median(s.seconds for s in steps)
    rows, numbers = [], {}
    for name in PHASES:
        seconds = [s.phases.get(name, 0.0) for s in steps]
        middle = statistics.median(seconds)
        row = [name, spread(seconds), f"{100 * middle / total:.0f} %", "", "", ""]
        numbers[name] = {"seconds": seconds}
        if name in counted and middle > 0:
            count = counted[name].total
            share = count / middle / limits.flops_per_s
            row[3:5] = [f"{count / 1e9:.4g}", f"{100 * share:.0f} %"]
            numbers[name] |= {"flops": count, "share_of_product": share}
        if name == "decode" and middle > 0:
            moved = decode_bytes(case.shape, case.task, case.width) / middle
            row[5] = f"{moved / 1e9:.3g} ({100 * moved / limits.bytes_per_s:.0f} %)"
            numbers[name] |= {"bytes_per_s": moved, "share_of_copy": moved / limits.bytes_per_s}
        rows.append(row)
    least = sum(counted[name].total for name in ("decode", "value prefill", "frozen pass", "update"))
    share = least / total / limits.flops_per_s
    rows.append(["whole step, 4 U", f"{total:.3g}", "100 %", f"{least / 1e9:.4g}", f"{100 * share:.0f} %", ""])
    columns = ["phase", "seconds", "share of step", "GFLOP needed", "of matrix product", "GB/s (of copy)"]
    report.table(f"{case.name}: phases of our step", columns, rows)
    numbers["whole step"] = {"seconds": [s.seconds for s in steps], "flops": least, "share_of_product": share}
    report.numbers.setdefault(case.name, {})["phases"] = numbers


def memory_table(report: Report, case: Case, step: Step, before: int) -> None:
    """Add the table of memory; `before`: bytes in use before the model was loaded (libraries)."""
    weights, cache = weight_bytes(case), cache_bytes(case.shape, case.task, case.width)
    rows, numbers = [], {"weights": weights, "cache": cache, "before": before}
    for name, peak in step.peak.items():
        held = cache if name == "rollout" else 0
        rest = max(0, peak - before - weights - held)
        rows.append([name, mib(peak), mib(before), mib(weights), mib(held), mib(rest)])
        numbers[name] = {"peak": peak, "activations": rest}
    columns = ["MiB while in", "peak", "libraries", "weights", "cache", "activations and the rest"]
    report.table(f"{case.name}: memory", columns, rows)
    report.numbers.setdefault(case.name, {})["memory"] = numbers


def limits_row(report: Report, limits: dict[str, Limits]) -> None:
    """Add the table of what the machine can do."""
    rows: list[list[str]] = []
    for when, limit in limits.items():
        rows.append([when, f"{limit.flops_per_s / 1e9:.4g} ({limit.product})", f"{limit.bytes_per_s / 1e9:.4g}"])
    report.table("this machine", ["measured", "matrix product, GFLOP/s", "copy, GB/s (read + written)"], rows)
    report.numbers["limits"] = {
        when: {"flops_per_s": v.flops_per_s, "bytes_per_s": v.bytes_per_s} for when, v in limits.items()
    }


def add_numbers(report: Report, case: Case, key: str, value: Any) -> None:
    """Keep numbers of a case for the JSON file."""
    report.numbers.setdefault(case.name, {})[key] = value
