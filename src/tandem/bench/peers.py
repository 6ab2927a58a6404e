"""A side of `tandem bench`: a command that is run to its end, and the figures that it prints, a JSON line each."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tandem import env
from tandem.errors import ConfigError, WorldError

EXPECTED = '{"peer": NAME, "work": NAME, "tok_s": NUMBER}, or "s" for "tok_s"'
RESERVED = ("tandem", "library", "limit")  # names of tandem's own sides
LEAST, MOST = 1e-30, 1e30  # what a rate or a time lies between, so that no ratio overflows
DEADLINE_S = 3600.0
SHOWN = 200  # characters of a line in an error


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: a rate in tokens a second, or a time in seconds.

    >>> Figure("tandem", "train 16x256", 100.0, None).speed
    100.0
    """

    peer: str
    work: str
    tok_s: float | None
    s: float | None

    @property
    def unit(self) -> str:
        return "s" if self.tok_s is None else "tok/s"

    @property
    def speed(self) -> float:
        """More is better."""
        if self.tok_s is not None:
            return self.tok_s
        assert self.s is not None
        return 1.0 / self.s


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

    units: work -> "tok/s" or "s", of the works whose unit is fixed.

    >>> read_figure("loading", {}), read_figure('{"peer": "hf", "work": "w", "s": 2}', {"w": "s"})
    (None, Figure(peer='hf', work='w', tok_s=None, s=2))
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
    given = [name for name in ("tok_s", "s") if name in row]
    if len(given) != 1:
        raise ValueError('it has not one of "tok_s" and "s"')
    number = row[given[0]]
    if type(number) not in (int, float) or not LEAST < number < MOST:
        raise ValueError(f'its "{given[0]}" is not a finite number above 0')
    figure = Figure(peer, work, row.get("tok_s"), row.get("s"))
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
