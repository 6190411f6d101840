"""What a run of a benchmark found: shown on the screen, and written as Markdown and JSON in one folder."""

import datetime
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path("runs") / "benchmarks"


@dataclass
class Report:
    """Tables, remarks and the numbers behind them, in the order they came."""

    name: str
    machine: dict[str, object]
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=170))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Show a table and keep it."""
        self.tables.append((title, columns, rows))
        shown = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            shown.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        self.console.print(shown)

    def remark(self, text: str) -> None:
        """Say something and keep it."""
        self.remarks.append(text)
        self.console.print(text, highlight=False)

    def write(self, folder: Path = OUT) -> Path:
        """Write `<name>-<UTC time>.md` and `.json`; return the former."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        path = folder / f"{self.name}-{stamp}.md"
        parts = [f"# {self.name}", ", ".join(f"{k} {v}" for k, v in self.machine.items())]
        for title, columns, rows in self.tables:
            lines = [columns, ["---"] * len(columns), *rows]
            parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
        parts += self.remarks
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        contents = {"name": self.name, "machine": self.machine, "remarks": self.remarks, **self.numbers}
        path.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        self.console.print(f"written to {path} and .json", highlight=False)
        return path


def spread(values: list[float], digits: int = 3) -> str:
    """Show a median with its range."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}g}"
    return f"{middle:.{digits}g} ({min(values):.{digits}g}–{max(values):.{digits}g})"


def mib(count: float) -> str:
    """Show bytes in MiB."""
    return f"{count / 2**20:.0f}"
