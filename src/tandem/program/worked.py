"""Answers written out step by step, of data sets whose answers can be worked: what objective=next_token trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def chain_steps(entry: Mapping[str, Any]) -> str:
    """reasoning-gym's chain_sum, a sum a step from the left.

    >>> chain_steps({"metadata": {"expression": "4 + 31 - 12"}, "answer": "23"})
    '4 + 31 - 12 = 35 - 12 = 23'
    """
    terms = str(entry["metadata"]["expression"]).split()
    written = [" ".join(terms)]
    while len(terms) > 1:
        left, sign, right = int(terms[0]), terms[1], int(terms[2])
        assert sign in ("+", "-"), terms
        terms = [str(left + right if sign == "+" else left - right), *terms[3:]]
        written.append(" ".join(terms))
    assert terms[0] == str(entry["answer"]), entry
    return " = ".join(written)


WORKED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"chain_sum": chain_steps}


def worked(name: str, entry: Mapping[str, Any]) -> str:
    """The steps of an entry of the data set `name`, or its bare answer."""
    return WORKED[name](entry) if name in WORKED else str(entry["answer"])
