"""Compare: runs against runs, from their evaluation.jsonl, article by article. Loads no model.

In: run folders that have been evaluated. Out: for every arm the paired difference of two groups of runs, seeds nested
in articles. Runs that did not read the same pools for the same reward are refused, for their difference means nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_guided_rl.errors import ConfigError
from attention_guided_rl.summary import contrast, summarise, unit_means, with_holm

NEEDED = ("arm", "article", "pool", "index", "seed", "reward_kind", "reward", "picks", "subjects", "probe_curve")


@dataclass(frozen=True, slots=True)
class RunEvaluation:
    """What evaluation.jsonl and evaluation.json of a run hold."""

    name: str
    records: tuple[dict[str, Any], ...]
    held_out: bool

    @property
    def reward_kind(self) -> str:
        """The reward that the arms were compared by."""
        return str(self.records[0]["reward_kind"])

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.records[0]["picks"])


def read_evaluation(folder: Path) -> RunEvaluation:
    """Read what the evaluation of a run left.

    Raises:
        ConfigError: the run has not been evaluated, or by a version that left less.
    """
    try:
        lines = (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
        records = tuple(json.loads(line) for line in lines)
        held_out = bool(json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["held_out"])
    except OSError:
        raise ConfigError(f"{folder} has no evaluation; run agrl evaluate {folder} first") from None
    except (ValueError, KeyError):
        raise ConfigError(f"{folder}: its evaluation cannot be read; run agrl evaluate {folder} again") from None
    if not records or any(name not in record for record in records for name in NEEDED):
        raise ConfigError(f"{folder}: its evaluation is incomplete; run agrl evaluate {folder} again")
    return RunEvaluation(folder.name, records, held_out)


def summarise_seeds(runs: Sequence[RunEvaluation]) -> dict[str, Any]:
    """Summarise runs as seeds of one configuration.

    Raises:
        ConfigError: they read other articles, for another reward, or have other arms.
    """
    first, *others = runs
    for run in others:
        _require_same(first, run)
        if _articles([run]) != _articles([first]):
            raise ConfigError(f"{first.name} and {run.name} were evaluated on different articles")
        if {r["arm"] for r in run.records} != {r["arm"] for r in first.records}:
            raise ConfigError(f"{first.name} and {run.name} have different arms; evaluate them with one command")
    records = [record for run in runs for record in run.records]
    return summarise(records, held_out=all(run.held_out for run in runs))


def compare_runs(ours: Sequence[RunEvaluation], theirs: Sequence[RunEvaluation]) -> dict[str, Any]:
    """Return `ours − theirs` for every arm that both groups have; arms that are equal throughout are only named.

    Raises:
        ConfigError: the groups did not read the same pools for the same reward.
    """
    for run in (*ours[1:], *theirs):
        _require_same(ours[0], run)
    if _pools(ours) != _pools(theirs):
        raise ConfigError(
            f"{_names(ours)} and {_names(theirs)} were not evaluated on the same articles and pools (another corpus or "
            "cutting, another number of articles or probes, or other seeds); compare runs of the same seeds"
        )
    a, b = (unit_means([r for run in group for r in run.records], "reward", _unit(ours)) for group in (ours, theirs))
    paired = {arm: [a[arm][unit] - b[arm][unit] for unit in a[arm]] for arm in a if arm in b}
    contrasts = with_holm({arm: contrast(values) for arm, values in paired.items() if any(values)})
    return {
        "unit": "nats per value token",
        "reward_kind": ours[0].reward_kind,
        "ours": [run.name for run in ours],
        "theirs": [run.name for run in theirs],
        "resampled": "article" if _unit(ours) == "article" else "trajectory",
        "articles": len(_articles(ours)),
        "units": len(next(iter(a.values()))),
        "seeds": min(len({r["seed"] for run in group for r in run.records}) for group in (ours, theirs)),
        "contrasts": contrasts,
        "identical": [arm for arm in paired if arm not in contrasts],
    }


def split_groups(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Split `A … vs B …` into two groups; without `vs` there must be two runs.

    Raises:
        ConfigError: it is neither, or a run is named twice.
    """
    if words.count("vs") == 1:
        place = words.index("vs")
        ours, theirs = words[:place], words[place + 1 :]
    else:
        ours, theirs = words[:1], words[1:]
    if not ours or not theirs or "vs" in (*ours, *theirs) or ("vs" not in words and len(words) != 2):
        raise ConfigError("command line: compare needs RUN RUN, or RUN … vs RUN …, each group the seeds of one setting")
    folders = [Path(word) for word in (*ours, *theirs)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("command line: compare: a run is named twice")
    return folders[: len(ours)], folders[len(ours) :]


def _require_same(a: RunEvaluation, b: RunEvaluation) -> None:
    for what, left, right in (
        ("the reward", a.reward_kind, b.reward_kind), ("steps", a.num_steps, b.num_steps),
        ("held-out articles", a.held_out, b.held_out),
    ):  # fmt: skip
        if left != right:
            raise ConfigError(f"{a.name} and {b.name} differ in {what} of their evaluations: {left} and {right}")


def _articles(group: Sequence[RunEvaluation]) -> set[str]:
    return {r["article"] for run in group for r in run.records}


def _pools(group: Sequence[RunEvaluation]) -> set[tuple[str, str]]:
    return {(r["article"], r["pool"]) for run in group for r in run.records}


def _unit(group: Sequence[RunEvaluation]) -> str:
    """Return the field that names the unit of resampling."""
    return "article" if len(_articles(group)) > 1 else "index"


def _names(group: Sequence[RunEvaluation]) -> str:
    return ", ".join(run.name for run in group)
