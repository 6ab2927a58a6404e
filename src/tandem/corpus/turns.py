"""A conversation to tokens: each of the assistant's turns behind exactly what the model would be given to answer.

A turn is rendered as the end of the conversation so far, and the tokens before it have to be those that ask for it: so
turn by turn and whole they are the same. Where the template rewrites earlier turns once later ones are there (it drops
their reasoning), no one sequence has all turns as they would be sampled; such a conversation becomes several.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tandem.columns import Columns
from tandem.corpus.chats import REASONING
from tandem.corpus.reader import refused
from tandem.errors import ModelError
from tandem.program.formats.choose import FORMATS
from tandem.program.formats.parsed import Tools, thought
from tandem.types import Message

if TYPE_CHECKING:
    from tandem.corpus.config import CorpusConfig
    from tandem.program.render import Renderer

_ERROR = re.compile(r"\s*(error\b|traceback \(most recent call last\))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trained:
    """Which of a conversation's messages are learned, by their places."""

    turns: frozenset[int]
    marked: frozenset[int] = frozenset()  # of these, what failed


@dataclass(frozen=True, slots=True)
class Spoken:
    """A conversation as tokens."""

    segments: tuple[Columns, ...]  # one, or more where the template rewrites earlier turns; with tokens to train
    think_blocks: int = 0  # put in, where the template opens one and the turn had none


def spoken(renderer: Renderer, messages: Sequence[Message], tools: Tools, trained: Trained, place: str) -> Spoken:
    """The tokens; the loss mask covers the trained turns, end of turn included. CorpusError names the row."""
    segments, tokens, mask, failed = list[Columns](), list[int](), list[bool](), list[bool]()
    blocks = 0

    def close() -> None:
        if any(mask):
            columns = Columns.of(tokens=tokens, loss_mask=mask)
            segments.append(columns.having(failed=failed) if any(failed) else columns)

    for number in sorted(trained.turns):
        try:
            context = renderer.conversation_tokens(messages[:number], tools)
            turn, opened = _turn(renderer, messages[: number + 1], tools, context, f"{place}, message {number + 1}")
        except ModelError as error:
            raise refused("the template refuses it", place, str(error)) from error
        if context[: len(tokens)] != tuple(tokens):
            close()
            tokens, mask, failed = [], [], []
        between = len(context) - len(tokens)
        tokens += [*context[len(tokens) :], *turn]
        mask += [False] * between + [True] * len(turn)
        failed += [False] * between + [number in trained.marked] * len(turn)
        blocks += opened
    close()
    return Spoken(tuple(segments), blocks)


def _turn(
    renderer: Renderer, messages: Sequence[Message], tools: Tools, context: Sequence[int], place: str
) -> tuple[Sequence[int], bool]:
    """The tokens of the last message, with its end, and whether a think block was put in."""
    last = messages[-1]
    if renderer.plain:
        return renderer.answer_tokens(_words(renderer, last, last.content, tools)), False
    whole = renderer.said_tokens(messages, tools)
    if whole[: len(context)] != tuple(context):
        if renderer.opened:
            return _behind_opening(renderer, last, tools)
        raise _broken(renderer, context, whole, place)
    said = whole[len(context) :]
    stops = [at for at, token in enumerate(said) if token in renderer.stop_token_ids]
    if len(stops) > max(1, renderer.usual_stops):
        raise refused(
            "spells the end of a turn",
            place,
            f"the assistant's message spells {renderer.tokenizer.decode([said[stops[0]]])!r}, which ends a turn. Take "
            "it out.",
        )
    if stops:
        return said[: stops[0] + 1], False
    if not renderer.stop_token_ids:
        raise refused("no end of turn", place, "the model has no token that ends a turn, so no answer would end.")
    return (*said, renderer.stop_token_ids[0]), False


def _behind_opening(renderer: Renderer, message: Message, tools: Tools) -> tuple[Sequence[int], bool]:
    """A turn whose think block the template has begun, as the model has to go on: its reasoning, or none, and the
    answer."""
    reasoning, content = thought(message.content, renderer.opened, renderer.closes)
    own = (message.more.get(name) for name in REASONING)
    reasoning = str(next(filter(None, own), reasoning)).strip("\n")
    said = _words(renderer, message, content, tools)
    return renderer.answer_tokens(f"{reasoning}\n{renderer.closes}\n\n{said}"), not reasoning


def _words(renderer: Renderer, message: Message, content: str, tools: Tools) -> str:
    """What a turn says, its calls behind it as the model writes them."""
    calls = FORMATS[renderer.format].write(message.calls, tools) if message.calls else ""
    return "\n".join(filter(None, (content, calls)))


