"""Summary: evaluation.json from the lines of evaluation.jsonl alone. The unit is the article, seeds nested within it.

In: records of one run or of several seeds. Out: arms, contrasts with intervals, and what they answer. No model and no
tensor is needed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attention_guided_rl.statistics import bootstrap_mean, holm, sign_flip_p, smallest_detectable

CONTRASTS: dict[str, dict[str, int]] = {
    **{
        f"{a}-{b}": {a: 1, b: -1}
        for a, b in (
            ("trained", "untrained"), ("trained", "random"), ("trained", "article_order"), ("trained", "easy_to_hard"),
            ("trained", "nearest_key"), ("trained/key", "untrained/key"), ("trained/key", "random/key"),
            ("trained/key", "article_order/key"), ("trained/key", "easy_to_hard/key"),
            ("trained/key", "nearest_key/key"), ("planted/key", "random/key"),
            ("trained", "trained/none"), ("trained", "trained/shuffled"), ("trained", "trained/fixed"),
        )
    },
    "agreement": {"trained": 1, "trained/untrained": -1, "untrained/trained": -1, "untrained": 1},
    "policy": {"trained@live": 1, "untrained@live": -1},
    "drift": {"untrained@live": 1, "untrained": -1},
}  # fmt: skip
"""Every contrast as signed arms. `agreement`: the text names what was picked (the interaction of picks and text);
`policy` and `drift`: what a live scorer's reward rose by better queries, and by the scorer itself."""
PICKERS = frozenset(arm.partition("@")[0].partition("/")[0] for signs in CONTRASTS.values() for arm in signs) | {
    "oracle"
}
"""Whoever picks in an arm of ours; every other picker is a file of orders."""
MAIN_PAIRS = (("trained", "untrained"), ("trained/key", "untrained/key"))
"""Differences that are given for each seed too."""
GAPS = {"oracle_gap_closed": "oracle", "possible_gap_closed": "planted/possible"}

Values = Mapping[str, Mapping[Any, float]]


def summarise(records: Sequence[Mapping[str, Any]], *, held_out: bool) -> dict[str, Any]:
    """Compute the contents of evaluation.json."""
    unit = "article" if len({r["article"] for r in records}) > 1 else "trajectory"
    values = unit_means(records, "reward", "article" if unit == "article" else "index")
    contrasts = with_holm(
        {
            name: contrast([sum(sign * values[arm][u] for arm, sign in signs.items()) for u in _shared(values, signs)])
            for name, signs in (CONTRASTS | _contrasts_of_files(values)).items()
            if set(signs) <= set(values)
        }
    )
    choice = contrasts.get("trained/key-untrained/key")
    return {
        "unit": "nats per value token",
        "resampled": unit,
        "held_out": held_out,
        "articles": len({r["article"] for r in records}),
        "trajectories": len({r["index"] for r in records}),
        "seeds": sorted({r["seed"] for r in records}),
        "arms": _arms(records, values),
        "contrasts": contrasts,
        "choice_gain": None if choice is None else {k: choice[k] for k in ("mean", "low", "high", "p", "p_holm")},
        **{name: _gap_closed(values, bound) for name, bound in GAPS.items()},
        **_by_seed(records),
    }


def _by_seed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the main differences of every seed, where there are several: intervals over articles leave them out."""
    seeds = seed_means(records)
    if len(seeds) < 2:
        return {}
    pairs = [(a, b) for a, b in MAIN_PAIRS if all({a, b} <= arms.keys() for arms in seeds.values())]
    return {"by_seed": {f"{a}-{b}": [arms[a] - arms[b] for arms in seeds.values()] for a, b in pairs}}


def seed_means(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Return each seed's mean reward of every arm, articles counting equally, by seed."""
    seeds = sorted({r["seed"] for r in records})
    means = {seed: unit_means([r for r in records if r["seed"] == seed], "reward", "article") for seed in seeds}
    return {
        seed: {arm: sum(by_article.values()) / len(by_article) for arm, by_article in arms.items()}
        for seed, arms in means.items()
    }


