"""Evaluation: every arm on every article once, the same picks behind every text, and a summary that is theirs.

In: evaluation.jsonl, evaluation.json, the evaluation's trajectories. An arm is `picker/text`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.verification.reading import Json, Line
from attention_guided_rl.verification.settings import Asked
from attention_guided_rl.verification.trajectories import ROUNDING, ArmRow

PICKERS = ("trained", "untrained", "random", "article_order", "easy_to_hard", "nearest_key")
"""Whoever reads in every evaluation, with text of its own and with the picked keys as text."""
WRITTEN = ("", "trained", "untrained")
"""Texts that a model wrote in this arm's context: such trajectories are logged."""
Arms = Mapping[str, Sequence[Json]]


def check_records(path: str, lines: Iterable[Line], asked: Asked, update: int) -> dict[str, list[Json]]:
    """Check that every arm has each article once, of this run, update and reward; return the lines by arm.

    Raises:
        CheckpointError: naming the first difference.
    """
    arms: dict[str, list[Json]] = {}
    expected = {"seed": asked.seed, "update": update, "reward_kind": asked.evaluation_reward}
    for line in lines:
        where, record = line.where, line.record
        for name, value in expected.items():
            if record.get(name) != value:
                raise CheckpointError(f"{where}: {name} is {record.get(name)!r}, not {value!r}")
        own = arms.setdefault(str(record.get("arm")), [])
        _check_record(where, record)
        belongs = record["index"] == len(own)
        if str(record.get("arm")).startswith("planted"):  # left out where an article has no subjects
            belongs = not own or record["index"] > own[-1]["index"]
        if not belongs:
            raise CheckpointError(f"{where}: article {record['index']} of arm {record['arm']!r} is not the next")
        own.append(record)
    needed = _needed(arms, asked)
    for arm in [*needed, *arms]:
        if arm not in arms:
            raise CheckpointError(f"{path}: no lines of arm {arm!r}")
        if len(arms[arm]) != asked.evaluation_articles and (arm in needed or not arm.startswith("planted")):
            raise CheckpointError(
                f"{path}: {len(arms[arm])} articles of arm {arm!r}; evaluation.articles asks for "
                f"{asked.evaluation_articles} (agrl verify takes the --evaluation.* that agrl evaluate was given)"
            )
    _check_pairing(path, arms)
    return arms


def check_summary(path: str, summary: Json, arms: Arms) -> None:
    """Check counts, arm means and mean differences of evaluation.json against the lines.

    Raises:
        CheckpointError: naming the first difference.
    """
    records = [record for lines in arms.values() for record in lines]
    articles = {record["article"] for record in records}
    unit = "article" if len(articles) > 1 else "index"
    values = {arm: _unit_means(lines, unit) for arm, lines in arms.items()}
    expected = {
        "articles": len(articles),
        "trajectories": len({record["index"] for record in records}),
        "seeds": sorted({record["seed"] for record in records}),
    }
    for name, value in expected.items():
        if summary.get(name) != value:
            raise CheckpointError(f"{path}: {name} is {summary.get(name)!r}; the lines have {value!r}")
    try:
        if summary["arms"].keys() != values.keys():
            raise CheckpointError(f"{path}: its arms are {sorted(summary['arms'])}; the lines have {sorted(values)}")
        for arm, by_unit in values.items():
            _check_mean(path, f"arm {arm!r}", summary["arms"][arm]["mean"], list(by_unit.values()))
        for name, contrast in summary["contrasts"].items():
            for a, b in ((a, b) for a in values for b in values if f"{a}-{b}" == name):
                paired = [values[a][unit] - values[b][unit] for unit in values[a] if unit in values[b]]
                _check_mean(path, f"contrast {name!r}", contrast["mean"], paired)
        choice, contrast = summary["choice_gain"], summary["contrasts"].get("trained/key-untrained/key")
        if (choice is None) != (contrast is None) or (choice and choice["mean"] != contrast["mean"]):
            raise CheckpointError(f"{path}: choice_gain is not the contrast trained/key-untrained/key")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a summary ({type(error).__name__}: {error})") from None


