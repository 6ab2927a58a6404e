"""Settings from files: TOML or YAML, tables for the parts of a dotted name, on the way to `config.override`."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.cli.recipes import parse_settings
from tandem.config import flatten, parsed, render
from tandem.errors import ConfigError

FORMATS = (".toml", ".yaml", ".yml")
SHOWN = 12  # settings that a line names


class Verbatim(str):
    """A value that YAML writes without quotes: read by the setting's own type, as after --set."""


def assignments(config: Any, files: Iterable[Path], texts: Iterable[str]) -> dict[str, str]:
    """Dotted name -> text of `files`, then of `texts` (name=value); of one name the last counts."""
    assigned: dict[str, str] = {}
    for path in files:
        assigned |= read_file(path, config)
    return assigned | parse_settings(texts)


def say_unused(verb: str, names: Iterable[str], used: Sequence[str], but: Sequence[str], why: str) -> None:
    """A line on stderr for the settings that a verb was given and has no use for: it looks as if they had been heard.

    used: settings, and tables of them with a dot at the end, of which it does not use `but`.
    """
    heard = [name for name in names if name.startswith(tuple(used)) and name not in but]
    left = sorted({*names}.difference(heard))
    if left:
        shown = ", ".join(left[:SHOWN]) + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
        print(f"tandem {verb} has no use for {shown}: {why}.", file=sys.stderr)


def say_unread(config: Any, names: Iterable[str]) -> None:
    """A line on stderr for each reason for which training by `config` does not read some of `names`."""
    from tandem.run.unread import unread

    for why, left in unread(config, names).items():
        say_unused("train", left, (), (), why)


def read_file(path: Path, config: Any, flag: str = "--config") -> dict[str, str]:
    """Dotted name -> text of a file's settings. ConfigError where it cannot be read, says a thing twice, or what
    `config` does not take."""
    return _settings(_tree(path, flag), config, f"{flag} {path}")


def read_tables(path: Path, config: Any, flag: str) -> dict[str, dict[str, str]]:
    """Name of each table of a file -> its settings, as of `read_file`. ConfigError where something else is in it."""
    tree = _tree(path, flag)
    if not tree:
        raise ConfigError(f"{flag} {path} is empty. Write a table of settings for each name: [name] and lines below.")
    for name, table in tree.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{flag} {path}: {name} stands in no table. Write [a name] above its settings.")
    return {name: _settings(table, config, f"{flag} {path} [{name}]") for name, table in tree.items()}


def _tree(path: Path, flag: str) -> Mapping[str, Any]:
    """What a file holds, by name."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{flag} {path}: the name must end in {', '.join(FORMATS)}, which says how it is written.")
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        tree = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{flag} {path} holds no settings. Write name: value, or tables of them.")
    return tree


def _settings(tree: Mapping[str, Any], config: Any, where: str) -> dict[str, str]:
    leaves, settings = flatten(config), dict[str, str]()
    for name, value in _leaves(tree, "", leaves):
        if name in settings:
            raise ConfigError(f"{where} sets {name} twice. Drop one.")
        try:
            settings[name] = _text(value, False)
        except TypeError as error:
            raise ConfigError(f"{where}: {name} is {error}, which no setting takes. Quote it.") from error
    try:
        parsed(config, settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return settings


def _leaves(tree: Mapping[str, Any], prefix: str, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value); a table is a value only where a setting has its name, as task.parameters does."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            yield from _leaves(value, f"{name}.", known)
        else:
            yield name, value


def _text(value: Any, inside: bool) -> str:
    """What --set would be given for a value; TypeError for a date or a time."""
    if isinstance(value, Verbatim):
        split = inside and (set(value) & set(',="()[]\\') or value.strip() != value)  # YAML strips ASCII blanks alone
        return json.dumps(value) if split else str(value)
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(name)}={_text(entry, True)}" for name, entry in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = [_text(entry, True) for entry in value]
    elif value is None or isinstance(value, str | int | float):
        return render(value, inside)
    else:
        raise TypeError(f"the {type(value).__name__} {value}")
    return f"({','.join(parts)})"


def _yaml(text: str) -> Any:
    """The tree of a YAML text; ValueError where it is none, or has a key twice.

    From its nodes: PyYAML's loaders make a truth value of an `off`, a text of a 1e-5, and keep the last of two keys.
    """
    import yaml

    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None):  # few nested ones stand for more than any memory
                raise ValueError(f"line {event.start_mark.line + 1}: no & or * of YAML here; write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if node is None else _value(node)


def _value(node: Any) -> Any:
    if node.id == "mapping":
        tree: dict[str, Any] = {}
        for key, value in node.value:
            if key.id != "scalar" or key.value in tree:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is no name, or was there before")
            tree[key.value] = _value(value)
        return tree
    if node.id == "sequence":
        return [_value(entry) for entry in node.value]
    if node.style is None:
        return None if node.value in ("", "~", "null") else Verbatim(node.value)
    return node.value
