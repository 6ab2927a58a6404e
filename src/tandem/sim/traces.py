"""Recorded programs, from files of several kinds: what each turn read and said, and how long its tools ran.

* a record of this engine (engine/record.py)
* `stage_timings.NAME.jsonl` beside `prefix_cache_metrics.NAME.jsonl`: ThunderAgent's profile of SWE-agent
* a CSV of TraceLab's replay: session_id or id, round_idx, prefix_len, input_len, output_len, tool_wait_after_ms, and
  arrival_time, which is in milliseconds too
* Mooncake's: requests with hash_ids, which are no programs; `ideal_hits` is asked of them
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tandem.engine.costs import StepCost, nonnegative
from tandem.engine.record import read
from tandem.errors import ConfigError

BLOCK = 512  # tokens behind a hash id of Mooncake's


class Turn(NamedTuple):
    """One request of a program."""

    prompt: int  # tokens of the whole context
    output: int
    tool_s: float = 0.0  # from its end to the next request, or to the program's end
    tool: str = ""
    kept: int | None = None  # leading tokens of the context before that its prompt goes on from; none: all that fit


class Timed(NamedTuple):
    """One request, as it was measured."""

    first_s: float  # its first token, on any clock
    prefill_s: float
    decode_s: float
    prompt: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """One program."""

    name: str
    turns: tuple[Turn, ...]
    start_s: float = 0.0  # that it came, where programs come by time
    setup_s: float = 0.0  # before its first request


@dataclass(frozen=True, slots=True)
class Trace:
    """Programs in the order of their coming, and what else their file tells."""

    programs: tuple[Recorded, ...]
    at_once: int = 0  # programs under way at a time; 0: they come by time
    makespan_s: float = 0.0  # that was measured; 0: none was
    cost: StepCost | None = None  # fitted to the file's own times


def load(path: Path) -> Trace:
    """The programs of a file. ConfigError where it is of no kind that is known."""
    if path.suffix == ".csv":
        return Trace(tuple(_tracelab(path)))
    first = _first(path)
    if "hash_ids" in first:
        raise ConfigError(f"{path} holds requests, not programs: only its ideal prefix hits can be told.")
    if first.get("at") == "head":
        return _recorded(path)
    if "stage" in first:
        return _profiled(path)
    raise ConfigError(
        f"{path}: its first line has {', '.join(map(repr, first))}. Known are records of engine.programs.record, "
        "stage_timings.NAME.jsonl with prefix_cache_metrics.NAME.jsonl beside it, CSV files of TraceLab, and "
        "Mooncake's requests."
    )


def _first(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as lines:
            values = json.loads(lines.readline())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: its first line is no JSON object.")
    return values


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no file of JSON lines: {error}.") from None


def is_mooncake(path: Path) -> bool:
    return path.suffix != ".csv" and "hash_ids" in _first(path)


def ideal_hits(path: Path) -> tuple[int, int]:
    """(prompt tokens that a cache of any size would have, all prompt tokens), of requests with hash ids, in order."""
    seen: set[int] = set()
    hits = tokens = 0
    for row in _rows(path):
        ids, length = row["hash_ids"], row["input_length"]
        found = next((place for place, name in enumerate(ids) if name not in seen), len(ids))
        hits += min(found * BLOCK, length)
        tokens += length
        seen.update(ids)
    return hits, tokens


def _tracelab(path: Path) -> Iterable[Recorded]:
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        sessions: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            sessions.setdefault(row["session_id"] if "session_id" in row else row["id"], []).append(row)
        for name, rounds in sessions.items():
            turns = tuple(
                Turn(
                    int(row["prefix_len"]) + int(row["input_len"]),
                    max(1, int(row["output_len"])),
                    float(row["tool_wait_after_ms"]) / 1e3,
                    kept=int(row["prefix_len"]),
                )
                for row in sorted(rounds, key=lambda row: int(row["round_idx"]))
            )
            yield Recorded(name, turns, float(rounds[0].get("arrival_time") or 0.0) / 1e3)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no CSV of TraceLab's replay: {error}.") from None


def _recorded(path: Path) -> Trace:
    """Of a record: programs that the file shows from their first turn on."""
    turns: dict[tuple[str, str], list[Turn]] = {}
    first: dict[tuple[str, str], float] = {}
    timed: list[Timed] = []
    for line in read(path):
        key = line["by"], line.get("program", "")
        if line["at"] == "turn" and (line["turn"] == 1 or key in turns):
            spent = line["queue_s"], line["prefill_s"], line["decode_s"]
            first.setdefault(key, line["t"] - sum(spent))
            turns.setdefault(key, []).append(Turn(line["prompt"], max(1, line["output"]), 0.0, line["tool"]))
            timed.append(
                Timed(line["t"] - spent[2], *spent[1:], line["prompt"], line["cached"], max(1, line["output"]))
            )
        elif line["at"] == "back" and key in turns:
            turns[key][-1] = turns[key][-1]._replace(tool_s=line["tool_s"])
    began_s = min(first.values(), default=0.0)
    order = sorted(turns, key=lambda key: (first[key], key))
    programs = tuple(Recorded(key[1], tuple(turns[key]), first[key] - began_s) for key in order)
    return Trace(programs, cost=fit_requests(timed)[0] if len(timed) > 5 else None)


def _profiled(path: Path) -> Trace:
    """ThunderAgent's profile: as many programs at once as it had threads, and a cost that is fitted to its requests."""
    beside = path.with_name(path.name.replace("stage_timings", "prefix_cache_metrics"))
    said: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in _rows(beside):
        said.setdefault((row["instance_id"], row["step"]), []).append(row)
    stages = sorted(_rows(path), key=lambda row: row["timestamp"])
    programs, spans = list[Recorded](), dict[str, list[dict[str, Any]]]()
    for row in stages:
        spans.setdefault(row["instance_id"], []).append(row)
    for name, rows in spans.items():
        asked = [row for row in rows if row["stage"] == "llm_reasoning"]
        pairs = list(zip(asked[::2], asked[1::2], strict=False))
        turns = []
        for place, (begun, ended) in enumerate(pairs):
            counted = said.get((name, begun["step"]))
            following = pairs[place + 1][0]["timestamp"] if place + 1 < len(pairs) else rows[-1]["timestamp"]
            if counted:
                tokens = counted.pop(0)
                outside = (ended["timestamp"] - begun["timestamp"]) - tokens["prefill_time"] - tokens["decode_time"]
                waits = max(0.0, following - ended["timestamp"]) + max(0.0, outside)
                turns.append(Turn(tokens["input_tokens"], max(1, tokens["output_tokens"]), waits, "bash"))
            elif turns:  # an answer that was not counted: time that passes
                more = following - begun["timestamp"]
                turns[-1] = turns[-1]._replace(tool_s=turns[-1].tool_s + more)
        programs.append(Recorded(name, tuple(turns), 0.0, pairs[0][0]["timestamp"] - rows[0]["timestamp"]))
    cost, turn_s = fit_requests(list(_timed(_rows(beside))))
    programs = [
        replace(one, turns=tuple(turn._replace(tool_s=turn.tool_s + turn_s) for turn in one.turns)) for one in programs
    ]
    threads = len({row["thread"] for row in stages})
    whole_s = stages[-1]["timestamp"] - stages[0]["timestamp"]
    return Trace(tuple(programs), threads, whole_s, cost)


