"""Messages to tokens by the model's own chat template, or as plain text, and sampled tokens to messages.

Re-rendering a conversation does not give back what was sampled: templates trim, drop reasoning, or tokenise a text
in other pieces than the model wrote it. So a turn is not rendered again (but by `rollout.history=render`, which checks
it: rollout/history.py). What follows it is found by rendering two conversations that differ only in what the assistant
said: the tokens that both end in are what the template puts after any assistant turn. Short made-up ones do where the
template does not look at what came before; the first observation of each kind and depth is found both ways, and where
they differ the real conversation is used from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.program.formats.choose import FORMATS, PROBE, PROBE_CALL, CallFormat, format_of
from tandem.program.formats.describe import describe
from tandem.program.formats.parsed import Parsed, Tools, thought
from tandem.types import Message

if TYPE_CHECKING:
    from tandem.models.tokenizer import Tokenizer
    from tandem.program.config import TaskConfig

# Answers that end in other tokens, hold nothing a template trims, and begin and end no longer token with what follows.
_ANSWERS = ("yes", "42")
_QUESTION = (Message("user", "?"),)
_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


class ChatTokenizer(Protocol):
    """What rendering needs of models/tokenizer.py."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, add_special_tokens: bool, /) -> list[int]: ...

    def decode(self, tokens: Sequence[int], /) -> str: ...

    def join_messages(self, messages: Sequence[Message], /) -> list[int]: ...

    def spelt(self, messages: Sequence[Message], /) -> int: ...

    def render_messages(
        self, messages: Sequence[Message], add_generation_prompt: bool, /, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...


class Renderer:
    """Tokens of prompts and of what follows a turn, and the messages that sampled tokens make.

    `plain`: no chat template; a prompt is its messages' texts with a blank line between, after the tokeniser's own bos.
    `tool_format`: see TaskConfig. Where the template knows no tools, a system message describes a prompt's.
    """

    def __init__(self, tokenizer: ChatTokenizer, plain: bool = False, tool_format: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.plain = plain
        self.tool_format = tool_format
        self.stop_token_ids = tuple(tokenizer.stop_token_ids)
        self.spelt_tokens = 0  # control tokens that prompts and observations have spelt so far
        # By messages before and roles: whether they are all it needs.
        self._made_up: dict[tuple[int | str, ...], bool] = {}

    @cached_property
    def format(self) -> str:
        """The name in FORMATS by which calls are read and written."""
        return self.tool_format if self.tool_format != "auto" else self._written or "fenced"

    @cached_property
    def describes(self) -> bool:
        """Whether the template leaves tools out, so that a system message has to tell of them."""
        if self.plain:
            return True
        try:
            told = self._render(_QUESTION, True, PROBE) != self._render(_QUESTION, True)
        except ModelError:  # it wants another conversation than a question alone; what it does with tools it will say
            return False
        if told and not self._written and self.tool_format == "auto":
            warnings.warn(
                "the model's chat template takes tools, but how it writes a call is no format that is known: calls are "
                "read from fenced code. Set task.tool_format to the one that the model was trained with.",
                TandemWarning,
                stacklevel=2,
            )
        return not told

    def prompt_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """The messages as the model expects them, up to where it is to answer."""
        return self.conversation_tokens(messages, tools, messages)

    def conversation_tokens(
        self, messages: Sequence[Message], tools: Tools = (), new: Sequence[Message] = ()
    ) -> tuple[int, ...]:
        """`prompt_tokens` of messages of which `new` have not been rendered before."""
        self.spelt_tokens += self.tokenizer.spelt(new)
        messages, tools = self._told(messages, tools)
        return tuple(self._render(messages, True, tools))

    def said_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """A conversation that is over: nothing is asked behind it."""
        messages, tools = self._told(messages, tools)
        return tuple(self._render(messages, False, tools))

    def answer_tokens(self, text: str) -> tuple[int, ...]:
        """A given answer as the model is to write it: its tokens and the end of turn, stop token included."""
        tokens = tuple(self.tokenizer.encode(text, False))
        closing = () if self.plain else self._closing
        ends = [place for place, token in enumerate(closing) if token in self.stop_token_ids]
        return (*tokens, *(closing[: ends[0] + 1] if ends else self.stop_token_ids[:1]))

    def text(self, tokens: Sequence[int]) -> str:
        """What sampled tokens say, without the stop token that ended them."""
        ended = len(tokens) > 0 and tokens[-1] in self.stop_token_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)

    def message(self, tokens: Sequence[int], tools: Tools = (), number: int = 0, *, parsed: bool = False) -> Message:
        """What sampled tokens say, as a message: taken apart where there are tools, a format is set, or `parsed`.

        `number`: of messages before it; calls that the model gave no id, or one twice, get one of it, nine digits
        (which Mistral's templates ask for).
        """
        text = self.text(tokens)
        if not (tools or parsed or self.tool_format != "auto"):
            return Message("assistant", text, sampled=True)
        found = self.parsed(self.opened + text, tools)
        ids = [call.id for call in found.calls]
        calls = tuple(
            call if call.id and ids.count(call.id) == 1 else replace(call, id=f"{number:06d}{place:03d}")
            for place, call in enumerate(found.calls)
        )
        more = {"reasoning_content": found.reasoning} if found.reasoning else {}
        return Message("assistant", found.content, calls, more=more, faults=found.faults, sampled=True)

    def observation_tokens(
        self,
        completion: Sequence[int],
        messages: Sequence[Message],
        before: Sequence[Message] | None = None,
        tools: Tools = (),
    ) -> tuple[int, ...]:
        """What to append after the sampled tokens `completion` so that `messages` follow and the model answers next.

        `before`: what was said up to the completion, where it is known. Where the completion ends in a stop token, the
        template's own end of turn is left out up to and including its stop token; where it does not (length, stop
        string), the end of turn comes first. None of it is trained on.
        ModelError where the template renders nothing of what the assistant said.
        """
        self.spelt_tokens += self.tokenizer.spelt(messages)
        if tools and self.describes:
            messages = self._plainly(messages, tools)
            if before is not None:
                before, tools = self._told(before, tools)
        asked: Sequence[Message] = _QUESTION
        if before is not None and not self.plain:
            kind = (len(before), "tools" if tools else "", *(message.role for message in messages))
            if kind not in self._made_up:
                real = self._after_answer(messages, True, before, tools)
                self._made_up[kind] = real == self._after_answer(messages, True, _QUESTION, ())
            if not self._made_up[kind]:
                asked = before
        given = (asked, tools if asked is before else ())
        following = self._after_answer(messages, True, *given)
        ended = len(completion) > 0 and completion[-1] in self.stop_token_ids
        if not ended:
            return following
        closing = self._after_answer((), False, *given) if asked is before else self._closing
        for place, (token, closing_token) in enumerate(zip(following, closing, strict=False)):
            if token != closing_token:
                break
            if token in self.stop_token_ids:
                return following[place + 1 :]
        return following

    @cached_property
    def usual_stops(self) -> int:
        """Stop tokens that the template writes at the end of an answer which has none in it."""
        return sum(token in self.stop_token_ids for token in self.answer_tokens("42"))

    @property
    def _reads(self) -> CallFormat:
        return FORMATS[self.format]

    def parsed(self, text: str, tools: Tools) -> Parsed:
        """A turn's text, from its reasoning's opening on, by its parts."""
        if not tools and self._reads.plain and self.tool_format == "auto":  # code that nobody could mean as a call
            reasoning, content = thought(text)
            return Parsed(content, reasoning)
        return self._reads.parse(text, tools)

    @cached_property
    def opened(self) -> str:
        """The start of a reasoning that the template writes itself, as the model's first words are to follow it."""
        if self.plain:
            return ""
        try:
            written = self.tokenizer.decode(self.asks)
        except ModelError:
            return ""
        return next((opening for opening, closing in _THOUGHTS if written.rfind(opening) > written.rfind(closing)), "")

    @cached_property
    def closes(self) -> str:
        """What ends the reasoning that `opened` begins; "" where the template begins none."""
        return dict(_THOUGHTS).get(self.opened, "")

    @cached_property
    def asks(self) -> tuple[int, ...]:
        """What the template writes between a question and the answer: the beginning of an assistant's turn."""
        asked, asks = self._render(_QUESTION, False), self._render(_QUESTION, True)
        return tuple(asks[len(asked) :])

    @cached_property
    def _written(self) -> str:
        """The format in which the template writes a call; "" where it is none that is known, or it writes none."""
        if self.plain:
            return ""
        try:
            said = self._render((*_QUESTION, Message("assistant", "42")), False, PROBE)
            called = self._render((*_QUESTION, Message("assistant", "", calls=(PROBE_CALL,))), False, PROBE)
        except ModelError:
            return ""
        start = _common_suffix(said[::-1], called[::-1])
        end = len(called) - _common_suffix(said[start:], called[start:])
        return format_of(self.tokenizer.decode(called[start:end]))

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        """What the template puts after an assistant's turn that nothing follows."""
        return self._after_answer((), False, _QUESTION, ())

    def _told(self, messages: Sequence[Message], tools: Tools) -> tuple[Sequence[Message], Tools]:
        """What the template is given for messages and tools: where it knows none, words for them."""
        if not tools or not self.describes:
            return messages, tools
        words = describe(tools, self._reads.write)
        messages = self._plainly(messages, tools)
        if messages and messages[0].role == "system":
            return (replace(messages[0], content=f"{messages[0].content}\n\n{words}"), *messages[1:]), ()
        if self._takes_system:
            return (Message("system", words), *messages), ()
        return (replace(messages[0], content=f"{words}\n\n{messages[0].content}"), *messages[1:]), ()

    @cached_property
    def _takes_system(self) -> bool:
        try:
            return bool(self._render((Message("system", "?"), *_QUESTION), True))
        except ModelError:
            return False

    def _plainly(self, messages: Sequence[Message], tools: Tools) -> tuple[Message, ...]:
        """Messages for a template that knows no tools: calls as the text they were, results as a user's message."""
        plain: list[Message] = []
        for message in messages:
            if message.calls:
                text = self._reads.write(message.calls, tools)
                message = replace(message, content="\n".join(filter(None, (message.content, text))), calls=())
            if message.role == "tool":
                message = Message("user", message.content)
                if plain and plain[-1].role == "user":  # templates that take turns take one
                    message = Message("user", f"{plain.pop().content}\n{message.content}")
            plain.append(message)
        return tuple(plain)

    def _after_answer(
        self, messages: Sequence[Message], add_generation_prompt: bool, before: Sequence[Message], tools: Tools
    ) -> tuple[int, ...]:
        """The tokens that the template puts after the content of an assistant's turn that follows `before`."""
        renderings = [
            self._render((*before, Message("assistant", answer), *messages), add_generation_prompt, tools)
            for answer in _ANSWERS
        ]
        length = _common_suffix(*renderings)
        if length == min(len(rendering) for rendering in renderings):
            raise ModelError(
                "the model's chat template leaves out what the assistant said, so a later turn cannot keep its tokens. "
                "Set rollout.max_turns=1 or use another chat template."
            )
        return tuple(renderings[0][len(renderings[0]) - length :])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> list[int]:
        if self.plain:
            return self.tokenizer.join_messages(messages)
        if tools:
            return self.tokenizer.render_messages(messages, add_generation_prompt, tools=tools)
        return self.tokenizer.render_messages(messages, add_generation_prompt)


def renderer_of(tokenizer: Tokenizer, task: TaskConfig) -> Renderer:
    """How a task's messages become tokens; the tokeniser takes its template arguments and what control tokens are.

    ModelError where it asks for a template that the model lacks, ConfigError for an argument that none reads.
    """
    if task.format == "chat" and tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.origin} has no chat template, and chat was asked for. Use the instruct version of the "
            "model, put a chat_template.jinja beside its tokenizer.json, or give plain text: task.format=plain, or "
            "generate --raw."
        )
    plain = task.format == "plain" or tokenizer.chat_template is None
    if plain and task.template_arguments:
        raise ConfigError(
            f"task.template_arguments is set, and prompts are plain text: {tokenizer.origin} has no chat template, or "
            "task.format is plain. Take it out."
        )
    tokenizer.spelt_as_text = task.control_tokens == "text"
    tokenizer.take_arguments(task.arguments(), "task.template_arguments")
    return Renderer(tokenizer, plain, task.tool_format)


def _common_suffix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        length += 1
    return length
