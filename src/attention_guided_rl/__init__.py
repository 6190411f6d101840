"""Attention-guided reinforcement learning: a language model learns to direct its own reading."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention_guided_rl.config_files import load_config
    from attention_guided_rl.ordering import score_order
    from attention_guided_rl.runs import evaluate, rollout, train

__all__ = ["evaluate", "load_config", "rollout", "score_order", "train"]

_HOMES = {
    "load_config": "config_files",
    "train": "runs",
    "evaluate": "runs",
    "rollout": "runs",
    "score_order": "ordering",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
