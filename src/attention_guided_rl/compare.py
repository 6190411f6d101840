"""Compare: runs against runs, from their evaluation.jsonl, article by article. Loads no model.

In: run folders that have been evaluated. Out: for every arm the paired difference of two groups of runs, seeds nested
in articles. Runs that did not read the same pools for the same reward are refused, for their difference means nothing;
so are groups whose runs are not seeds of one setting.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat

from attention_guided_rl.errors import ConfigError
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.run_settings import SCORING, differences, read_settings, require_seeds_of_one_setting
from attention_guided_rl.summary import contrast, seed_means, summarise, unit_means, with_holm


class _Line(BaseModel):
    """What is needed of a line of evaluation.jsonl; further keys are left alone."""

    arm: str
    article: str
    pool: str
    index: int
    seed: int
    update: int
    reward_kind: str
    scoring: str
    reward: FiniteFloat
    subjects: FiniteFloat | None
    probe_curve: list[FiniteFloat] | None


@dataclass(frozen=True, slots=True)
class RunEvaluation:
    """What evaluation.jsonl and evaluation.json of a run hold, and its settings by dotted key."""

    name: str
    records: tuple[dict[str, Any], ...]
    held_out: bool
    settings: Mapping[str, Any]

    @property
    def reward_kind(self) -> str:
        """The reward that the arms were compared by."""
        return str(self.records[0]["reward_kind"])

    @property
    def scoring(self) -> str:
        """Names how values were scored."""
        return str(self.records[0]["scoring"])

    @property
    def update(self) -> int:
        """The update whose checkpoint was evaluated."""
        return int(self.records[0]["update"])

    @property
    def arms(self) -> dict[str, None]:
        """The arms that were run, in order."""
        return dict.fromkeys(r["arm"] for r in self.records)


def read_evaluation(folder: Path) -> RunEvaluation:
    """Read what the evaluation of a run left.

    Raises:
        ConfigError: the run has not been evaluated, or by a version that left less.
    """
    try:
        lines = (folder / "evaluation.jsonl").read_bytes().splitlines()
        records = tuple(_Line.model_validate(parse_json(line)).model_dump() for line in lines)
        held_out = bool(parse_json((folder / "evaluation.json").read_bytes())["held_out"])
    except OSError:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a run folder (there is no such folder)") from None
        raise ConfigError(f"{folder} has no evaluation; run agrl evaluate {folder} first") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}: its evaluation cannot be read; run agrl evaluate {folder} again") from None
    read: dict[str, set[tuple[int, str]]] = {}
    for record in records:
        read.setdefault(record["arm"], set()).add((record["index"], record["article"]))
    if len(set(map(frozenset, read.values()))) != 1:  # every arm reads every article
        raise ConfigError(f"{folder}: its evaluation is incomplete; run agrl evaluate {folder} again")
    return RunEvaluation(folder.name, records, held_out, read_settings(folder))


def summarise_seeds(runs: Sequence[RunEvaluation]) -> dict[str, Any]:
    """Summarise runs as seeds of one configuration.

    Raises:
        ConfigError: they differ in more than their seed, or were not evaluated alike.
    """
    _require_seeds(runs)
    records = [record for run in runs for record in run.records]
    return summarise(records, held_out=all(run.held_out for run in runs))


def compare_runs(ours: Sequence[RunEvaluation], theirs: Sequence[RunEvaluation]) -> dict[str, Any]:
    """Return `ours − theirs` for every arm that both groups have; arms that are equal throughout are only named.

    Raises:
        ConfigError: a group is not seeds of one setting, or the groups did not read the same pools for the same reward.
    """
    _require_seeds(ours)
    _require_seeds(theirs)
    _require_same(ours[0], theirs[0])
    our_seeds, their_seeds = (sorted({r["seed"] for run in group for r in run.records}) for group in (ours, theirs))
    if our_seeds != their_seeds:
        warnings.warn(
            f"training seeds {_list(our_seeds)} minus {_list(their_seeds)}: the evaluation's random numbers follow the "
            "seed, so a part of the difference is luck of the draw; better compare runs of the same seeds",
            stacklevel=2,
        )
    a, b = (unit_means([r for run in group for r in run.records], "reward", _unit(ours)) for group in (ours, theirs))
    if any(a[arm].keys() != b[arm].keys() for arm in a if arm in b):
        raise ConfigError(
            f"{ours[0].name} and {theirs[0].name} do not have the same trajectories on their article; evaluate both "
            "with the same evaluation.* settings"
        )
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
        "seeds": min(len(our_seeds), len(their_seeds)),
        "contrasts": contrasts,
        "identical": [arm for arm in paired if arm not in contrasts],
        "by_seed": _trained_by_seed(ours, theirs) if our_seeds == their_seeds else [],
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


def _require_seeds(group: Sequence[RunEvaluation]) -> None:
    """Refuse a group whose runs are not seeds of one setting, evaluated alike."""
    require_seeds_of_one_setting([(run.name, run.settings) for run in group])
    first, *others = group
    for run in others:
        _require_same(first, run)
        if run.update != first.update:
            raise ConfigError(
                f"{first.name} and {run.name} are not seeds of one setting: evaluated at update {first.update} and "
                f"{run.update}"
            )
        for has, lacks in ((first, run), (run, first)):
            missing = [arm for arm in has.arms if arm not in lacks.arms]
            if missing:
                raise ConfigError(
                    f"{lacks.name} lacks the arm {missing[0]}, which {has.name} has; evaluate them with one command"
                )


def _require_same(a: RunEvaluation, b: RunEvaluation) -> None:
    """Refuse two runs whose rewards cannot be subtracted."""
    for what, left, right in (
        ("the reward", a.reward_kind, b.reward_kind),
        ("held-out articles", a.held_out, b.held_out),
    ):
        if left != right:
            raise ConfigError(f"{a.name} and {b.name} differ in {what} of their evaluations: {left} and {right}")
    if a.scoring != b.scoring:
        found = [d for d in differences(a.settings, b.settings) if d[0].startswith(SCORING)]
        what = "evaluate both with the same evaluation.* settings"
        if found:
            what = "{} is {!r} and {!r}".format(*found[0])
        raise ConfigError(f"{a.name} and {b.name} were scored in different ways and cannot be subtracted: {what}")
    if _pools([a]) != _pools([b]):
        raise ConfigError(
            f"{a.name} and {b.name} were not evaluated on the same articles and pools (another corpus, or another "
            "number of articles or probes); evaluate both with the same evaluation.* settings"
        )


def _trained_by_seed(ours: Sequence[RunEvaluation], theirs: Sequence[RunEvaluation]) -> list[float]:
    """Return each seed's difference of the arm `trained`; empty if a group lacks it."""
    a, b = (seed_means([r for run in group for r in run.records]) for group in (ours, theirs))
    return [a[s]["trained"] - b[s]["trained"] for s in a if "trained" in a[s] and "trained" in b[s]]


def _articles(group: Sequence[RunEvaluation]) -> set[str]:
    return {r["article"] for run in group for r in run.records}


def _pools(group: Sequence[RunEvaluation]) -> set[tuple[str, str]]:
    return {(r["article"], r["pool"]) for run in group for r in run.records}


def _unit(group: Sequence[RunEvaluation]) -> str:
    """Return the field that names the unit of resampling."""
    return "article" if len(_articles(group)) > 1 else "index"


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
