"""The sources that a config names, as readers of what is learned by the likelihood of its tokens."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from tandem.corpus import chats
from tandem.corpus.config import FIELDS, PREFERRED, CorpusConfig
from tandem.corpus.lines import Lines, Rows, Several, Table, Texts, check_fields, check_first, finite
from tandem.corpus.pairs import messages
from tandem.corpus.reader import Reader, refused
from tandem.corpus.trajectories import RunReader, of_a_run
from tandem.corpus.turns import check_rendered, chosen, document, first_answer, spoken
from tandem.errors import CorpusError
from tandem.program.reward import clipped
from tandem.types import Group, Prompt, Trajectory

if TYPE_CHECKING:
    from tandem.program.render import Renderer

SUFFIXES = (".jsonl", ".parquet", ".txt")


def readers_of(
    config: CorpusConfig, renderer: Renderer, make: Callable[[str, str], Reader] | None = None
) -> list[Reader]:
    """A reader a source, of its likelihood or what `make` makes of a name and a source. CorpusError for one that is not
    there or not of a known kind."""
    found, names = list[Reader](), set[str]()
    for source in config.sources:
        stem = Path(source).stem.replace("*", "") or Path(source).parent.name
        name = next(one for one in (stem, *(f"{stem}-{n}" for n in range(2, len(names) + 3))) if one not in names)
        names.add(name)
        found.append(make(name, source) if make is not None else _reader(name, source, config, renderer))
    return found


def _reader(name: str, source: str, config: CorpusConfig, renderer: Renderer) -> Reader:
    path = Path(source).expanduser()
    if (path / "trajectories").is_dir() or of_a_run(path):
        return RunReader(name, path, config, renderer)
    return RowReader(name, rows_of(source, config), config, renderer)


def check_sources(config: CorpusConfig) -> None:
    """CorpusError for a source that is not there or of no known kind: asked before a model is read."""
    for source in config.sources:
        if not (Path(source).expanduser() / "trajectories").is_dir():
            files_of(source)


def files_of(source: str) -> list[Path]:
    """A file, or all files of a pattern, in the order of their names."""
    path = Path(source).expanduser()
    paths = [Path(one) for one in sorted(glob.glob(str(path)))] if not path.exists() else [path]
    if not paths:
        raise CorpusError("no file", f"corpus.sources names {source}, which is not there. Check the path.")
    for one in paths:
        if one.suffix.lower() not in SUFFIXES:
            kind = "a folder that holds no run (no trajectories/)" if one.is_dir() else "of no kind that is known"
            raise CorpusError(
                "no file", f"corpus.sources names {one}, {kind}. Allowed: {', '.join(SUFFIXES)}, a run folder."
            )
    return paths


def rows_of(source: str, config: CorpusConfig) -> Rows:
    """The rows of a source's files."""
    paths = files_of(source)
    texts = [one for one in paths if one.suffix.lower() == ".txt"]
    parts: list[Rows] = [Texts(texts, config.field("text"))] if texts else []
    for one in paths:
        if one.suffix.lower() == ".jsonl":
            parts.append(Lines(one))
        elif one.suffix.lower() == ".parquet":
            parts.append(Table(one, config))
    rows = parts[0] if len(parts) == 1 else Several(parts)
    if all(isinstance(one, Lines) for one in parts):
        check_first(rows, config, source)
    return rows


