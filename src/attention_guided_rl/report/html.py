"""The page about a run: one self-contained HTML file that asks the network for nothing and trusts no text.

In: a run folder. Out: RUN/report.html. Everything is escaped by the template; what the explorer shows is data in a JSON
block, put on the page as text only; a content security policy allows this page's own script and style by hash and
nothing else. Without scripts the page still has the verdict, the curves and one trajectory.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from attention_guided_rl.errors import CheckpointError
from attention_guided_rl.report import drawing, verdict
from attention_guided_rl.report.log_lines import clean
from attention_guided_rl.report.run_files import RunRecord, is_number, read_run
from attention_guided_rl.secrets import redact
from attention_guided_rl.storage import write_text

_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, and halves of surrogate pairs
_TEMPLATES = Path(__file__).parent / "templates"
_CURVES = {
    "reward/mean": ("Reward", "nats per value token"),
    "loss/kl": ("KL to untrained", "nats per query token"),
    "policy/entropy": ("Policy entropy", "nats per query token"),
    "filter/kept_fraction": ("Kept fraction", "of trajectories"),
    "optimizer/gradient_norm": ("Gradient norm", "before clipping"),
    "selection/query_information": ("Query information", "nats, first step"),
    "selection/entropy": ("Selection entropy", "nats per step"),
}
_OWN_TEXT = "Each reader with its own text"
_KEY_TEXT = "Own-key text: only the choice of pairs differs"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page about a run and return its path.

    Raises:
        ConfigError: this is no run folder.
        CheckpointError: a file of the run cannot be read.
        StorageError: the disk refuses.
    """
    path = out or folder / "report.html"
    write_text(path, render(read_run(folder)))
    return path