def check_trajectories_of_arms(path: str, rows: Mapping[str, Sequence[ArmRow]], arms: Arms) -> None:
    """Check that the arms whose text a model wrote have their trajectories, with the same picks and rewards.

    Raises:
        CheckpointError: naming the first difference.
    """
    logged = [arm for arm in arms if arm != "oracle" and "@" not in arm and arm.partition("/")[2] in WRITTEN]
    if set(rows) != set(logged):
        raise CheckpointError(f"{path}: trajectories of the arms {sorted(rows)}; evaluation.jsonl has {sorted(logged)}")
    for arm in logged:
        if len(rows[arm]) != len(arms[arm]):
            raise CheckpointError(
                f"{path}: {len(rows[arm])} trajectories of arm {arm!r}; evaluation.jsonl has {len(arms[arm])}"
            )
        for row, record in zip(rows[arm], arms[arm], strict=True):
            close = abs(row.reward - record["reward"]) <= ROUNDING * max(1.0, abs(row.reward))
            if row.index != record["index"] or row.picks != record["picks"] or not close:
                raise CheckpointError(
                    f"{row.where}: arm {arm!r}, article {row.index!r}, picks {row.picks}, reward {row.reward:.6g}; "
                    f"evaluation.jsonl has article {record['index']}, {record['picks']}, {record['reward']:.6g}"
                )


def _needed(arms: Arms, asked: Asked) -> list[str]:
    """Return the arms that must be there; the planted rule among them where every article has subjects."""
    labelled = all(record["subjects"] is not None for record in arms.get("trained", []))
    pickers = [*PICKERS, *(["planted"] if labelled else [])]
    return [*(arm for name in pickers for arm in (name, f"{name}/key")), *(["oracle"] if asked.oracle else [])]


def _check_record(where: str, record: Json) -> None:
    """Check one line by itself."""
    reward, picks = record.get("reward"), record.get("picks")
    if type(reward) is not float:
        raise CheckpointError(f"{where}: reward {reward!r}")
    if not isinstance(picks, list) or len({repr(pick) for pick in picks}) != len(picks):
        raise CheckpointError(f"{where}: picks {picks!r}: a pair is read twice")
    if type(record.get("index")) is not int:
        raise CheckpointError(f"{where}: index {record.get('index')!r}")
    for name in ("article", "pool", "subjects"):
        if name not in record:
            raise CheckpointError(f"{where}: no {name}")


def _check_pairing(path: str, arms: Arms) -> None:
    """Check that an article is the same for all arms, and that a picker's picks are the same whatever the text."""
    pools: dict[int, Any] = {}
    for arm, records in arms.items():
        owner = arm.partition("@")[0].partition("/")[0]
        picks = {record["index"]: record["picks"] for record in arms.get(owner, records)}
        for record in records:
            index, pool = record["index"], (record["article"], record["pool"])
            if pools.setdefault(index, pool) != pool:
                raise CheckpointError(f"{path}: arm {arm!r} has another article or pool at {index} than other arms")
            if picks.get(index) != record["picks"]:
                raise CheckpointError(f"{path}: arm {arm!r} has other picks of article {index} than {owner!r}")


def _unit_means(records: Sequence[Json], unit: str) -> dict[Any, float]:
    values: dict[Any, list[float]] = {}
    for record in records:
        values.setdefault(record[unit], []).append(record["reward"])
    return {name: sum(some) / len(some) for name, some in values.items()}


def _check_mean(path: str, name: str, said: float, values: Sequence[float]) -> None:
    mean = sum(values) / len(values)
    if not abs(said - mean) <= 1e-9 * max(1.0, abs(mean)):
        raise CheckpointError(f"{path}: the mean of {name} is {said!r}; the lines have {mean!r}")
