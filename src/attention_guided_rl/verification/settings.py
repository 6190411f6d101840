"""Settings: what config.yaml asks of a run, read as plain YAML."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_guided_rl.errors import CheckpointError, ConfigError
from attention_guided_rl.run_settings import read_settings
from attention_guided_rl.storage import run_config

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Nats per value token: sums of logged numbers, and of a prior that another batch has computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the files of a run are checked against."""

    updates: int
    articles: int
    trajectories: int
    steps: int | None
    """None: whatever the first trajectory has; so too for `num_pairs`."""
    num_pairs: int | None
    query_tokens: int
    value_tokens: int
    trajectories_every: int
    reward: str
    scorer: str
    pick: str
    seed: int
    evaluation_articles: int
    evaluation_reward: str
    oracle: bool
    tolerance: float

    @property
    def rows(self) -> int:
        """Trajectories of an update."""
        return self.articles * self.trajectories


def read_asked(folder: Path, overrides: Mapping[str, Any]) -> Asked:
    """Read config.yaml; `overrides` are those that the evaluation was given.

    Raises:
        ConfigError: this is no run folder, or an override is not of the evaluation.
        CheckpointError: config.yaml does not say what is needed.
    """
    for key in overrides:
        if not key.startswith("evaluation."):
            raise ConfigError(f"command line: --{key} cannot be set for what has been run; only evaluation.* can")
    path = run_config(folder)
    try:
        settings = {**read_settings(folder), **overrides}
        reward, evaluation_reward = str(settings["reward.kind"]), settings["evaluation.reward"]
        return Asked(
            updates=_count(settings, "training.updates"),
            articles=_count(settings, "rollout.articles"),
            trajectories=_count(settings, "rollout.trajectories"),
            steps=_count_or_auto(settings, "rollout.steps"),
            num_pairs=_count_or_auto(settings, "pairs.num_pairs"),
            query_tokens=_count(settings, "rollout.query_tokens"),
            value_tokens=_count(settings, "pairs.value_tokens"),
            trajectories_every=_count(settings, "log.trajectories_every"),
            reward=reward,
            scorer=str(settings["reward.scorer"]),
            pick=str(settings["reward.pick"]),
            seed=_count(settings, "training.seed"),
            evaluation_articles=_count(settings, "evaluation.articles"),
            evaluation_reward=reward if evaluation_reward is None else str(evaluation_reward),
            oracle=bool(settings["evaluation.oracle"]),
            tolerance=TOLERANCE[settings["model.dtype"]],
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no usable {error.args[0]}") from None


def _count(settings: Mapping[str, Any], key: str) -> int:
    value = settings[key]
    if type(value) is not int or value < 0:
        raise TypeError(f"{key}: {value!r}")
    return value


def _count_or_auto(settings: Mapping[str, Any], key: str) -> int | None:
    return None if settings[key] == "auto" else _count(settings, key)
