"""The door for what a model's files say: every value of config.json and its like, of an index and of a GGUF header is
taken by name as the kind that is wanted, or refused with the file, the name and the value.

>>> config = Fields("config.json", {"num_hidden_layers": 30, "rms_norm_eps": "1e-5", "sliding_window": None})
>>> config.take("num_hidden_layers", whole(1)), config.take("sliding_window", optional(whole(1)), 4096)
(30, None)
>>> config.take("rms_norm_eps", number(0.0))
Traceback (most recent call last):
tandem.errors.ModelError: config.json has rms_norm_eps = '1e-5'; a number from 0 is needed. Mend the file, or take ...
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar

from tandem.errors import ModelError

T = TypeVar("T")
LARGEST = 2**31 - 1  # kernels count in 32 bits
_ABSENT: Any = object()
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a value should be: in words, and the function that returns it or raises ValueError."""

    wanted: str
    accept: Callable[[Any], T]


def whole(least: int = 0, most: int = LARGEST) -> Kind[int]:
    """An integer; true, false and 3.0 are none."""

    def accept(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise ValueError
        return int(value)

    return Kind(f"a whole number from {least} to {most}", accept)


def number(least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> Kind[float]:
    """A finite integer or float from `least` to `most`, and greater than `above`."""

    def accept(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError
        try:
            found = float(value)
        except OverflowError as error:
            raise ValueError from error
        if not (math.isfinite(found) and least <= found <= most and found > above):
            raise ValueError
        return found

    named = ((" from ", least), (" to ", most), (" above ", above))
    limits = "".join(f"{word}{limit:g}" for word, limit in named if math.isfinite(limit))
    return Kind(f"a {'' if limits else 'finite '}number{limits}", accept)


def _instance(kind: type[T], wanted: str) -> Kind[T]:
    def accept(value: Any) -> T:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return Kind(wanted, accept)


flag = _instance(bool, "true or false")
text = _instance(str, "a string")
table: Kind[dict[str, Any]] = _instance(dict, "an object")


def listed(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """A list whose entries are of `kind`."""

    def accept(value: Any) -> tuple[T, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(kind.accept(one) for one in value)

    return Kind(f"a list, each entry {kind.wanted},", accept)


def optional(kind: Kind[T]) -> Kind[T | None]:
    """Null, or a value of `kind`."""
    return Kind(f"null or {kind.wanted}", lambda value: None if value is None else kind.accept(value))


def token_id(vocabulary: int) -> Kind[int | None]:
    """An id below `vocabulary`, or None: null, a negative id, and -1 as unsigned 32 bits."""

    def accept(value: Any) -> int | None:
        found = None if value is None else whole(-(2**31), 2**32 - 1).accept(value)
        if found is None or found < 0 or found == 2**32 - 1:
            return None
        return whole(0, vocabulary - 1).accept(found)

    return Kind(f"null or a token id below the vocabulary's {vocabulary}", accept)


def token_ids(vocabulary: int) -> Kind[tuple[int, ...]]:
    """`token_id`, or a list of them."""
    one = token_id(vocabulary)

    def accept(value: Any) -> tuple[int, ...]:
        found = [one.accept(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
        return tuple(dict.fromkeys(each for each in found if each is not None))

    return Kind(f"{one.wanted}, or a list of them,", accept)


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of a file, by name."""

    where: str  # the file, as a message names it
    values: Mapping[str, Any]
    taken: set[str] = field(default_factory=set)  # names that were asked for

    def take(self, name: str, kind: Kind[T], default: T = _ABSENT) -> T:
        """The value of `name`; `default` where the file is silent. Raises ModelError for any other kind of value."""
        self.taken.add(name)
        value = self.values.get(name, _ABSENT)
        if value is _ABSENT:
            if default is _ABSENT:
                raise ModelError(
                    f"{self.where} lacks {name}; {kind.wanted} is needed. Mend the file, or take the model again."
                )
            return default
        try:
            return kind.accept(value)
        except ValueError:
            raise ModelError(
                f"{self.where} has {name} = {shown(value)}; {kind.wanted} is needed. Mend the file, or take the "
                "model again."
            ) from None


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    return _SHOWN.repr(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises ModelError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Copy or download the file again.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy or download the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object. Copy or download the file again.")
    return value
