"""Verdicts: what an evaluation allows to be said, in words. A difference that is not shown is not claimed."""

from collections.abc import Iterable, Mapping
from typing import Any


def verdict(contrast: Mapping[str, float]) -> str:
    """Name a direction only if the interval excludes 0 and the adjusted p is below 0.05 (few units bootstrap badly)."""
    if contrast["p_holm"] < 0.05 and contrast["low"] > 0:
        return "better"
    if contrast["p_holm"] < 0.05 and contrast["high"] < 0:
        return "worse"
    return "no difference shown"


def arm_label(arm: str) -> str:
    """Return an arm's name as a person reads it."""
    picker, _, text = arm.partition("/")
    words = picker.replace("_", " ")
    return f"{words}, {'own-key' if text == 'key' else text} text" if text else words


def contrast_arms(name: str, arms: Iterable[str]) -> tuple[str, str]:
    """Return the two arms of a contrast `a-b`; an arm's name may have a hyphen itself."""
    known, parts = set(arms), name.split("-")
    for cut in range(1, len(parts)):
        a, b = "-".join(parts[:cut]), "-".join(parts[cut:])
        if a in known and b in known:
            return a, b
    return name, ""


def number(value: float, form: str = "+.3f") -> str:
    """Format a number with a real minus sign."""
    return format(value, form).replace("-", "−")


def with_interval(contrast: Mapping[str, float]) -> str:
    """Return a difference with its interval."""
    return f"{number(contrast['mean'])} [{number(contrast['low'])}, {number(contrast['high'])}]"


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Say what an evaluation shows: the main comparison, then choice, simple readers and oracle."""
    contrasts, seeds = summary["contrasts"], summary["seeds"]
    who = "this run’s policy" if len(seeds) == 1 else f"the policies of {len(seeds)} seeds"
    where = f"{summary['articles']} {'held-out articles' if summary['held_out'] else 'articles it was trained on'}"
    said = []
    if main := contrasts.get("trained-untrained"):
        said.append(f"On {where}, {_main(who, main)} {summary['unit']}.")
    else:
        said.append(f"On {where}, the policy was not compared with the untrained model.")
    if choice := contrasts.get("trained/key-untrained/key"):
        said.append(
            f"With the text held equal, so that only the choice of pairs differs: {with_interval(choice)}; "
            f"{_choice(verdict(choice))}."
        )
    for ending, about in _BESIDE.items():
        pairs = [(b.removesuffix(ending), c) for (a, b), c in _pairs(summary) if a == f"trained{ending}"]
        readers = {b: c for b, c in pairs if b not in ("", "untrained") and "/" not in b}
        groups = {word: [arm_label(b) for b, c in readers.items() if verdict(c) == word] for word in _AGAINST}
        parts = [f"{_AGAINST[word]} {_list(names)}" for word, names in groups.items() if names]
        if parts:
            said.append(f"{about}: {'; '.join(parts)}.")
    if (closed := summary.get("oracle_gap_closed")) is not None:
        said.append(f"It closes {number(closed, '.0%')} of the gap between the untrained model and the greedy oracle.")
    return said


def caveats(summary: Mapping[str, Any]) -> list[str]:
    """Say what the evaluation cannot show."""
    seeds, found = summary["seeds"], []
    if len(seeds) == 1:
        found.append(f"One training seed ({seeds[0]}): these numbers are about this run, not about the method.")
    if not summary["held_out"]:
        found.append("The articles were trained on, with fresh trajectories: nothing is shown about new articles.")
    if summary.get("resampled") == "trajectory":
        found.append("There is one article: intervals are over its trajectories, and say nothing about others.")
    elif summary["articles"] < 20:
        found.append(f"{summary['articles']} articles are few: intervals from so few are too narrow.")
    return found


_BESIDE = {
    "": "Beside simple readers, which stand with the untrained model’s text",
    "/key": "Choices beside those of simple readers, with the text held equal",
}
_AGAINST = {"better": "better than", "no difference shown": "no difference shown from", "worse": "worse than"}


def _pairs(summary: Mapping[str, Any]) -> list[tuple[tuple[str, str], Mapping[str, float]]]:
    return [(contrast_arms(name, summary["arms"]), c) for name, c in summary["contrasts"].items()]


def _main(who: str, contrast: Mapping[str, float]) -> str:
    word, shown = verdict(contrast), with_interval(contrast)
    if word == "no difference shown":
        why = "the interval holds 0" if contrast["low"] <= 0 <= contrast["high"] else "p is not below 0.05 after Holm"
        return f"no difference is shown between {who} and the untrained model ({why}): {shown}"
    verb = "reads" if who.startswith("this") else "read"
    return f"{who} {verb} {word} than the untrained model: {shown}"


def _choice(word: str) -> str:
    return word if word == "no difference shown" else f"the choices by themselves are {word}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
