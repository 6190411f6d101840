"""Run settings: in what two configurations may differ, when a run goes on and when runs are seeds of one setting.

In: configurations as plain values, config.yaml of run folders. Out: values by dotted key, and refusals. Loads no model.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attention_guided_rl.config import Config
from attention_guided_rl.config_files import config_to_dict, load_config
from attention_guided_rl.errors import ConfigError, UnsafeError
from attention_guided_rl.plain_data import read_yaml
from attention_guided_rl.storage import run_config

_CHANGES_NO_TRAINING = (
    *("training.checkpoint_every", "training.keep_checkpoints", "training.device", "log.", "evaluation.", "network."),
    *("embedder.max_usd", "embedder.usd_per_million_tokens", "embedder.send_local_text", "embedder.device"),
)
MAY_CHANGE_ON_RESUME = ("training.updates", *_CHANGES_NO_TRAINING)
MAY_DIFFER_AMONG_SEEDS = ("training.seed", *_CHANGES_NO_TRAINING)
SCORING = (
    *("model.name", "model.revision", "template.", "pairs.", "rollout.query_tokens", "rollout.steps"),
    *("reward.query_in_context", "evaluation.num_probes"),
)
"""What a number of the evaluation means, beside the reward's kind."""
TAKE_CODE = ("kind", "reward")  # last names of the settings that may be `package.module:name`

logger = logging.getLogger(__name__)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a run's settings by dotted key.

    Raises:
        ConfigError: this is no run folder, or its config.yaml cannot be read.
    """
    path = run_config(folder)
    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: not a configuration")
    return flatten(settings)


def load_run_config(folder: Path, files: Sequence[Path] = (), overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of a run, changed by files and overrides; say what code it asks for.

    Raises:
        ConfigError: it cannot be used.
        UnsafeError: that code lies in the run folder itself, which may be from anywhere.
    """
    config = load_config(files=[run_config(folder), *files], overrides=overrides)
    for key, name in flatten(config_to_dict(config)).items():
        if key.rpartition(".")[2] not in TAKE_CODE or ":" not in str(name):
            continue
        found = importlib.util.find_spec(name.partition(":")[0].partition(".")[0] or " ")
        places = [] if found is None else [found.origin or "", *(found.submodule_search_locations or ())]
        if any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places if place):
            raise UnsafeError(f"{key}: {name!r} would be imported from the run folder {folder}; refused")
        logger.warning("%s asks for code of yours: %s %s, from %s", folder, key, name, next(iter(places), "nowhere"))
    return config


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value in a, value in b) where they differ, by key; a key that one lacks is None there."""
    keys = sorted(a.keys() | b.keys())
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def require_seeds_of_one_setting(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse runs, each a name and its settings, that differ in more than the training seed, or not in that.

    Raises:
        ConfigError: naming two runs, and the first key that differs with both values.
    """
    name_of: dict[str, str] = {}
    first, settings = runs[0]
    for name, others in runs:
        for key, left, right in differences(settings, others):
            if not key.startswith(MAY_DIFFER_AMONG_SEEDS):
                raise ConfigError(
                    f"{first} and {name} are not seeds of one setting: {key} is {left!r} and {right!r}; "
                    "agrl compare takes A … vs B … for two settings"
                )
        seed = str(others.get("training.seed"))  # which may be anything, in a file that somebody else wrote
        if seed in name_of:
            raise ConfigError(f"{name_of[seed]} and {name} both have training.seed {seed}: they are no two seeds")
        name_of[seed] = name
