"""Frozen config dataclasses: override by dotted name, dump, load, flatten, diff.

A config is a frozen dataclass whose fields are `bool`, `int`, `float`, `str`, an `Enum`, a `Literal`, `None`, unions of
those, tuples of them (`tuple[int, ...]`, `tuple[int, str]`, pairs `tuple[tuple[str, int | str], ...]`), or further
config dataclasses, which may be optional. Each default is written once, in its own class; none is here. So is the range
of a number, `Annotated[int, Ge(1)]`, which `section` has checked, as the names of a `Literal` are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from annotated_types import Ge, Interval

from tandem.errors import ConfigError, nearest

C = TypeVar("C")
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
AboveZero = Annotated[float, Interval(gt=0, lt=math.inf)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Share = Annotated[float, Interval(ge=0, le=1)]
JSON = Any  # what json.loads returns

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


class _Mismatch(ValueError):
    """A value does not fit a field's type; the caller adds the dotted name."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Type of each field, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _config_class(hint: Any) -> type | None:
    """The config class among the alternatives, or None."""
    return next((member for member in _members(hint) if _is_config(member)), None)


def section(name: str) -> Callable[[type[C]], type[C]]:
    """Under `@dataclass`: the setting `name`.field is checked against the range or names that the field declares,
    before the class's own `__post_init__`, which checks the fields against each other.
    """

    def declare(cls: type[C]) -> type[C]:
        own = cls.__dict__.get("__post_init__", lambda config: None)

        def check(config: Any) -> None:
            _check(config, f"{name}." if name else "")
            own(config)

        cls.__post_init__ = check  # type: ignore[attr-defined]
        return cls

    return declare


