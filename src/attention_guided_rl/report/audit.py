"""An audit on the terminal: a table of what was checked, measured and found, and a line on each thing that is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found."""

    name: str
    passed: bool
    measured: str
    explanation: str
    """What it means when the check fails, and what to do."""


def print_audit(console: Console, results: Sequence[CheckResult]) -> None:
    """Print all results, then what each failure means."""
    table = Table(title="Audit of this configuration on its real model", title_justify="left")
    for column in ("check", "measured", "verdict"):
        table.add_column(column)
    for result in results:
        verdict = Text("ok", style="green") if result.passed else Text("FAILED", style="bold red")
        table.add_row(Text(result.name), Text(result.measured), verdict)
    console.print(table)
    for result in results:
        if not result.passed:
            console.print(Text(f"{result.name}: {result.explanation}", style="red"))
    if all(result.passed for result in results):
        console.print(f"all {len(results)} checks passed", highlight=False)
