"""A side of `tandem bench`: a command that is run to its end, and the figures that it prints, a JSON line each."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tandem import env
from tandem.errors import ConfigError, WorldError

EXPECTED = '{"peer": NAME, "work": NAME, "tok_s": NUMBER}, or "pairs_s", "s", "gb" or "share" for "tok_s"'
UNITS = {"tok_s": "tok/s", "pairs_s": "pairs/s", "s": "s", "gb": "GB", "share": "share"}  # of the lines' keys
RATES = ("tok/s", "pairs/s")  # more is better
RESERVED = ("tandem", "library", "limit")  # names of tandem's own sides
LEAST, MOST = 1e-30, 1e30  # what a rate or a time lies between, so that no ratio overflows
DEADLINE_S = 3600.0
SHOWN = 200  # characters of a line in an error


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: a rate in tokens or pairs a second, a time in seconds, a peak of memory, a share that is lost.

    >>> Figure("tandem", "groups", 4.0, "s").speed, Figure("hf", "train 16x256", 100.0).line()
    (0.25, '{"peer": "hf", "work": "train 16x256", "tok_s": 100.0}')
    """

    peer: str
    work: str
    value: float
    unit: str = "tok/s"

    @property
    def speed(self) -> float:
        """More is better."""
        return self.value if self.unit in RATES else 1.0 / self.value

    def line(self) -> str:
        """As a side prints it."""
        key = next(key for key, unit in UNITS.items() if unit == self.unit)
        return json.dumps({"peer": self.peer, "work": self.work, key: self.value})


def beside_limit(work: str, least_s: float, times_s: Iterable[float], tokens: int | None = None) -> Iterator[Figure]:
    """The limit of a work, then tandem's figures: rates where it is of `tokens`, times else."""
    for peer, seconds in (("limit", least_s), *(("tandem", seconds) for seconds in times_s)):
        yield Figure(peer, work, tokens / seconds) if tokens else Figure(peer, work, seconds, "s")


@dataclass(frozen=True, slots=True)
class Side:
    """Tandem's own measurement or a peer's.

    >>> print(Side(("vllm", "a b")))
    the peer `vllm 'a b'`
    """

    command: tuple[str, ...]
    own: bool = False

    def __str__(self) -> str:
        kind = "tandem's own bench" if self.own else "the peer"
        return f"{kind} `{shlex.join(self.command)}`"


def peer_side(text: str) -> Side:
    """The side that a command line names; ConfigError where it is none, or its program is not found.

    >>> peer_side("sh -c 'echo 1'").command
    ('sh', '-c', 'echo 1')
    """
    try:
        command = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--peer {text!r} is no command line: {error}. Quote it as for a shell.") from error
    if not command:
        raise ConfigError(f"--peer {text!r} is empty. Give a command that prints lines {EXPECTED}.")
    if shutil.which(command[0], path=env.foreign().get("PATH")) is None:
        raise ConfigError(f"--peer {text!r}: no program {command[0]!r} is found. Give its path, or put it on PATH.")
    return Side(command)


def read_figure(line: str, units: Mapping[str, str], *, own: bool = False) -> Figure | None:
    """The figure of a line; None where it is no JSON object with a "work". ValueError says what is wrong with it.

    units: work -> one of UNITS' values, of the works whose unit is fixed.

    >>> read_figure("loading", {}), read_figure('{"peer": "hf", "work": "w", "s": 2}', {"w": "s"})
    (None, Figure(peer='hf', work='w', value=2, unit='s'))
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or "work" not in row:
        return None
    peer, work = row.get("peer", "peer"), row["work"]
    for name, value in (("peer", peer), ("work", work)):
        if not isinstance(value, str) or not value:
            raise ValueError(f'its "{name}" is not a name')
    if peer in RESERVED and not own:
        raise ValueError(f"{peer!r} is a name of tandem's own")
    given = [name for name in UNITS if name in row]
    if len(given) != 1:
        raise ValueError(f"it has not one of {', '.join(UNITS)}")
    number = row[given[0]]
    if type(number) not in (int, float) or not LEAST < number < MOST:
        raise ValueError(f'its "{given[0]}" is not a finite number above 0')
    figure = Figure(peer, work, number, UNITS[given[0]])
    if units.get(work, figure.unit) != figure.unit:
        raise ValueError(f"tandem gives this work in {units[work]}, not in {figure.unit}")
    return figure


def run_side(side: Side, units: Mapping[str, str]) -> list[Figure]:
    """The figures that a side prints; other lines are passed over. `units` as in read_figure.

    WorldError where it fails, prints no figure or a wrong one.
    """
    try:
        done = subprocess.run(
            side.command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=DEADLINE_S,
            check=False,
            env=env.foreign(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorldError(f"{side} did not run: {error}.") from error
    said = f"The end of what it said: {(done.stderr or done.stdout).strip()[-600:]}"
    if done.returncode:
        raise WorldError(f"{side} ended with {done.returncode}. {said}")
    figures = []
    for number, line in enumerate(done.stdout.split("\n"), start=1):
        try:
            figure = read_figure(line, units, own=side.own)
        except ValueError as error:
            raise WorldError(f"{side}, line {number}, {line[:SHOWN]}: {error}. Expected: {EXPECTED}.") from error
        if figure is not None:
            figures.append(figure)
    if not figures:
        raise WorldError(f"{side} printed no figure. Expected: lines {EXPECTED}. {said}")
    return figures
