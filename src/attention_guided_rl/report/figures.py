"""Figures of a run: the training curve and the arms of the evaluation, as one PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attention_guided_rl.storage import write_bytes


def plot_run(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Draw reward per update beside every arm's mean with its 95 % interval, best arm on top."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curve, arms = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _plot_curve(curve, metrics)
    _plot_arms(arms, summary["arms"])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_bytes(path, picture.getvalue())


def _plot_curve(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    shown = [m for m in metrics if m["reward/mean"] is not None]
    axes.plot([m["update"] for m in shown], [m["reward/mean"] for m in shown], color="#1f5fa8", linewidth=1.4)
    axes.set_xlabel("update")
    axes.set_ylabel("mean reward, nats per value token")
    axes.set_title("Training", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_arms(axes: Any, arms: Mapping[str, Mapping[str, float]]) -> None:
    ordered = sorted(arms.items(), key=lambda item: item[1]["mean"])
    for place, (name, arm) in enumerate(ordered):
        colour = "#c2410c" if name.startswith("trained") else "#6b7280"
        marker = "o" if "/" not in name else "s"
        axes.plot([arm["low"], arm["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(arm["mean"], place, marker, color=colour, markersize=5)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_xlabel("reward, nats per value token (95 % interval over articles)")
    axes.set_title("Evaluation by arm (square: own-key text)", loc="left")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
