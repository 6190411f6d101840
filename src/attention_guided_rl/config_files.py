"""Configuration files: a Config from a preset, YAML files and the command line, and back to YAML.

Later sources win: dataclass defaults < preset < each `--config FILE` < `--section.field VALUE`. Unknown keys are
refused with file, key and nearest name.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from attention_guided_rl.config import Config
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.plain_data import read_yaml, shown

PRESETS = Path(__file__).parent / "configs"
if not PRESETS.is_dir():  # a checkout: the wheel carries a copy of configs/ inside the package
    PRESETS = Path(__file__).parents[2] / "configs"

MAX_INTEGER = 2**64
_CONFIG = TypeAdapter(Config)
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")


def load_config(
    preset: str | None = None, files: Sequence[Path] = (), overrides: Mapping[str, Any] | None = None
) -> Config:
    """Build the configuration from a preset, YAML files (later win) and dotted overrides (win over files).

    With neither preset nor file, the preset is `demo`. Raises ConfigError naming source, key and fix.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if preset is None and not files:
        preset = "demo"
    if preset is not None:
        layers.append((f"preset {preset}", _read_yaml(_preset_path(preset))))
    layers += [(str(path), _read_yaml(Path(path))) for path in files]
    layers.append(("command line", _nest(overrides or {})))

    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, layer in layers:
        _check_keys(layer, Config, source)
        _merge(merged, layer, source, origin)
    try:
        return _CONFIG.validate_python(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(e, origin) for e in error.errors())) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain YAML/JSON values."""
    return {k: _plain(v) for k, v in asdict(config).items()}


def config_to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def text_type(dotted: str) -> type | None:
    """Return str or Path if a field takes that, so that what is typed is not read as YAML; otherwise None."""
    cls: type = Config
    *sections, leaf = dotted.split(".")
    for section in sections:
        cls = _field_types(cls).get(section) or object
        if cls is object:
            return None
    hint = get_type_hints(cls).get(leaf)
    options = () if get_origin(hint) is tuple else (hint, *get_args(hint))
    return next((t for t in options if t in (str, Path)), None)


def dotted_fields(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field that holds a value."""
    for name, nested in _field_types(cls).items():
        if nested is None:
            yield prefix + name
        else:
            yield from dotted_fields(nested, f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _preset_path(name: str) -> Path:
    path = PRESETS / f"{name}.yaml"
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}; the presets are {', '.join(known)}")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections like 'training:', got {type(data).__name__}")
    return data


def _nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"a.b": 1} into {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for dotted, value in overrides.items():
        *sections, leaf = dotted.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"command line: --{dotted}: {section!r} is given a value as well")
        target[leaf] = value
    return nested


def _field_types(cls: type) -> dict[str, type | None]:
    """Map each field to its dataclass type, or None for a value; `X | None` sections count as X."""
    hints = get_type_hints(cls)
    nested = {}
    for f in fields(cls):
        options = get_args(hints[f.name]) or (hints[f.name],)
        nested[f.name] = next((t for t in options if is_dataclass(t) and isinstance(t, type)), None)
    return nested


def _check_keys(data: Mapping[str, Any], cls: type, source: str, prefix: str = "") -> None:
    types = _field_types(cls)
    for key, value in data.items():
        if key not in types:
            valid = [prefix + name for name in types]
            everything = list(dotted_fields())
            typed = f"{prefix}{key}"[:100]  # looking for what is near takes as long as the key is
            near = difflib.get_close_matches(typed, valid, n=1, cutoff=0.5)
            near = near or difflib.get_close_matches(typed, everything, n=1, cutoff=0.0)
            raise ConfigError(f"{source}: unknown key '{prefix}{key}'; nearest is '{near[0]}'")
        if (fault := _fault(value)) is not None:
            raise ConfigError(f"{source}: '{prefix}{key}' {fault}")
        nested = types[key]
        if nested is not None and value is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: '{prefix}{key}' is a section, give its fields (got {shown(value)})")
            _check_keys(value, nested, source, f"{prefix}{key}.")


def _fault(value: Any) -> str | None:
    """Return what makes a value unfit for every field: no file name, tokenizer or float has room for it."""
    if isinstance(value, str) and _NOT_TEXT.search(value):
        return "holds a NUL or half a surrogate pair, which is no text"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"must be between −2^64 and 2^64 (got {shown(value)})"
    if isinstance(value, list):
        return next((fault for fault in map(_fault, value) if fault is not None), None)
    return None


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], source: str, origin: dict[str, str], prefix: str = ""
) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, source, origin, f"{prefix}{key}.")
        else:
            into[key] = value
        origin[prefix + key] = source


def _describe(error: Any, origin: Mapping[str, str]) -> str:
    """Render one pydantic error as `source: key: message`."""
    location = [str(part) for part in error["loc"]]
    while location and ".".join(location) not in origin:  # drop the name of a union's branch
        location.pop()
    key = ".".join(location)
    message = error["msg"].removeprefix("Value error, ")
    source = origin.get(key, "configuration")
    if error["type"] == "value_error":  # our own messages name the field
        return f"{source}: {message}" if key else message
    return f"{source}: {key}: {message} (got {shown(error['input'])})"