@cache
def limits(cls: Any) -> dict[str, tuple[dict[str, float], tuple[Any, ...]]]:
    """Field -> (its range as {"ge": 0, "lt": 1} and the like, its Literal's names); of a tuple's parts."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        members = _members(get_args(hint)[0] if get_origin(hint) is tuple else hint)
        words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
        found[name] = (_bounds(members), tuple(words))
    return found


def _bounds(members: Sequence[Any]) -> dict[str, float]:
    marks = [dataclasses.asdict(mark) for member in members for mark in getattr(member, "__metadata__", ())]
    return {key: bound for mark in marks for key, bound in mark.items() if bound is not None}


def _check(config: Any, prefix: str) -> None:
    """ConfigError for the first value outside of what its field declares."""
    cls: Any = type(config)
    for name, (bounds, words) in limits(cls).items():
        value = getattr(config, name)
        if value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if words and one not in words:
                close = nearest(str(one), map(str, words))
                close = close if close.startswith(" Did") else ""
                raise ConfigError(f"{prefix}{name} is {one!r}. Allowed: {', '.join(map(str, words))}.{close}")
            if not all(getattr(operator, key)(one, bound) for key, bound in bounds.items()):
                none = ", or none" if type(None) in _members(_hints(cls)[name]) else ""
                raise ConfigError(f"{prefix}{name} is {one}. Allowed: {_range(bounds)}{none}.")


def _range(bounds: Mapping[str, float]) -> str:
    """
    >>> _range({"ge": 0, "le": 1}), _range({"gt": 0, "lt": math.inf})
    ('0 to 1', 'a finite number, above 0')
    """
    if bounds.keys() == {"ge", "le"}:
        return f"{bounds['ge']} to {bounds['le']}"
    words = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    finite = ["a finite number"] if bounds.get("lt") == math.inf else []
    return ", ".join(
        finite + [word.format(bounds[key]) for key, word in words.items() if abs(bounds.get(key, math.inf)) < math.inf]
    )


def describe(hint: Any) -> str:
    """What a field accepts, in words for an error message.

    >>> describe(tuple[int, ...]), describe(Literal["a", "b"]), describe(float | None)
    ('a,b,c of an integer of 64 bits', "one of 'a', 'b'", 'float or none')
    """
    members = _members(hint)
    if get_origin(hint) is Annotated:
        return f"{describe(get_args(hint)[0])}, {_range(_bounds(members))}"
    if len(members) > 1:
        return " or ".join(describe(member) for member in members)
    if hint is type(None) or hint is None:
        return "none"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(hint))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            pair = _pair(args[0])
            return f"name=value,... of {describe(pair[1])}" if pair else f"a,b,c of {describe(args[0])}"
        return "(" + ", ".join(describe(arg) for arg in args) + ")"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    if hint is int:
        return "an integer of 64 bits"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _pair(hint: Any) -> tuple[Any, Any] | None:
    """(str, value type) where the hint is tuple[str, X], which is written name=value."""
    args = get_args(hint)
    if get_origin(hint) is tuple and len(args) == 2 and args[0] is str and args[1] is not Ellipsis:
        return args[0], args[1]
    return None


def _unquoted(text: str) -> Iterator[tuple[int, str, int]]:
    """(index, character, bracket depth after it) of each character outside "double quotes"."""
    depth, quoted, escaped = 0, False, False
    for index, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
            continue
        quoted = char == '"'
        depth += (char in "([") - (char in ")]")
        yield index, char, depth


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside "double quotes" and (nested brackets)."""
    cuts = [index for index, char, depth in _unquoted(text) if char == separator and depth == 0]
    return [text[start + 1 : end] for start, end in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


def _bracketed(text: str) -> bool:
    """True where the first character opens a bracket that the last one closes."""
    if text[:1] + text[-1:] not in ("()", "[]"):
        return False
    return next(index for index, _, depth in [*_unquoted(text), (-1, "", 0)] if depth == 0) == len(text) - 1


def _parse_str(text: str, inside: bool) -> str:
    """A string: verbatim at the top of a field; in a tuple it may be written as a JSON string."""
    if inside and text.startswith('"'):
        try:
            return str(json.loads(text))
        except json.JSONDecodeError:
            raise _Mismatch from None
    return text


def _parse_number(hint: type, text: str) -> int | float:
    try:
        number = hint(text)
    except ValueError:
        raise _Mismatch from None
    if math.isnan(number):
        raise _Mismatch
    return cast("int | float", number)


def _whole(value: Any) -> Any:
    """`value`; raises _Mismatch for NaN, and for an integer beyond what arrays, kernels and files hold."""
    if value != value or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise _Mismatch
    return value


def _parse_tuple(hint: Any, text: str) -> tuple[Any, ...]:
    args = get_args(hint)
    text = text.strip()
    if _bracketed(text):
        text = text[1:-1].strip()
    parts = [part.strip() for part in _split(text, ",")] if text else []
    if len(parts) > 1 and not parts[-1]:
        parts.pop()  # (1,)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(parts)
    if len(parts) != len(args):
        raise _Mismatch
    return tuple(_parse(arg, part, True) for arg, part in zip(args, parts, strict=True))


def _parse_named(pair: tuple[Any, Any], text: str) -> tuple[Any, ...]:
    name, *value = _split(text, "=")
    if not value or not name.strip():
        raise _Mismatch
    return _parse_str(name.strip(), True), _parse(pair[1], "=".join(value).strip(), True)


def _order(member: Any) -> int:
    """Union members are tried from the narrowest spelling to the widest."""
    for rank, kind in enumerate((type(None), bool, int, float)):
        if member is kind:
            return rank
    return 5 if member is str else 4


def _parse(hint: Any, text: str, inside: bool = False) -> Any:
    """The value of `text` as `hint`; raises _Mismatch. `inside` a tuple, strings may be quoted."""
    members = _members(hint)
    if len(members) > 1:
        if inside and text.startswith('"') and str in members:
            return _parse_str(text, inside)
        for member in sorted(members, key=_order):
            if _is_config(member) or (member is bool and text.strip() in "01" and {int, float} & {*members}):
                continue
            try:
                return _parse(member, text, inside)
            except _Mismatch:
                continue
        raise _Mismatch
    if hint is str:
        return _parse_str(text, inside)
    if get_origin(hint) is tuple:
        pair = _pair(hint) if inside and not _bracketed(text) else None
        return _parse_named(pair, text) if pair else _parse_tuple(hint, text)
    if get_origin(hint) is Literal:
        return _choose(get_args(hint), text, inside)
    word = text.strip()
    if hint is type(None) and word.lower() == "none":
        return None
    if hint is bool and word.lower() in _TRUE | _FALSE:
        return word.lower() in _TRUE
    if hint is int or hint is float:
        return _parse_number(hint, word)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choose(tuple(hint), text, inside)
    raise _Mismatch


def _choose(values: Sequence[Any], text: str, inside: bool) -> Any:
    word = _parse_str(text, inside)
    for value in values:
        plain = value.value if isinstance(value, Enum) else value
        if word == plain or word.lower() == str(plain).lower():
            return value
    raise _Mismatch


def _quote(text: str) -> str:
    plain = text and text.isprintable() and not any(char in text for char in ' ,="()[]\\')
    ambiguous = (
        text.lower() in _TRUE | _FALSE | {"none"} or text[:1].isdigit() or text[:1] in "+-." or text[:1] in "iInN"
    )
    return text if plain and not ambiguous else json.dumps(text)


def render(value: Any, inside: bool = False) -> str:
    """The string that `override` reads back as `value`.

    >>> render((1, 2)), render((("min_terms", 2), ("op", "+"))), render(None)
    ('1,2', 'min_terms=2,op="+"', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return render(value.value, inside)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quote(value) if inside else value
    if isinstance(value, tuple):
        pairs = bool(value) and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value)
        parts = [f"{_quote(v[0])}={render(v[1], True)}" if pairs else render(v, True) for v in value]
        text = ",".join(parts)
        return f"({text})" if inside or not text or _bracketed(text) else text
    return repr(value)


def names(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every leaf; an absent optional config is a leaf holding None."""
    for name, hint in _hints(cast(Any, type(config))).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            for inner, inner_hint, inner_value in names(value):
                yield f"{name}.{inner}", inner_hint, inner_value
        else:
            yield name, hint, value


def flatten(config: Any) -> dict[str, Any]:
    """Dotted name -> value of every leaf, in the order of the classes."""
    return {name: value for name, _, value in names(config)}


def override(config: C, assignments: Mapping[str, Any]) -> C:
    """`config` with `assignments` (dotted name -> text, or the value itself) made together, so that each class is
    checked once, after all.

    Tuples are written `a,b,c`, pairs `a=1,b=2`, an absent value `none`, truth `true` or `false`. A class that has
    `override_base(changes)` says what they are made on. Raises ConfigError for an unknown name, naming the nearest, and
    for a value that is not of the field's type.
    """
    return cast(C, _replace(config, parsed(config, assignments)))


def parsed(config: Any, assignments: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `override` would give the names; not yet checked against each other. Raises as it does."""
    if not isinstance(assignments, Mapping):
        raise ConfigError(f"the settings are {assignments!r}; wanted a dictionary of dotted names and values.")
    hints = {name: hint for name, hint, _ in names(config)}
    changes: dict[str, Any] = {}
    for name, text in assignments.items():
        if name not in hints:
            raise _unknown(config, str(name), list(hints))
        try:
            value = _whole(_parse(hints[name], text) if isinstance(text, str) else _convert(hints[name], _plain(text)))
        except _Mismatch:
            raise ConfigError(
                f"{name}={text}: {text!r} is not {describe(hints[name])} (it is {render(flatten(config)[name])} now)."
            ) from None
        changes[name] = value
    return changes


def typed(cls: Any, name: str, value: Any, prefix: str) -> Any:
    """`value` as the field `name` of a config class has it; ConfigError where it is of another type."""
    hint = _hints(cls)[name]
    try:
        return _whole(_convert(hint, _plain(value)))
    except _Mismatch:
        wanted = "a list of texts" if hint == tuple[str, ...] else describe(hint)
        raise ConfigError(f"{prefix}{name} is {value!r}; wanted {wanted}.") from None


def _plain(value: Any) -> Any:
    """A value from Python as JSON would have it: NumPy's numbers, paths, dictionaries of pairs; texts as they are."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return [[name, _plain(entry)] for name, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool | Enum):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _unknown(config: Any, name: str, known: list[str]) -> ConfigError:
    if any(other.startswith(name + ".") for other in known):
        inside = ", ".join(other for other in known if other.startswith(name + "."))
        return ConfigError(f"{name} is a group of settings. Set one of them: {inside}.")
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in known:
            return ConfigError(
                f"{name}: {parent} is {render(flatten(config)[parent])} here and has no settings inside."
                " Choose a recipe that has them."
            )
    last = name.rpartition(".")[2]
    same_leaf = [other for other in known if other.rpartition(".")[2] == last]
    hint = f" Did you mean {', '.join(same_leaf)}?" if same_leaf else nearest(name, known)
    return ConfigError(f"no setting is named {name}.{hint}")


def _replace(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` rebuilt from its leaves outward; parts without a change stay the same objects."""
    if not changes:
        return config
    groups: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = value
    base = getattr(type(config), "override_base", None)
    return dataclasses.replace(
        base(config, changes) if base else config,
        **{head: part[""] if "" in part else _replace(getattr(config, head), part) for head, part in groups.items()},
    )


def dump(config: Any) -> dict[str, JSON]:
    """Plain JSON values that `load` turns back into an equal config; infinity becomes {"float": "inf"}."""
    return {name: _dump_value(getattr(config, name)) for name in _hints(cast(Any, type(config)))}


def _dump_value(value: Any) -> JSON:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_dump_value(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def load(cls: type[C], mapping: Mapping[str, JSON]) -> C:
    """The config that `dump` wrote. Raises ConfigError for unknown or missing keys and for values of another type."""
    return cast(C, _load_config(cls, mapping, ""))


def _load_config(cls: Any, mapping: Any, prefix: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} is {mapping!r}; wanted an object of {cls.__name__}.")
    hints = _hints(cls)
    for key in mapping:
        if key not in hints:
            raise ConfigError(f"no setting is named {prefix}{key}.{nearest(str(key), hints)}")
    missing = [f"{prefix}{name}" for name in hints if name not in mapping]
    if missing:
        raise ConfigError(
            f"{cls.__name__} lacks {', '.join(missing)}: the file was written by another version of tandem, or by hand."
        )
    return cls(**{name: _load_value(hint, mapping[name], f"{prefix}{name}") for name, hint in hints.items()})


def _load_value(hint: Any, value: JSON, name: str) -> Any:
    inner = _config_class(hint)
    if inner is not None and isinstance(value, Mapping):
        return _load_config(inner, value, f"{name}.")
    try:
        return _whole(_convert(hint, value))
    except _Mismatch:
        raise ConfigError(f"{name} is {json.dumps(value)}; wanted {describe(hint)}.") from None


def _convert(hint: Any, value: JSON) -> Any:
    """A JSON value as `hint`; raises _Mismatch."""
    try:
        return msgspec.convert(_numbers(value), hint)
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise _Mismatch from None


def _numbers(value: JSON) -> Any:
    """JSON with the infinities that `dump` wrote as objects."""
    if isinstance(value, list | tuple):
        return [_numbers(part) for part in value]
    return float(value["float"]) if value in ({"float": "inf"}, {"float": "-inf"}) else value


def diff(before: Any, after: Any) -> list[str]:
    """Lines `learner.lr: 2e-05 -> 3e-05`, one for each leaf that differs, in the order of the classes."""
    old, new = flatten(before), flatten(after)
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        left = render(old[name]) if name in old else "absent"
        right = render(new[name]) if name in new else "absent"
        if left != right or type(old.get(name)) is not type(new.get(name)):
            lines.append(f"{name}: {left} -> {right}")
    return lines
