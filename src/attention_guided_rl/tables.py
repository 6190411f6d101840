"""Tables: the four places open to extension are dicts of names, and any name may be `package.module:name` instead."""

import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import TypeVar

from attention_guided_rl.errors import ConfigError, UnsafeError

Entry = TypeVar("Entry")


def resolve(table: Mapping[str, Entry], name: str, key: str) -> Entry:
    """Look a name up in an open table, or import it if it is `package.module:name`.

    Raises:
        ConfigError: neither; the message names the key and the nearest entry.
        UnsafeError: it is of the standard library, where nothing is made for this, and `os:system` is dangerous.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.partition(":")
    if attribute and module.partition(".")[0] in sys.stdlib_module_names:
        raise UnsafeError(f"{key}: {name!r} is of Python's standard library; refused")
    if attribute:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{key}: cannot import {name!r}: {error}") from None
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
    raise ConfigError(f"{key}: unknown {name!r}; nearest is {near[0]!r} (or give package.module:name)")
