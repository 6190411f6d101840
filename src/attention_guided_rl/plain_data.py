"""Plain data: YAML and JSON from anybody, as plain values in bounded time and memory.

In: text. Out: dicts, lists, strings, numbers, dates, booleans and None, or a ValueError that says in a few words why
not.
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml

MAX_YAML = 2**17  # characters; parsing takes a second for that many, or four where lists are deeply nested
MAX_SHOWN = 200  # characters of a value in a message


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, as `parse_yaml`; it may be a pipe, or have no end.

    Raises:
        OSError: it cannot be read.
        ValueError: it cannot be used.
    """
    with path.open("rb") as file:
        data = file.read(4 * MAX_YAML + 1)  # UTF-8 takes at most 4 bytes a character
    try:
        return parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML document holds; tags name plain types only, so nothing is run.

    Raises:
        ValueError: it is broken, holds what is no plain value, or is too large, its aliases written out.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"longer than {MAX_YAML:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node) > 2 * MAX_YAML:  # a value has a character
            raise ValueError("its aliases stand for too much, or for what holds them")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}broken YAML: {problem or 'cannot parse'}") from None
    except RecursionError:
        raise ValueError("broken YAML: nested too deeply") from None
    except (KeyError, AttributeError, TypeError, OverflowError) as error:  # of PyYAML, where a tag and its value differ
        raise ValueError(f"broken YAML: a value that its tag does not allow ({type(error).__name__})") from None


def _written_out(document: yaml.Node) -> float:
    """Return the number of characters and values with every alias written out; infinite if one holds itself."""
    sizes: dict[int, float] = {}
    waiting = [(document, False)]
    while waiting:
        node, parts_are_counted = waiting.pop()
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.ScalarNode):
            sizes[id(node)] = 1 + len(node.value)
        elif parts_are_counted:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
        elif id(node) not in sizes:
            sizes[id(node)] = math.inf  # until then
            waiting += [(node, True), *((part, False) for part in parts)]
    return sizes[id(document)]


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON document holds.

    Raises:
        ValueError: it is broken, not UTF-8 or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def shown(value: Any) -> str:
    """Return a value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