def _broken(renderer: Renderer, context: Sequence[int], whole: Sequence[int], place: str) -> Exception:
    """Why the turn does not stand behind what asks for it."""
    asked, said = renderer.tokenizer.decode(context), renderer.tokenizer.decode(whole)
    if said.startswith(asked):
        return refused(
            "its tokens join the template's",
            place,
            f"turn by turn it has other tokens than whole: its beginning {said[len(asked) :][:20]!r} makes one token "
            "with what the chat template writes before it. Strip the message's white space.",
        )
    at = next((n for n, (one, other) in enumerate(zip(asked, said, strict=False)) if one != other), len(said))
    return refused(
        "the template breaks it",
        place,
        f"the chat template asks for the turn behind {asked[max(0, at - 20) : at + 20]!r}, and writes it behind "
        f"{said[max(0, at - 20) : at + 20]!r}: the model would never be asked what it learned. Use another template, "
        "or task.template_arguments with which the two are alike.",
    )


def check_rendered(
    renderer: Renderer, messages: Sequence[Message], tools: Tools, seen: set[object], place: str
) -> None:
    """CorpusError where the template leaves out what a message says, its calls, or its reasoning where it is the last:
    asked once of each kind of message (`seen`)."""
    for number, message in enumerate(messages):
        thoughts = {name: f"{message.more[name]} 20417" for name in REASONING if message.more.get(name)}
        kind = (message.role, bool(message.calls), bool(message.content.strip()), bool(tools), *thoughts)
        if kind in seen:
            continue
        others = []
        if message.content.strip():
            others.append(("what it says", replace(message, content=f"{message.content.rstrip()} 20417"), messages))
        if message.calls:
            renamed = replace(message.calls[0], name=f"{message.calls[0].name}_2")
            others.append(("its calls", replace(message, calls=(renamed, *message.calls[1:])), messages))
        if thoughts and not renderer.opened:  # which _behind_opening writes
            other = replace(message, more={**message.more, **thoughts})
            others.append(("its reasoning", other, messages[: number + 1]))
        for what, other, said in others:
            changed = [*said[:number], other, *said[number + 1 :]]
            try:
                same = renderer.said_tokens(said, tools) == renderer.said_tokens(changed, tools)
            except ModelError as error:
                raise refused("the template refuses it", place, str(error)) from error
            if same:
                advice = "" if tools else " Give the row its tools, and they are described where no template knows any."
                raise refused(
                    f"the template drops {message.role}",
                    place,
                    f"the chat template leaves out {what}, of message {number + 1} (role {message.role}).{advice} Use "
                    "another template, or take such messages out.",
                )
        seen.add(kind)


def chosen(messages: Sequence[Message], config: CorpusConfig, untrained: Set[int] = frozenset()) -> Trained:
    """The assistant's turns that are learned: all or the last, but for `untrained`; and those that failed, as far as
    the config marks them."""
    own = [number for number, message in enumerate(messages) if message.role == "assistant"]
    marked = set[int]()
    for before, number in zip([None, *own], own, strict=False):
        if config.error_turns == "mark" and _went_wrong(messages, number):
            marked.add(number)
        if config.repeated_turns == "mark" and before is not None and _repeats(messages[before : number + 1]):
            marked.add(number)
    turns = frozenset(own[-1:] if config.turns == "last" else own) - untrained
    return Trained(turns, turns & marked)


def _went_wrong(messages: Sequence[Message], number: int) -> bool:
    """Whether a turn's calls could not be read, or a tool answered one with an error."""
    if messages[number].faults:
        return True
    for message in messages[number + 1 :]:
        if message.role != "tool":
            return False
        if message.more.get("is_error") or _ERROR.match(message.content):
            return True
    return False


def _repeats(since: Sequence[Message]) -> bool:
    """Whether the last message makes the calls of the first once more, and nobody asked for anything since."""
    did, does = ([(call.name, call.arguments) for call in one.calls] for one in (since[0], since[-1]))
    return did == does != [] and all(message.role != "user" for message in since)


def first_answer(messages: Sequence[Message]) -> int:
    """The place of the first message of the assistant; len(messages) where there is none."""
    return next((n for n, message in enumerate(messages) if message.role == "assistant"), len(messages))


def document(renderer: Renderer, text: str) -> Columns:
    """A text as it is, with the tokeniser's beginning and the model's end: all but the first token is trained."""
    tokens = [*renderer.tokenizer.join_messages((Message("user", text),)), *renderer.stop_token_ids[:1]]
    return Columns.of(tokens=tokens, loss_mask=np.arange(len(tokens)) > 0)
