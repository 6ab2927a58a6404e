"""What a run sampled, to be learned from again: its programs, token for token where the run kept tokens.

Without them (rollout.keep_tokens off, or another model's tokeniser) a program's text is tokenised anew: by its prompt's
messages, and turns told apart by the tokens that end one and begin the next.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tandem.columns import Array, Columns
from tandem.corpus.chats import message
from tandem.corpus.lines import opened
from tandem.corpus.reader import refused
from tandem.corpus.turns import chosen
from tandem.errors import CorpusError, ModelError
from tandem.types import Group, Message, Prompt, Trajectory

if TYPE_CHECKING:
    from tandem.corpus.config import CorpusConfig
    from tandem.program.render import Renderer

_STEP = re.compile(r"step-(\d+)")
_ERROR_LINE = re.compile(r"^\W*(error: |traceback \(most recent call last\))", re.IGNORECASE | re.MULTILINE)


KEYS = {"program_id", "prompt_id", "prompt", "text", "sampled_tokens"}  # of every trajectory's row


def of_a_run(path: Path) -> bool:
    """Whether a file's first line is a trajectory's: its "text" is no document."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as lines:
        try:
            first = json.loads(lines.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and first.keys() >= KEYS


@dataclass(frozen=True, slots=True)
class _Program:
    """Where a program's lines lie, and what it earned."""

    id: str
    places: tuple[tuple[int, int, int, int], ...]  # file, line, start, length of each segment
    reward: float
    advantage: float  # its reward less the mean of its group, all that was graded


class RunReader:
    """The programs that a run graded, a row each, with `advantages` beside what is learned. CorpusError for a run that
    sampled none: it learned from what was written, and the rewards of that are no grades."""

    def __init__(self, name: str, path: Path, config: CorpusConfig, renderer: Renderer) -> None:
        self.name, self.config, self.renderer = name, config, renderer
        folder = path / "trajectories"
        steps = [(found, one) for one in folder.glob("*.jsonl") if (found := _STEP.fullmatch(one.stem))]
        self.paths = [path] if path.is_file() else [one for _, one in sorted(steps, key=lambda s: int(s[0].group(1)))]
        if not self.paths:
            raise CorpusError("no rows", f"{folder} holds no step-N.jsonl: the run has sampled nothing yet.")
        for one in self.paths:
            opened(one).close()
        self._digest = xxhash.xxh3_128()
        self.left_out: Counter[str] = Counter()
        self.programs = self._listed()
        # What is asked of a run changes what is listed.
        self._digest.update(repr((config.reward_at_least, len(self.programs))).encode())
        self.digest = self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self.programs)

    def place(self, number: int) -> str:
        file, line, *_ = self.programs[number].places[0]
        return f"{self.paths[file]} line {line}"

    def group(self, number: int) -> Group:
        program, place = self.programs[number], self.place(number)
        rows = [self._row(*where) for where in program.places]
        prompt_id = f"{self.name}/{rows[0]['prompt_id']}"
        asked = tuple(replace(message(one, place), sampled=False) for one in rows[0]["prompt"])
        prompt = Prompt(prompt_id, asked, {"answer": rows[0].get("answer")})
        name = f"{self.name}/{program.id}"
        segments, rendered = list[Trajectory](), 0
        for row in rows:
            columns = self._kept(row)
            if columns is None:
                columns, rendered = self._rendered(row, asked, place), 1
            said = self._said(row, columns, place)
            columns = self._filtered(columns, said, last=row is rows[-1])
            if columns["loss_mask"].any():
                columns = columns.having(advantages=np.where(columns["loss_mask"], program.advantage, 0.0))
                segments.append(
                    Trajectory(name, prompt_id, columns, program.reward, segment=len(segments), said=said, cause="run")
                )
        if not segments:
            raise refused("nothing to learn", place, "no turn of it is trained.")
        first = replace(segments[0], cause="", counts={"rendered": rendered} if rendered else {})
        return Group(prompt, (first, *segments[1:]))

    def _listed(self) -> list[_Program]:
        """The programs to learn from, in the order of steps and lines."""
        lines: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
        rewards: dict[str, float | None] = {}
        groups: dict[str, list[float]] = defaultdict(list)
        for row, *where in self._lines():
            program = str(row["program_id"])
            lines[program].append(tuple(where))  # type: ignore[arg-type]
            if program not in rewards:
                graded = row.get("reward") is not None and not row.get("failure")
                if graded and row.get("stop_reason", "") is None and row["sampled_tokens"]:
                    raise _written(f"{self.paths[where[0]]} line {where[1]}")
                rewards[program] = reward = float(row["reward"]) if graded else None
                if reward is not None:
                    groups[program.rpartition("/")[0]].append(reward)
        least, listed = self.config.reward_at_least, list[_Program]()
        for program, places in lines.items():
            reward = rewards[program]
            if reward is None:
                self.left_out["not graded"] += 1
            elif least is not None and reward < least:
                self.left_out[f"of a reward below {least:g}"] += 1
            else:
                mean = fmean(groups[program.rpartition("/")[0]])
                listed.append(_Program(program, tuple(places), reward, reward - mean))
        return listed

    def _lines(self) -> Iterator[tuple[dict[str, Any], int, int, int, int]]:
        """Each row with its file, line, start and length. CorpusError for one that is no trajectory's."""
        for file, path in enumerate(self.paths):
            at = 0
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    self._digest.update(line)
                    try:
                        row = json.loads(line)
                        if not row.keys() >= KEYS:
                            raise ValueError("it is no trajectory's row")
                    except (ValueError, AttributeError, RecursionError) as error:
                        if self.config.bad == "stop":
                            where = f"{path} line {number}"
                            raise refused("not JSON", where, f"{error}. Mend or remove it.") from error
                        self.left_out["refused: not JSON"] += 1
                    else:
                        yield row, file, number, at, len(line)
                    at += len(line)

    def _row(self, file: int, line: int, start: int, length: int) -> dict[str, Any]:
        with self.paths[file].open("rb") as lines:
            lines.seek(start)
            found: dict[str, Any] = json.loads(lines.read(length))
        return found

    def _kept(self, row: Mapping[str, Any]) -> Columns | None:
        """What was read and drawn, as the row has it; None where it has no tokens, or they are another tokeniser's."""
        kept = row.get("tokens")
        if kept is None:
            return None
        ids, runs = kept["ids"], kept["sampled"]
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        mask = np.concatenate([mask, np.zeros(len(ids) - len(mask), bool)])
        first = int(mask.argmax()) if mask.any() else len(mask)
        decode = self.renderer.tokenizer.decode
        try:
            same = decode(ids[first:]) == row["text"] and decode(ids[:first]) == row.get("context", "")
        except (OverflowError, ValueError):  # an id that this tokeniser cannot have
            same = False
        return Columns.of(tokens=ids, loss_mask=mask) if same else None

    def _rendered(self, row: Mapping[str, Any], asked: Sequence[Message], place: str) -> Columns:
        """The row's texts as this model's tokens."""
        spoke = row.get("said") or []
        if any(one.get("tool_calls") for one in spoke) and not row.get("context"):
            raise refused(
                "no tokens",
                place,
                "its prompt had tools, which the row does not have, and its tokens were not kept. Sample with "
                "rollout.keep_tokens.",
            )
        encode, renderer = self.renderer.tokenizer.encode, self.renderer
        try:
            context = encode(row["context"], False) if row.get("context") else renderer.prompt_tokens(asked)
        except ModelError as error:
            raise refused("the template refuses it", place, str(error)) from error
        ids = encode(row["text"], False)
        turns = max(1, sum(one.get("role") == "assistant" and one.get("sampled", True) for one in spoke))
        mask = np.ones(len(ids), bool) if turns == 1 and not spoke[1:] else self._spans(ids)
        found = int((np.diff(np.concatenate([[False], mask]).astype(np.int8)) > 0).sum())
        if found != turns:
            raise refused(
                "no tokens",
                place,
                f"its tokens were not kept, and its text has {found} turns where the model spoke {turns} times. "
                "Sample with rollout.keep_tokens.",
            )
        return Columns.of(tokens=[*context, *ids], loss_mask=np.concatenate([np.zeros(len(context), bool), mask]))

    def _spans(self, ids: Sequence[int]) -> Array:
        """Which tokens of a text the model said: to the end of a turn, and on from where it is asked for the next."""
        stops, asks = set(self.renderer.stop_token_ids), list(self.renderer.asks)
        mask, speaking, place = np.zeros(len(ids), bool), True, 0
        while place < len(ids):
            if speaking:
                mask[place] = True
                speaking = ids[place] not in stops
                place += 1
            elif list(ids[place : place + len(asks)]) == asks:
                speaking, place = True, place + len(asks)
            else:
                place += 1
        return mask

    def _said(self, row: Mapping[str, Any], columns: Columns, place: str) -> tuple[Message, ...]:
        """Who spoke, with the words of each turn and of what followed it."""
        decode, mask = self.renderer.tokenizer.decode, columns["loss_mask"]
        edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
        texts = [
            decode(columns["tokens"][one:other].tolist()) for one, other in zip(edges[1:], edges[2:], strict=False)
        ]
        spoke = row.get("said") or [{"role": "assistant"}]
        said, turn = list[Message](), -1
        for one in spoke:
            own = one.get("role") == "assistant" and one.get("sampled", True)
            turn += own
            place_of = 2 * turn + (not own)  # texts take turns: the model's, what followed
            content = texts[place_of] if 0 <= place_of < len(texts) else ""
            found = message({**one, "content": content}, place)
            said.append(replace(found, sampled=bool(own), faults=tuple(one.get("faults", ()))))
        return tuple(said)

    def _filtered(self, columns: Columns, said: Sequence[Message], *, last: bool) -> Columns:
        """The turns that are learned, and of them which failed. `last`: nothing follows this segment."""
        own = [number for number, one in enumerate(said) if one.sampled]
        told = [
            replace(one, more={**one.more, "is_error": True})
            if one.role == "tool" and _ERROR_LINE.search(one.content)
            else replace(one, role=one.role if one.sampled or one.role != "assistant" else "user")
            for one in said
        ]
        trained = chosen(told, self.config)
        mask = columns["loss_mask"]
        begins = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
        number_T = np.searchsorted(begins, np.arange(len(mask)), side="right") - 1  # of the turn
        if len(begins) != len(own):  # turns without a token: they cannot be told apart
            return columns if self.config.turns == "all" or last else _untrained(columns)
        kept = np.array([number in trained.turns and (self.config.turns == "all" or last) for number in own])
        failed = np.array([number in trained.marked for number in own])
        columns = columns.having(loss_mask=mask & kept[number_T])
        return columns.having(failed=columns["loss_mask"] & failed[number_T]) if failed.any() else columns


def _written(place: str) -> CorpusError:
    """For a row that no model sampled: generation ended for no reason."""
    return refused(
        "not sampled",
        place,
        "no model sampled it: its run learned from what is written (objective next_token, preference, or distil "
        "without distil.on_policy), and nobody graded that. In corpus.sources name what that run read: the "
        "corpus.sources of its config.json.",
    )


def _untrained(columns: Columns) -> Columns:
    return columns.having(loss_mask=np.zeros(len(columns), bool))