def _contrasts_of_files(arms: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the contrasts of pickers that are files: their text is not the policy's, so with own-key text."""
    pickers = dict.fromkeys(arm.partition("/")[0] for arm in arms)
    found: dict[str, dict[str, int]] = {}
    for name in pickers:
        if name.partition("@")[0] not in PICKERS:
            key = f"{name}/key"
            found |= {
                f"trained/key-{key}": {"trained/key": 1, key: -1},
                f"{key}-random/key": {key: 1, "random/key": -1},
            }
    return found


def unit_means(records: Sequence[Mapping[str, Any]], field: str, unit: str) -> dict[str, dict[Any, float]]:
    """Average a field by arm and unit, in the order of first appearance."""
    sums: dict[str, dict[Any, list[float]]] = {}
    for record in records:
        sums.setdefault(record["arm"], {}).setdefault(record[unit], []).append(record[field])
    return {arm: {u: sum(v) / len(v) for u, v in by_unit.items()} for arm, by_unit in sums.items()}


def unit_contrast(records: Sequence[Mapping[str, Any]], a: str, b: str) -> dict[str, Any]:
    """Return the paired difference of two arms over articles (over trajectories if there is one article)."""
    unit = "article" if len({r["article"] for r in records}) > 1 else "index"
    return contrast(differences(unit_means([r for r in records if r["arm"] in (a, b)], "reward", unit), a, b))


def differences(values: Values, a: str, b: str) -> list[float]:
    """Return a − b of every unit that both have."""
    return [values[a][unit] - values[b][unit] for unit in _shared(values, (a, b))]


def contrast(paired: Sequence[float]) -> dict[str, Any]:
    """Return mean, interval, p and the smallest effect that these units would have shown (null for a single one)."""
    detectable = smallest_detectable(paired)
    return {
        **asdict(bootstrap_mean(paired)),
        "p": sign_flip_p(paired),
        "smallest_detectable": detectable if math.isfinite(detectable) else None,
    }


def with_holm(contrasts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add `p_holm` to contrasts that are one family."""
    adjusted = holm({name: c["p"] for name, c in contrasts.items()})
    return {name: {**c, "p_holm": adjusted[name]} for name, c in contrasts.items()}


def _shared(values: Values, arms: Sequence[str] | Mapping[str, int]) -> list[Any]:
    """Return the units that all arms have, in the order of the first."""
    first, *others = arms
    return [unit for unit in values[first] if all(unit in values[arm] for arm in others)]


def _arms(records: Sequence[Mapping[str, Any]], values: Values) -> dict[str, dict[str, Any]]:
    """Describe every arm: reward, subjects read and the learning curve of the probes, where there are any."""
    subjects = unit_means([r for r in records if r["subjects"] is not None], "subjects", "article")
    curves: dict[str, list[Sequence[float]]] = {}
    for record in records:
        if record.get("probe_curve") is not None:
            curves.setdefault(record["arm"], []).append(record["probe_curve"])
    arms = {}
    for arm, by_unit in values.items():
        arms[arm] = asdict(bootstrap_mean(list(by_unit.values())))
        if arm in subjects:
            arms[arm]["subjects"] = sum(subjects[arm].values()) / len(subjects[arm])
        if arm in curves:
            curve = [sum(points) / len(points) for points in zip(*curves[arm], strict=True)]
            arms[arm] |= {"probe_curve": curve, "probe_area": area_under(curve)}
    return arms


def area_under(curve: Sequence[float]) -> float:
    """Return the mean over steps 1 … S of what is known beyond step 0: [−3, −2, −1] → 1.5."""
    start, *rest = curve
    return sum(level - start for level in rest) / len(rest)


def _gap_closed(values: Values, bound: str) -> float | None:
    """(trained − untrained) / (bound − untrained), only where the gap has an interval and that is positive."""
    if not {"trained", "untrained", bound} <= set(values):
        return None
    gaps = differences(values, bound, "untrained")
    gap = bootstrap_mean(gaps)
    if len(gaps) < 2 or gap.low <= 0:
        return None
    return bootstrap_mean(differences(values, "trained", "untrained")).mean / gap.mean