def _timed(rows: Iterable[dict[str, Any]]) -> Iterable[Timed]:
    """Requests of the profile: what one found of its context is what the one before had."""
    ran: dict[str, int] = {}
    for row in rows:
        prompt, output, name = row["input_tokens"], max(1, row["output_tokens"]), row["instance_id"]
        cached = min(prompt - 1, ran.get(name, 0))
        yield Timed(row["first_chunk_timestamp"], row["prefill_time"], row["decode_time"], prompt, cached, output)
        ran[name] = prompt + output - 1


def fit_requests(requests: Sequence[Timed]) -> tuple[StepCost, float]:
    """(what a step costs, seconds of a request that no token explains), by least squares over prefills and decodes.

    A request's decode took its tokens' steps, each with as many rows and as much context as others had under way then,
    on average. A coefficient that would fall below 0 is left out.
    """
    starts, prefill_s, decode_s, prompts, cached, said = np.array(requests, dtype=np.float64).T
    spent = np.maximum(decode_s, 1e-6)
    beside, context = np.zeros(len(starts)), np.zeros(len(starts))
    for place, (start, seconds) in enumerate(zip(starts, spent, strict=True)):
        overlap = np.clip(np.minimum(starts + spent, start + seconds) - np.maximum(starts, start), 0.0, None) / seconds
        beside[place], context[place] = overlap.sum(), overlap @ (prompts + said / 2)
    fresh, zero, one = prompts - cached, np.zeros(len(starts)), np.ones(len(starts))
    # columns: base, row of a prompt, context, row that draws, of a request in its prefill, and in its decode
    prefills = np.stack([one, fresh, fresh * cached + fresh * (fresh + 1) / 2, zero, one, zero], 1)
    decodes = np.stack([said, zero, said * context, said * beside, zero, one], 1)
    table, took = np.concatenate([prefills, decodes]), np.concatenate([prefill_s, decode_s])
    base, prefill, pairs, decode, *apart = nonnegative(table, took)
    return StepCost.fitted(base, prefill, pairs, decode), sum(apart)
