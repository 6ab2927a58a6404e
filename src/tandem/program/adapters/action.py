"""What the adapters share: packages by name, seeds by index, and the action that a text says."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from tandem.errors import TaskError

_MARKED = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


def said(text: str) -> str:
    """The action that a model's text marks, or all that it says outside of its thoughts.

    >>> said("<think>3?</think>I take <action> 4 </action>"), said("<think>3?</think> go left\\n")
    ('4', 'go left')
    """
    marked = _MARKED.findall(text)
    return (marked[-1] if marked else _THOUGHT.sub("", text)).strip()


def last_line(text: str) -> str:
    """The action that a text marks, or its last line.

    >>> last_line("It is near.\\nleft\\n"), last_line("")
    ('left', '')
    """
    return (said(text).splitlines() or [""])[-1].strip()


def package(name: str, pin: str) -> Any:
    """The module `name`; TaskError with the command that installs it where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(
            f"the task needs {pin} ({error}): {sys.executable} -m pip install {pin}, or name the interpreter of an "
            "environment that has it: task.python=DIR/bin/python"
        ) from error


def named(reference: str, parameter: str) -> Callable[..., Any]:
    """What "package.module:name" names; TaskError where it is not there."""
    where, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(where), attribute)
    except (AttributeError, ImportError, ValueError) as error:
        raise TaskError(f"task.parameters: {parameter}={reference}: {error}. Write package.module:name.") from error
    if not callable(found):
        raise TaskError(f"task.parameters: {parameter}={reference} cannot be called. Name a class or a function.")
    return found  # type: ignore[no-any-return]


def seed_of(seed: int, split: str, index: int) -> int:
    """A seed of 31 bits for a prompt."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=4).digest()) >> 1