def render(record: RunRecord) -> str:
    """Return the page; the same record gives the same bytes."""
    style, script = (Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    page = _template().render(
        run=record,
        name=clean(record.name),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        facts=_facts(record),
        settings=_settings(record),
        evaluation=None if record.summary is None else _evaluation(record.summary),
        curves=[
            (title, unit, drawing.curve(record.metrics[key], title, (0, 1) if key == "filter/kept_fraction" else None))
            for key, (title, unit) in _CURVES.items()
            if key in record.metrics
        ],
        smoothed=any(len(record.metrics.get(key, ())) > drawing.SMOOTHED_FROM for key in _CURVES),
        efficiency=_efficiency(record.probe_curves),
        alarms={name: _ranges(found) for name, found in record.alarms.items() if found},
        guards=_guards(record),
        example=_example(record),
        data=_embed([asdict(article) for article in record.articles]),
    )
    return _NOT_TEXT.sub("\ufffd", page)


@functools.cache
def _template() -> Template:
    """Compile the page's template, which takes longer than to render it."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {"drawing": drawing, "number": verdict.number, "arm_label": verdict.arm_label}
    return environment.get_template("report.html.jinja")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embed(data: Any) -> Markup:
    """Return JSON in which nothing can end the script element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is escaped too
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _evaluation(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said and drawn of an evaluation.

    Raises:
        CheckpointError: evaluation.json is not one of ours.
    """
    try:
        arms, contrasts = summary["arms"], summary["contrasts"]
        _require_numbers([*arms.values(), *contrasts.values()])
        ordered = sorted(arms.items(), key=lambda item: -item[1]["mean"])
        own_key = {arm for arm in arms if arm.endswith("/key") or arm == "oracle"}
        differences = [
            (_difference(name, arms), verdict.verdict(c), c, _equal_text(name, arms)) for name, c in contrasts.items()
        ]
        arm_span, contrast_span = (drawing.scale(list(found.values())) for found in (arms, contrasts))
        return {
            "said": verdict.sentences(summary),
            "caveats": verdict.caveats(summary),
            "groups": [
                (_OWN_TEXT, [item for item in ordered if item[0] not in own_key]),
                (_KEY_TEXT, [item for item in ordered if item[0] in own_key]),
            ],
            "contrasts": [
                (title, [(name, word, c) for name, word, c, equal in differences if equal == equal_text])
                for title, equal_text in ((_OWN_TEXT, False), (_KEY_TEXT, True))
            ],
            "arm_span": arm_span,
            "contrast_span": contrast_span,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"evaluation.json: not as it is written here ({error!r}); run agrl evaluate") from None


def _require_numbers(found: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError if what is drawn or formatted of an arm or a contrast is no number."""
    for name in ("mean", "low", "high", "p_holm", "subjects", "smallest_detectable"):
        for value in (one[name] for one in found if name in one):
            if not (is_number(value) or (name == "smallest_detectable" and value is None)):
                raise TypeError(f"{name} is {value!r}")


def _equal_text(contrast: str, arms: Mapping[str, Any]) -> bool:
    return all(arm.endswith("/key") for arm in verdict.contrast_arms(contrast, arms))


def _difference(contrast: str, arms: Mapping[str, Any]) -> str:
    found = [arm for arm in verdict.contrast_arms(contrast, arms) if arm]
    if _equal_text(contrast, arms):  # which the heading of the group says
        found = [arm.removesuffix("/key") for arm in found]
    return " − ".join(map(verdict.arm_label, found))


def _efficiency(curves: Mapping[str, list[float]]) -> Markup | None:
    own = {arm: curve for arm, curve in curves.items() if "/" not in arm} or dict(curves)
    return drawing.efficiency(own) if own else None


def _ranges(found: list[tuple[int, int]]) -> str:
    shown = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found[:20])
    return f"{shown}, … ({len(found) - 20} more)" if len(found) > 20 else shown


def _guards(record: RunRecord) -> str:
    names = {
        "filter/empty_updates": "without a step",
        "guard/nonfinite_updates": "skipped because a number was not finite",
    }
    found = [f"{record.metrics[n][-1][1]:.0f} {words}" for n, words in names.items() if n in record.metrics]
    return f"Updates: {', '.join(found)}." if found else ""


def _example(record: RunRecord) -> dict[str, Any] | None:
    """Return the first trajectory, drawn without scripts."""
    if not record.articles:
        return None
    article = record.articles[0]
    row = article.rows[0]
    steps = zip(row.queries, row.picks, row.values, row.rewards, strict=True)
    return {
        "article": article,
        "row": row,
        "map": drawing.heat_map(row, article),
        "num_articles": sum(found.phase == "evaluation" for found in record.articles),
        "has_prior": all(value.has_prior for value in row.values),
        "exact": all(value.exact for value in row.values),
        "steps": [
            (query, article.keys[pick], list(zip(value.tokens, value.gains, strict=True)), reward)
            for query, pick, value, reward in steps
        ],
    }


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _corpus(config: Any) -> str:
    if not isinstance(config, Mapping):
        return "the training corpus"
    names = ("kind", "variant" if config.get("kind") == "encyclopedia" else "", "name", "subset", "title", "path")
    found = [str(config[name]) for name in names if config.get(name)]
    found += [f"split {config['split']}"] if config.get("split") not in (None, "all") else []
    found += [f"seed {config.get('seed')}"] if config.get("kind") == "encyclopedia" else []
    return ", ".join(found)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the few facts that stand at the top."""
    config = record.config
    planned = _get(config, "training.updates")
    return [
        ("Model", _show(_get(config, "model.name"))),
        ("Corpus", _show(_corpus(config.get("corpus")))),
        ("Reward", _show(_get(config, "reward.kind"))),
        ("Updates", f"{record.updates} of {planned}" if planned != record.updates else f"{planned}"),
        ("Seed", _show(_get(config, "training.seed"))),
    ]


def _settings(record: RunRecord) -> dict[str, Any]:
    """Return what was run: the settings that matter, the versions, and the whole configuration."""
    config, environment = record.config, record.environment

    def of(pattern: str, *names: str) -> str:
        return _show(pattern.format(*(_get(config, name) for name in names)))

    packages = environment.get("packages")
    versions = {"python": environment.get("python"), **(packages if isinstance(packages, Mapping) else {})}
    episodes = record.metrics.get("episodes", [(0, 0)])[-1][1]
    rows = [
        ("Model", of("{}, {}, {}", "model.name", "model.adapter", "model.dtype")),
        ("Revision", _show(_get(config, "model.revision") or "")),
        ("Training corpus", _show(_corpus(config.get("corpus")))),
        ("Evaluation corpus", _show(_corpus(_get(config, "evaluation.corpus")))),
        ("Pool", of("{} pairs, keys of {} and values of {} tokens, cut by {}",
                    "pairs.num_pairs", "pairs.key_tokens", "pairs.value_tokens", "pairs.cut")),
        ("Trajectories", of("{} articles × {} per update, {} steps, queries of {} tokens", "rollout.articles",
                            "rollout.trajectories", "rollout.steps", "rollout.query_tokens")),
        ("Embedder", of("{} {}", "embedder.kind", "embedder.model").removesuffix(" None")),
        ("Reward", of("{}, scorer {}", "reward.kind", "reward.scorer")),
        ("Objective", of("{}, returns {}, baseline {}, filter {}", "objective.kind", "objective.returns",
                         "objective.advantage_baseline", "objective.filter.kind")),
        ("KL", of("coefficient {}, {}", "objective.kl.coefficient", "objective.kl.estimator")),
        ("Optimiser", of("learning rate {}, {} warm-up updates, gradient norm at most {}", "optimizer.learning_rate",
                         "optimizer.warmup_updates", "optimizer.max_grad_norm")),
        ("Trained", f"{record.updates} updates, {episodes:,.0f} trajectories, seed {_get(config, 'training.seed')}"),
        ("Control", "rewards were shuffled: there is nothing to learn"
         if _get(config, "training.shuffled_rewards") else ""),
        ("Versions", _show(", ".join(f"{name} {version}" for name, version in versions.items() if version))),
        ("Machine", _show(", ".join(str(environment[k]) for k in ("platform", "cuda") if environment.get(k)))),
    ]  # fmt: skip
    shown = {key: value for key, value in config.items() if key != "network"}
    return {
        "rows": [(label, text) for label, text in rows if text],
        "all": redact(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)),
    }


def _show(value: Any) -> str:
    return clean(redact(str(value)))
