"""What a generated text has to be: which tokens may come next, by llguidance, and why a text is not what was asked.

A constraint is read at the door: what llguidance cannot hold is refused there, by name, and nothing of it is dropped
(docs/structured.md has the table). From then on a token is drawn from those that some text of the constraint goes on
with. A stop token of the request is among them exactly where the text may end, and no other end is: where nothing else
may follow, the text ends by force. Where max_new_tokens end it first it is incomplete, as the stop reason says.

A matcher is a function of the tokens that it has seen: after a preemption it is still right, and one of a request that
carries tokens reads these first. llguidance and the validator are imported when a constraint is first asked for.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np

from tandem.errors import ConfigError
from tandem.types import Constraint, Request, kept_of

if TYPE_CHECKING:
    from tandem.engine.batch import Batch
    from tandem.engine.batch import Sequence as LiveSequence

KINDS = get_args(get_type_hints(Constraint)["kind"])
MOST_COMPILED, MOST_MASKS = 256, 1024  # of one tokeniser; a mask takes a bit a token of the vocabulary
SHOWN = 300  # characters of a reason
# Whitespace between tokens of JSON ends: a model that writes on and on comes to a token at last.
JSON = {"whitespace_pattern": r"[ \n\r\t]{0,32}", "json_allow_general_unicode_escapes": True}
HELD = {"lenient": False, "coerce_one_of": False, "item_separator": ",", "key_separator": ":"}  # whatever a schema says


class Grammars:
    """Compiled constraints of one tokeniser, for a model of `vocab_size` ids. `check` may be called from any thread.

    tokenizer_json: the tokeniser as its tokenizer.json has it.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int) -> None:
        self._json = tokenizer_json
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # guards the next three
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()  # the least recently used first
        self._masks: dict[bytes, bytes] = {}  # words -> kept set, so that equal ones are one object

    def check(self, request: Request) -> None:
        """ConfigError where a request's constraint cannot be held, or its text could not end."""
        constraint = request.constraint
        if constraint is None:
            return
        try:
            self._matcher(constraint)
        except ConfigError as error:
            raise ConfigError(f"request {request.id!r}: {error}") from error
        if not request.sampling.stop_token_ids:
            raise ConfigError(
                f"request {request.id!r} has a constraint and no stop_token_ids, so that a text that is complete could "
                "not end. Give the tokeniser's stop tokens."
            )

    def fill(self, batch: Batch, live: Mapping[str, LiveSequence]) -> None:
        """The masks of a batch's draws, of which none is pending; or why a draw has none."""
        end = 0
        for work in batch.all_works:
            draw, end = end, end + work.draws
            sequence = live.get(work.request.id)
            if work.request.constraint is None or sequence is None or sequence.arrival != work.sequence:
                continue
            if not work.draws:
                continue
            if sequence.matcher is None:
                sequence.matcher = self.matcher(work.request)
            try:
                masks = sequence.matcher.masks(sequence.tokens, work.tokens[len(work.tokens) - work.draws + 1 :])
            except DeadEnd as error:
                batch.barred[draw] = str(error)
                continue
            batch.masks.update(zip(range(draw, end), masks, strict=False))

    def matcher(self, request: Request) -> Matcher:
        """Where the text of a request is in its constraint, which was checked: at its beginning."""
        assert request.constraint is not None, request.id
        state = self._matcher(request.constraint).deep_copy()
        return Matcher(self, state, len(request.tokens) - request.carried, request.sampling.stop_token_ids)

    def kept(self, state: Any, stop_token_ids: Sequence[int]) -> bytes:
        """The ids that may follow, as `types.kept_ids` reads them. DeadEnd where none may."""
        words = np.frombuffer(state.compute_bitmask(), np.uint32)[: -(-self._vocab_size // 32)].copy()
        if state.is_error():
            raise DeadEnd(f"its constraint cannot be followed: {_clipped(state.get_error())}")
        if self._vocab_size % 32:
            words[-1] &= (1 << self._vocab_size % 32) - 1
        for token in (self._tokenizer.eos_token, *stop_token_ids):  # the first is that of _with_an_end
            if token < self._vocab_size:
                words[token // 32] &= ~np.uint32(1 << token % 32)
        if state.is_accepting():
            for token in stop_token_ids:
                words[token // 32] |= np.uint32(1 << token % 32)
        with self._lock:
            content = words.tobytes()
            if content not in self._masks:
                if not words.any():
                    raise DeadEnd("no token of the vocabulary goes on with its text as the constraint asks")
                if len(self._masks) >= MOST_MASKS:
                    self._masks.clear()
                self._masks[content] = kept_of(words)
            return self._masks[content]

    def _matcher(self, constraint: Constraint) -> Any:
        """Its matcher at the beginning, not to be moved. ConfigError where it cannot be held."""
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
                return self._compiled[constraint]
        grammar = _grammar(constraint)
        llguidance = _library("llguidance")
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = llguidance.LLTokenizer(*_with_an_end(self._json(), self._vocab_size))
                except Exception as error:
                    raise ConfigError(
                        f"constraints need a tokeniser that llguidance reads, and it refuses this one: {error}. Ask "
                        "without a constraint."
                    ) from error
        found = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if found.is_error():
            raise refused(constraint, found.get_error())
        with self._lock:
            while len(self._compiled) >= MOST_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[constraint] = found
        return found


class DeadEnd(Exception):
    """Why nothing may follow."""


class Matcher:
    """Where one text is. `masks` is asked with ever longer contexts of the same tokens."""

    def __init__(self, grammars: Grammars, state: Any, first: int, stop_token_ids: tuple[int, ...]) -> None:
        self._grammars = grammars
        self._state = state
        self._next = first  # of the context, what it has not read
        self._stops = stop_token_ids

    def masks(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> list[bytes]:
        """What may follow a context, and each of its drafts as far as they may themselves. DeadEnd where none may."""
        for token in tokens[self._next :]:
            if not self._state.consume_token(token):
                raise DeadEnd(
                    f"token {token}, in place {self._next}, does not go on as its constraint asks: "
                    f"{_clipped(self._state.get_error())}"
                )
            self._next += 1
        found, taken = [self._grammars.kept(self._state, self._stops)], 0
        try:
            for draft in drafts:
                if draft in self._stops or self._state.try_consume_tokens([draft]) == 0:
                    break  # what follows it is dropped: it ends the text, or is not drawn
                taken += 1
                found.append(self._grammars.kept(self._state, self._stops))
        finally:
            if taken:
                assert self._state.rollback(taken), self._state.get_error()
        return found


def refused(constraint: Constraint, reason: str) -> ConfigError:
    """By the library."""
    return ConfigError(
        f"its {constraint.kind} {_clipped(constraint.text)!r} cannot be held: {_clipped(reason)}. What can is in "
        "docs/structured.md; take out or rewrite what is named."
    )


def held(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as a grammar's %json takes it: nothing of it is dropped, whatever it says itself."""
    return {**schema, "x-guidance": {**JSON, **HELD}}


def unmet(constraint: Constraint, text: str) -> str:
    """Why a text is not what was asked, in a line; "" where it is. By a validator of its own for JSON.

    >>> unmet(Constraint("choice", '["yes", "no"]'), "yes"), unmet(Constraint("json_object"), '{"a": 1')
    ('', "it is no JSON: Expecting ',' delimiter at character 7")
    """
    if constraint.kind == "choice":
        return "" if text in json.loads(constraint.text) else "it is none of the choices"
    if constraint.kind in ("regex", "grammar"):
        state = _spelled(constraint).deep_copy()
        content = text.encode("utf-8", "surrogatepass")
        read = state.try_consume_tokens(list(content))
        if read < len(content):
            return f"it departs from the {constraint.kind} at byte {read}"
        return "" if state.is_accepting() else f"it ends before the {constraint.kind} does"
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except json.JSONDecodeError as error:
        return f"it is no JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    try:
        faults = list(_validator(_schema(constraint)).iter_errors(value))
    except ValueError as error:  # a number beyond what the validator holds
        return f"it cannot be validated: {_clipped(str(error))}"
    if not faults:
        return ""
    place = "/".join(map(str, faults[0].instance_path))
    return f"{_clipped(faults[0].message)}{f', at {place}' if place else ''}"


def _grammar(constraint: Constraint) -> str:
    """As llguidance reads it; ConfigError where it is no constraint at all."""
    kind, text = constraint.kind, constraint.text
    if kind not in KINDS:
        raise ConfigError(f"a constraint is of kind {kind!r}. Allowed: {', '.join(KINDS)}.")
    matcher = _library("llguidance").LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = _schema(constraint)
        try:
            _validator(schema)
        except ValueError as error:
            raise refused(constraint, str(error)) from error
        return matcher.grammar_from_json_schema(schema, defaults=JSON, overrides=HELD)
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "choice":
        choices = _loaded(constraint)
        if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
            raise ConfigError(
                f"a choice is a list of texts, and this is {_clipped(text)!r}. Write a JSON list of them."
            )
        texts = " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
        return matcher.grammar_from_lark(f"start: ONE\nONE: {texts}")  # one terminal: a rule has 2,000 ways at most
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # recorded boundary: a parser's own, of any kind
            raise refused(constraint, str(error)) from error
    return matcher.grammar_from_lark(text)


def _schema(constraint: Constraint) -> str:
    if constraint.kind == "json_object":
        return '{"type": "object"}'
    schema = _loaded(constraint)
    if not isinstance(schema, dict):
        raise ConfigError(f"a JSON schema is an object, and this is {_clipped(constraint.text)!r}.")
    return constraint.text


def _loaded(constraint: Constraint) -> Any:
    try:
        return json.loads(constraint.text, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"its {constraint.kind} {_clipped(constraint.text)!r} is no JSON: {error}.") from error


def _with_an_end(tokenizer_json: str, vocab_size: int) -> tuple[str, int, int]:
    """A tokeniser with one more token, its ids and that one's: the end that llguidance is told of.

    It is no id that may be text, so that stop tokens are all the same; and where llguidance is told of none, and knows
    none by name, token 0 is the end.
    """
    tokenizer = json.loads(tokenizer_json)
    vocab = tokenizer["model"]["vocab"]  # Unigram's is a list of pieces
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    end = max([*(one["id"] for one in tokenizer["added_tokens"]), *ids]) + 1
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": end, "content": "<|tandem-end|>", "special": True, **marks})
    return json.dumps(tokenizer), max(end + 1, vocab_size), end


@lru_cache(maxsize=MOST_COMPILED)
def _validator(schema: str) -> Any:
    """Of a schema: patterns in linear time whatever they are, and nothing is fetched that it refers to. ValueError."""
    rust = _library("jsonschema_rs")
    value = json.loads(schema)
    return rust.validator_for(value, validate_formats=True, pattern_options=rust.RegexOptions(), offline=True)


@lru_cache(maxsize=MOST_COMPILED)
def _spelled(constraint: Constraint) -> Any:
    """A matcher of bytes, at the beginning."""
    llguidance = _library("llguidance")
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=256)
    return llguidance.LLMatcher(tokenizer, _grammar(constraint), log_level=0)


class _Bytes:
    """A token a byte, and the end."""

    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    bos_token_id, eos_token_id, special_token_ids = None, 256, (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"constraints need {name.replace('_', '-')}, which is not installed ({error}). "
            "Run pip install 'tandem[serve]'."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _clipped(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"