class RowReader:
    """Chats and documents: a row has `messages` (OpenAI's), `conversations` (ShareGPT), `prompt` and `completion` or a
    `text`, and may have `tools`, `system`, a `reward` (1 otherwise) and a `task`.

    Rows of a reward below corpus.reward_at_least are not listed.
    """

    def __init__(self, name: str, rows: Rows, config: CorpusConfig, renderer: Renderer) -> None:
        self.name, self.rows, self.config, self.renderer = name, rows, config, renderer
        least = config.reward_at_least
        self._numbers = range(len(rows)) if least is None else [n for n in range(len(rows)) if self._earns(n, least)]
        self.left_out = {} if least is None else {f"of a reward below {least:g}": len(rows) - len(self._numbers)}
        # What is asked of the rows changes what is listed.
        self.digest = rows.digest if least is None else f"{rows.digest} {least!r}"
        self._rendered: set[object] = set()  # kinds of messages that the template is known to write

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, number: int) -> str:
        return self.rows.place(self._numbers[number])

    def group(self, number: int) -> Group:
        place, row = self.place(number), self.rows.row(self._numbers[number])
        found: dict[str, Any] = {name: row.get(self.config.field(name)) for name in FIELDS}
        check_fields([name for name, value in row.items() if value is not None], self.config, place, "field")
        task, reward = found["task"], self._reward(row, place)
        record = {} if task is None else {"task": str(task)}
        name = f"{self.name}/{number}"
        if all(found[known] is None for known in ("messages", "conversations", "text")):
            found["messages"] = _answered(found, row, place)
        if found["messages"] is None and found["conversations"] is None:
            if not isinstance(found["text"], str) or not found["text"].strip():
                raise refused("an empty text", place, f"its text is {clipped(found['text'])}.")
            columns = document(self.renderer, found["text"])
            # A document is a task of its own, whatever else begins like it.
            digest = {"task": xxhash.xxh3_128(found["text"].encode()).hexdigest()}
            return Group(Prompt(name, (), digest | record), (Trajectory(name, name, columns, reward),))
        if found["messages"] is not None:
            chat = chats.openai(found["messages"], found["system"], found["tools"], place)
        else:
            chat = chats.sharegpt(found["conversations"], found["system"], found["tools"], place)
        return self._chat(name, place, chat, record, reward)

    def _reward(self, row: Mapping[str, Any], place: str) -> float:
        own = self.config.field("reward")
        if row.get(own) is not None:
            return finite({"reward": row[own]}, "reward", place)
        if self.config.reward_at_least is None:
            return 1.0
        raise refused(
            "no reward",
            place,
            f"corpus.reward_at_least is {self.config.reward_at_least:g}, and the row has no {own}. Give each row one, "
            "or leave corpus.reward_at_least out.",
        )

    def _earns(self, number: int, least: float) -> bool:
        """Whether a row is listed; so is one that cannot be read, whose error is told in its turn."""
        try:
            return self._reward(self.rows.row(number), self.rows.place(number)) >= least
        except CorpusError:
            return True

    def _chat(self, name: str, place: str, chat: chats.Chat, record: Mapping[str, Any], reward: float) -> Group:
        check_rendered(self.renderer, chat.messages, chat.tools, self._rendered, place)
        trained = chosen(chat.messages, self.config, chat.untrained)
        found = spoken(self.renderer, chat.messages, chat.tools, trained, place)
        if not found.segments:
            raise refused("nothing to learn", place, "none of the assistant's turns is trained.")
        first = first_answer(chat.messages)
        prompt = Prompt(name, chat.messages[:first], record, tuple(chat.tools))
        counts = {"think_blocks": found.think_blocks} if found.think_blocks else {}
        segments = tuple(
            Trajectory(
                name,
                name,
                columns,
                reward,
                counts={} if number else counts,
                segment=number,
                cause="template" if number else "",
                said=() if number else chat.messages[first:],
            )
            for number, columns in enumerate(found.segments)
        )
        return Group(prompt, segments)


def _answered(found: Mapping[str, Any], row: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """A prompt and its completion as messages, of which the completion's are trained. CorpusError for answers that are
    rated or compared: some of them are bad ones."""
    compared = any(found[name] is not None for name in PREFERRED if name not in ("prompt", "completion"))
    if compared or found["prompt"] is None or found["completion"] is None:
        why = "answers that are compared, for objective=preference" if compared else "half of a chat"
        raise refused(
            "missing fields",
            place,
            f"it has {', '.join(row)}: {why}. What is learned by its likelihood has messages, conversations, a text, "
            "or prompt and completion.",
        )
    asked = messages(found["prompt"], "user", "prompt", place)
    untrained = [{**one, "weight": 0} if one.get("role") == "assistant" else one for one in asked]
    return [*untrained, *messages(found["completion"], "assistant", "completion", place)]
