"""A run's trajectories -> trajectories.html, where a person reads programs turn by turn: one file, no network.

Each step is a compressed block in the page, opened in the browser when it is looked at; an index of all programs is
what the filters work on. What the page does with them is trajectories.js.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError, RunFolderError
from tandem.report.html import READER, page_template
from tandem.report.kept import read_object, read_trajectories, trajectory_files, write_file

PAGE_BYTES = 64_000_000  # of the steps: a browser opens a file of this size in about a second
_QUESTION = 120  # characters of a prompt in the list

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """A page, the steps that it shows, and those that it does not."""

    path: Path
    steps: tuple[int, ...]
    left_out: tuple[int, ...]  # of those asked for: the page was full

    @property
    def note(self) -> str:
        """What is left out and how to see it, or nothing."""
        if not self.left_out:
            return ""
        missing = spelt(self.left_out)
        return (
            f"the page holds {PAGE_BYTES // 1_000_000} MB: step {missing} left out. `tandem report "
            f"{self.path.parent} --trajectories --steps {self.left_out[0]}-{self.left_out[-1]}` shows the last of them."
        )


@dataclass(slots=True)
class _Index:
    """What the filters know of each program without opening its step."""

    steps: list[int] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    programs: list[list[Any]] = field(default_factory=list)

    def add(self, step: int, rows: Sequence[Row]) -> None:
        """The programs of a step: [place of step, of prompt, id, reward, place of failure, tokens, first row, rows,
        side]; one that is compared with another has a side, and no reward of its own."""
        self.steps.append(step)
        numbered = enumerate(rows)
        for program_id, pairs in groupby(numbered, lambda pair: pair[1]["program_id"]):
            segments = list(pairs)
            first, row = segments[0]
            failure = row.get("failure")
            reason = f"{failure['where']}: {failure['reason']}" if failure else ""
            place = self.failures.setdefault(reason, len(self.failures)) if failure else -1
            tokens = sum(row.get("sampled_tokens") or 0 for _, row in segments)
            known = self._prompt(row)
            side = row.get("side")
            reward = None if side else row.get("reward")
            at, rows_of = len(self.steps) - 1, [first, len(segments)]
            self.programs.append([at, known, program_id, reward, place, tokens, *rows_of, side])

    def _prompt(self, row: Row) -> int:
        if row["prompt_id"] not in self.prompts:
            asked = [message["content"] for message in row.get("prompt") or () if message["role"] == "user"]
            question = " ".join(str(asked[-1] if asked else row.get("context", "")).split())
            self.prompts[row["prompt_id"]] = len(self.questions)
            self.questions.append(question if len(question) <= _QUESTION else f"{question[: _QUESTION - 1]}…")
        return self.prompts[row["prompt_id"]]

    def record(self) -> dict[str, Any]:
        prompts = [list(pair) for pair in zip(self.prompts, self.questions, strict=True)]
        return {
            "steps": self.steps,
            "failures": list(self.failures),
            "prompts": prompts,
            "programs": self.programs,
        }


def write_trajectories_page(folder: Path | str, steps: str = "", limit_bytes: int = PAGE_BYTES) -> Written:
    """Write trajectories.html of the run in `folder`; `steps` is "A-B", "A" or all. The newest that fit are shown.

    RunFolderError where the folder keeps no trajectories, or none of those steps. Needs no lock.
    """
    folder = Path(folder)
    found = trajectory_files(folder)
    if not found:
        raise RunFolderError(f"{folder} keeps no trajectories. Give a folder that `tandem train` or `rollout` made.")
    first, last = steps_asked(steps) if steps else (min(found), max(found))
    asked = [step for step in sorted(found) if first <= step <= last]
    if not asked:
        raise RunFolderError(f"{folder} keeps no trajectories of step {steps}; it has those of {spelt(sorted(found))}.")
    blocks: dict[int, str] = {}
    index, size = _Index(), 0
    read: dict[int, list[Row]] = {}
    for step in reversed(asked):
        rows = list(read_trajectories(found[step]))
        block = _block(rows)
        size += len(block)
        if size > limit_bytes and blocks:
            break
        blocks[step], read[step] = block, [_of_index(row) for row in rows]
    shown = tuple(sorted(blocks))
    for step in shown:
        index.add(step, read[step])
    written = Written(folder / READER, shown, tuple(step for step in asked if step not in blocks))
    page = page_template("trajectories.html.jinja").render(
        name=str(read_object(folder / "config.json").get("name") or folder.resolve().name),
        folder=folder.resolve().name,
        note=written.note,
        beside="",
        index=_block(index.record()),
        blocks=[(step, blocks[step]) for step in shown],
        script=resources.files("tandem.report").joinpath("trajectories.js").read_text(encoding="utf-8"),
    )
    write_file(written.path, page)
    return written


def steps_asked(text: str) -> tuple[int, int]:
    """
    >>> steps_asked("3-12"), steps_asked("7")
    ((3, 12), (7, 7))
    """
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
        raise ConfigError(f"--steps is {text}. Give a step, or the first and the last: --steps 3-12.")
    return int(first), int(last or first)


def spelt(steps: Sequence[int]) -> str:
    """Sorted steps as people write them.

    >>> spelt([1, 2, 3, 7])
    '1-3, 7'
    """
    runs = [[value for _, value in run] for _, run in groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _of_index(row: Row) -> Row:
    """Without what only the block holds: a run's index is in memory at once, its rows are not."""
    return {name: value for name, value in row.items() if name not in ("text", "tokens", "context", "said")}


def _block(content: Any) -> str:
    """JSON, compressed, as text that HTML leaves alone."""
    return base64.b64encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6)).decode()
