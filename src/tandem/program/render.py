"""Messages to tokens by the model's own chat template, or as plain text; later turns append to the tokens there are.

Re-rendering a conversation does not give back what was sampled: templates trim, drop reasoning, or tokenise a text
in other pieces than the model wrote it. So a turn is never rendered again. What follows it is found by rendering two
conversations that differ only in what the assistant said: the tokens that both end in are what the template puts after
any assistant turn. Short made-up ones do where the template does not look at what came before; the first observation of
each kind and depth is found both ways, and where they differ the real conversation is used from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tandem.errors import ModelError
from tandem.types import Message

# Answers that end in other tokens, hold nothing a template trims, and begin and end no longer token with what follows.
_ANSWERS = ("yes", "42")
_QUESTION = (Message("user", "?"),)


class ChatTokenizer(Protocol):
    """What rendering needs of models/tokenizer.py."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, add_special_tokens: bool, /) -> list[int]: ...

    def decode(self, tokens: Sequence[int], /) -> str: ...

    def render_messages(
        self, messages: Sequence[Message], add_generation_prompt: bool, /, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...


Tools = Sequence[Mapping[str, Any]]  # JSON schemas, as the template takes them


class Renderer:
    """Tokens of prompts and of what follows a turn, and the text of what was sampled.

    `plain`: no chat template; a prompt is its messages' texts with a blank line between, after the tokeniser's own bos.
    """

    def __init__(self, tokenizer: ChatTokenizer, plain: bool = False) -> None:
        self.tokenizer = tokenizer
        self.plain = plain
        self.stop_token_ids = tuple(tokenizer.stop_token_ids)
        self._made_up: dict[
            tuple[int | str, ...], bool
        ] = {}  # by messages before and roles: whether they are all it needs

    def prompt_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """The messages as the model expects them, up to where it is to answer.

        ModelError where the prompt has tools and the model is not told of them.
        """
        rendered = tuple(self._render(messages, True, tools))
        if tools and rendered == tuple(self._render(messages, True)):
            raise ModelError(
                "the prompt has tools, but the model's chat template leaves them out. Use a model whose template takes "
                "tools, or describe them in the prompt's messages."
            )
        return rendered

    def answer_tokens(self, text: str) -> tuple[int, ...]:
        """A given answer as the model is to write it: its tokens and the end of turn, stop token included."""
        tokens = tuple(self.tokenizer.encode(text, False))
        closing = () if self.plain else self._after_answer((), False, _QUESTION, ())
        ends = [place for place, token in enumerate(closing) if token in self.stop_token_ids]
        return (*tokens, *(closing[: ends[0] + 1] if ends else self.stop_token_ids[:1]))

    def text(self, tokens: Sequence[int]) -> str:
        """What sampled tokens say, without the stop token that ended them."""
        ended = len(tokens) > 0 and tokens[-1] in self.stop_token_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)

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
        closing = self._after_answer((), False, *given)
        for place, (token, closing_token) in enumerate(zip(following, closing, strict=False)):
            if token != closing_token:
                break
            if token in self.stop_token_ids:
                return following[place + 1 :]
        return following

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
            return self.tokenizer.encode("\n\n".join(message.content for message in messages), True)
        if tools:
            return self.tokenizer.render_messages(messages, add_generation_prompt, tools=tools)
        return self.tokenizer.render_messages(messages, add_generation_prompt)


def _common_suffix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        length += 1
    return length
