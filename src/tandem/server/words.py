"""Texts and messages to token ids and back, by the model's own tokeniser and chat template; one at a time, in a thread
of its own, so that a long prompt does not hold up the streams of others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import msgspec

from tandem.errors import TandemError
from tandem.models.tokenizer import Tokenizer, byte_alphabet
from tandem.program.config import half_character
from tandem.program.formats.parsed import MOST_DEPTH, Malformed, Tools, as_call
from tandem.program.render import Renderer
from tandem.server import bodies
from tandem.server.refusal import Refusal, refused
from tandem.server.turn import MARKERS, TAGS, TAGS_OF, Turn
from tandem.types import Message, Sampling

T = TypeVar("T")


class Words:
    """opening: messages before a conversation that has no system message."""

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer, opening: Sequence[Message] = ()) -> None:
        self.tokenizer = tokenizer
        tokenizer.yields = True
        self.renderer = renderer
        self.opening = tuple(opening)
        self._thread = ThreadPoolExecutor(1, "words")
        self._longest = max(map(len, tokenizer.backend.get_vocab()), default=1)  # characters of a token
        self._bytes = {character: byte for byte, character in enumerate(byte_alphabet())}

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` gives, in the thread of the words."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TandemError as error:
            raise refused(error) from error

    def check_chat(self, messages: Sequence[bodies.Said], tools: Sequence[Any], context: int) -> None:
        """`check_length` of a conversation, before anything of it is read; a message is a token at least."""
        if len(messages) > context:
            said = f"there are {len(messages)} messages, and the context holds {context} tokens."
            raise Refusal(400, said, "context_length_exceeded", "messages")
        described = len(msgspec.json.encode(tools)) if tools else 0
        self.check_length(described + sum(map(_characters, messages)), context)

    def check_length(self, characters: int, context: int) -> None:
        """400 for a text of more tokens than a context has, however it is split."""
        if characters > 2 * context * self._longest:
            said = f"the prompt has {characters} characters, more than the {context} tokens of the context can spell."
            raise Refusal(400, said, "context_length_exceeded", "prompt")

    async def chat(self, messages: Sequence[Message], tools: Tools) -> tuple[int, ...]:
        """A conversation up to where the model answers. 400 where the template takes no such one."""
        return await self.aside(partial(self._chat, messages, tools))

    def _chat(self, messages: Sequence[Message], tools: Tools) -> tuple[int, ...]:
        if messages[0].role != "system":
            messages = (*self.opening, *messages)
        self.tokenizer.now = datetime.now()
        return self.renderer.prompt_tokens(messages, tools)

    async def plain(self, text: str, special: bool = True) -> tuple[int, ...]:
        """A text as it stands, behind the tokeniser's own bos."""
        if half := half_character(text):
            raise Refusal(400, f"the text {half}", "invalid_value")
        return await self.aside(lambda: tuple(self.tokenizer.encode(text, special)))

    def turn(self, tools: Tools) -> Turn:
        """What takes an answer apart."""
        reads, opened = self.renderer.format, self.renderer.opened
        tags = TAGS_OF.get(reads, TAGS)
        if not tools and reads != "harmony":
            return Turn(opened, None, None, tags)
        return Turn(opened, lambda text: self.renderer.parsed(text, tools), MARKERS.get(reads), tags)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text; of one that is half a character, its bytes."""
        spelt = self.tokenizer.backend.id_to_token(token) or ""
        text = self.tokenizer.decode([token])
        if "�" in text and all(character in self._bytes for character in spelt):
            return bytes(self._bytes[character] for character in spelt)
        if "�" in text and spelt.startswith("<0x") and len(spelt) == 6:
            return bytes.fromhex(spelt[3:5])
        return text.encode()

    def spelt(self, token: int) -> str:
        """A token's text; of one that is half a character, its bytes, as OpenAI writes them."""
        content = self.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def ends(self, sampling: Sampling) -> frozenset[int]:
        """Tokens that end a turn and are no text of it."""
        return frozenset(sampling.stop_token_ids)


def tools_of(given: Sequence[bodies.Tool]) -> list[dict[str, Any]]:
    """As chat templates take them."""
    found = []
    for tool in given:
        function = {"name": tool.function.name, "description": tool.function.description or ""}
        parameters = tool.function.parameters
        if parameters is not None and _depth(parameters) > MOST_DEPTH:
            raise Refusal(400, f"the parameters of tool {tool.function.name} nest too deep.", "invalid_value", "tools")
        found.append(
            {
                "type": "function",
                "function": {**function, "parameters": parameters or {"type": "object", "properties": {}}},
            }
        )
    return found


def messages_of(given: Sequence[bodies.Said]) -> tuple[Message, ...]:
    """A conversation; Refusal names the message that is none."""
    return tuple(_message(f"messages[{place}]", one) for place, one in enumerate(given))


def _message(where: str, said: bodies.Said) -> Message:
    if said.tool_calls and said.role != "assistant":
        raise Refusal(400, f"{where}: only an assistant's message calls tools.", "invalid_value", where)
    if said.role == "tool" and not said.tool_call_id:
        raise Refusal(400, f"{where}: a tool's message needs tool_call_id.", "missing_required_parameter", where)
    if said.content is None and said.role != "assistant":
        raise Refusal(400, f"{where}: content is missing.", "missing_required_parameter", f"{where}.content")
    content = said.content if isinstance(said.content, str) else _joined(where, said.content or ())
    calls = []
    for call in said.tool_calls or ():
        try:
            named = {"name": call.function.name, "arguments": call.function.arguments or "{}", "id": call.id}
            calls.append(as_call(named))
        except Malformed as error:
            raise Refusal(400, f"{where}.tool_calls: {error}", "invalid_value", f"{where}.tool_calls") from error
    more = {"name": said.name} if said.name else {}
    more |= {"reasoning_content": said.reasoning_content} if said.reasoning_content else {}
    message = Message(
        "system" if said.role == "developer" else said.role, content, tuple(calls), said.tool_call_id or "", more
    )
    if half := half_character(json.dumps(msgspec.to_builtins(message.row()), ensure_ascii=False)):
        raise Refusal(400, f"{where} {half}", "invalid_value", where)
    return message


def _characters(said: bodies.Said) -> int:
    content = said.content or ""
    texts = [content] if isinstance(content, str) else [part.text or part.refusal or "" for part in content]
    return sum(map(len, texts)) + sum(len(call.function.arguments) for call in said.tool_calls or ())


def _joined(where: str, parts: Sequence[bodies.Part]) -> str:
    texts = []
    for place, part in enumerate(parts):
        text = part.text if part.type in ("text", "input_text", "output_text") else part.refusal
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            said = f"{where}.content[{place}] is of type {part.type!r}. This model reads text alone."
            raise Refusal(400, said, "unsupported_content", f"{where}.content")
        texts.append(text)
    return "".join(texts)


def _depth(value: Any, depth: int = 0) -> int:
    if depth > MOST_DEPTH or not isinstance(value, dict | list):
        return depth
    inside = value.values() if isinstance(value, dict) else value
    return max((_depth(one, depth + 1) for one in inside), default=depth)
