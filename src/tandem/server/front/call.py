"""What of a call's body says where it goes: its program, its prefix in blocks of bytes, how much it may come to hold.

The router takes no tokens: what two calls have in common as text, they have in common as tokens, up to the block where
they part. A body that can't be read goes to any engine, which says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import Request

from tandem.engine.programs import Programs
from tandem.server.lineage import chain

BLOCK = 256  # bytes a block; each message begins a new one
MOST = 1024  # blocks that are looked at, from the first on
TEXT_TOKEN = 4  # bytes a token, about
ANSWER_TOKENS = 256  # of an answer, where no bound is said
MOST_TOKENS = 1 << 20  # of an answer, whatever bound is said: the engine refuses what it cannot hold


class _Body(msgspec.Struct):
    """What is looked at. Values of any kind: the engine judges them."""

    model: Any = None
    tools: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input_ids: msgspec.Raw = msgspec.Raw(b"")
    program_id: Any = None
    tenant: Any = None
    n: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    sampling_params: Any = None


class Call:
    """One, as it came."""

    def __init__(self, request: Request, body: bytes, tenant: str) -> None:
        self.method = request.method
        scope = request.scope
        self.target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        self.headers = request.headers.raw
        self.body = body
        self.id = request.headers.get("x-request-id", "a call")
        try:
            said = msgspec.json.decode(body, type=_Body) if body else _Body()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            said = _Body()
        self._said = said
        self.tenant = _text(said.tenant) or request.headers.get("x-tenant", "") or tenant
        program = _text(said.program_id) or request.headers.get("x-program-id", "")
        self.program = Programs.name(self.tenant, program) if program else ""  # as engines know it
        self.answers, self.tokens = self._expected()

    def keys(self) -> list[bytes]:
        """Of the blocks of what is asked, each of all up to its end."""
        return list(chain(f"{self.tenant}\n{self.target!r}\n{_text(self._said.model)}", self._units()))

    def _units(self) -> Iterator[bytes]:
        said, count = self._said, 0
        if before := bytes(said.tools) + bytes(said.instructions):
            yield before
        for part in (said.messages, said.input, said.prompt, said.input_ids):
            for block in _blocks(bytes(part)):
                yield block
                count += 1
                if count >= MOST:
                    return

    def _expected(self) -> tuple[int, int]:
        """Answers, and tokens that these may come to hold with the prompt, about."""
        said = self._said
        few = said.sampling_params if isinstance(said.sampling_params, dict) else {}
        bounds = (said.max_tokens, said.max_completion_tokens, said.max_output_tokens, few.get("max_new_tokens"))
        most = next((bound for bound in bounds if isinstance(bound, int) and bound > 0), ANSWER_TOKENS)
        choices = min(1024, next((n for n in (said.n, few.get("n")) if isinstance(n, int) and n > 0), 1))
        return choices, len(self.body) // TEXT_TOKEN + min(most, MOST_TOKENS) * choices


def _blocks(part: bytes) -> Iterator[bytes]:
    """
    >>> list(_blocks(b'[{"a":1}, {"b":2}]')), [len(block) for block in _blocks(b'"' + b"x" * 300 + b'"')]
    ([b'{"a":1}', b'{"b":2}'], [256, 46])
    """
    pieces: list[Any] = [part.removesuffix(b"]")]
    if part[1:].lstrip()[:1] == b"{":
        try:
            pieces = msgspec.json.decode(part, type=list[msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
    for piece in pieces:
        text = bytes(piece)
        yield from (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def _text(given: Any) -> str:
    return given if isinstance(given, str) else ""
