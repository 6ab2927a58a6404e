"""What calls say of an answer's form, as a constraint: OpenAI's response_format, text.format and tools, vLLM's fields.

`of_fields` reads what the answer as a whole has to be; `of_tools` what calls of tools have to be, in the format that
the model writes them in. Both raise ConfigError that begins with the field's name. Whether the engine can hold what
comes out says its own check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.engine.constraint import held
from tandem.errors import ConfigError, nearest
from tandem.program.formats import hermes
from tandem.program.formats.choose import FORMATS
from tandem.types import Constraint, ToolCall

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object")  # vLLM's, up to 0.11
FIELDS = ("response_format", "structured_outputs", *GUIDED)
STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")  # of structured_outputs, vLLM's since
NEUTRAL = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties", "disable_fallback")
CALLED = ("hermes", "llama3", "fenced")  # formats whose calls are JSON, and text alone
MARK = "\ue000"  # stands for arguments while a call is taken apart


def of_fields(given: Mapping[str, Any]) -> Constraint | None:
    """Of FIELDS, by name; None where they ask for nothing. At most one may ask.

    >>> of_fields({"response_format": {"type": "json_object"}, "guided_regex": None})
    Constraint(kind='json_object', text='')
    >>> of_fields({"structured_outputs": {"choice": ["yes", "no"]}})
    Constraint(kind='choice', text='["yes", "no"]')
    """
    found = dict[str, Constraint]()
    for name, value in given.items():
        if value is None:
            continue
        if name == "response_format":
            one = of_format(value, name)
        elif name == "structured_outputs":
            one = _structured(value)
        else:
            one = _of(name.removeprefix("guided_"), value, name)
        if one is not None:
            found[name] = one
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)} ask for two forms of one answer. Give one of them.")
    return next(iter(found.values()), None)


def of_format(given: Any, field: str) -> Constraint | None:
    """Chat's response_format, or text.format of a response, whose schema lies beside its type.

    `strict` is not asked: a schema holds always.

    >>> of_format({"type": "json_schema", "name": "n", "schema": {"type": "integer"}}, "text.format").text
    '{"type": "integer"}'
    """
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json_object")
    if kind != "json_schema":
        raise ConfigError(f"{field}.type is {kind!r}. Allowed: text, json_object, json_schema.")
    inner, place = (given["json_schema"], f"{field}.json_schema") if "json_schema" in given else (given, field)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{place}.schema is {schema!r}. Give a JSON schema, which is an object.")
    return Constraint("json_schema", json.dumps(schema))


def _structured(given: Any) -> Constraint | None:
    field = "structured_outputs"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{field} is {given!r}. Give an object with one of {', '.join(STRUCTURED)}.")
    for name, value in given.items():
        if name in STRUCTURED or value in (None, False):
            continue
        if name in NEUTRAL:
            raise ConfigError(f"{field}.{name} is {value!r}, which is not served. Take it out.")
        raise ConfigError(f"{field} has {name!r}.{nearest(name, STRUCTURED)}")
    asked = [name for name in STRUCTURED if given.get(name) is not None]
    if len(asked) != 1:
        raise ConfigError(f"{field} has {' and '.join(asked) or 'nothing'}. Give one of {', '.join(STRUCTURED)}.")
    return _of(asked[0], given[asked[0]], f"{field}.{asked[0]}")


def _of(kind: str, value: Any, field: str) -> Constraint | None:
    """A schema may come as an object or as its text, as vLLM takes it."""
    if kind == "json_object" and isinstance(value, bool):
        return Constraint("json_object") if value else None
    if kind == "json" and isinstance(value, str | Mapping):
        return Constraint("json_schema", value if isinstance(value, str) else json.dumps(value))
    if kind == "choice" and isinstance(value, list):
        return Constraint("choice", json.dumps(value))
    if kind == "regex" and isinstance(value, str):
        return Constraint("regex", value)
    if kind == "grammar" and isinstance(value, str):
        return Constraint("grammar", value)
    wanted = {"json": "a schema", "choice": "a list of texts", "json_object": "true or false"}.get(kind, "a text")
    raise ConfigError(f"{field} is {value!r}. Give {wanted}.")


def of_tools(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None, several: bool, call_format: str
) -> Constraint | None:
    """Of tools and tool_choice as chat's body has them; `several`: parallel_tool_calls. `call_format`: of FORMATS.

    Where a call is forced ("required", or one by name) the answer is calls, each with the arguments of its schema.
    Where it is not, the answer is text, and what opens a call in it is one, whose arguments fit where its tool is
    `strict`. None where nothing is to be held.
    """
    functions = [tool["function"] for tool in tools]
    strict = any(function.get("strict") for function in functions)
    forced = choice not in (None, "auto", "none")
    if choice == "none" or not (forced or (strict and functions)):
        return None
    field = "tool_choice" if forced else "tools"
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        if name not in (names := [function["name"] for function in functions]):
            raise ConfigError(f"tool_choice names {name!r}.{nearest(name, names)}")
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise ConfigError("tool_choice is 'required', and there are no tools. Give tools, or leave it out.")
    if call_format not in CALLED or not (forced or call_format == "hermes"):
        able = "hermes" if not forced else ", ".join(CALLED)
        raise ConfigError(
            f"{field} asks for calls that fit, and this model writes them as {call_format!r}, in which that cannot be "
            f"held. It can in {able}. Leave strict out and tool_choice at 'auto'."
        )
    rules, calls = list[str](), list[str]()
    for number, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object"}
        if not (forced or function.get("strict")):
            schema = {"type": "object"}
        before, after = _around(function["name"], call_format)
        if not forced:  # the head of a text has read what opens the call
            before = before.removeprefix(hermes.OPENING)
        calls.append(f"{json.dumps(before)} arguments{number} {json.dumps(after)}")
        rules.append(f"arguments{number}: %json {json.dumps(held(schema))}")
    rules.append(f"call: {' | '.join(calls)}")
    if forced:
        between = json.dumps(_between(call_format))
        more = f" ({between} call)*" if several and not isinstance(choice, Mapping) and call_format != "fenced" else ""
        return Constraint("grammar", "\n".join([f"start: call{more}", *rules]))
    text = f"/(?s:.+)/ & ~/(?s:.*){hermes.OPENING}(?s:.*)/"
    free = ["start: (head call)* TEXT?" if several else "start: TEXT? | head call", f"TEXT: {text}"]
    return Constraint("grammar", "\n".join([*free, f"head[lazy]: /(?s:.*){hermes.OPENING}/", *rules]))


def _around(name: str, call_format: str) -> tuple[str, str]:
    """What a call has before and behind its arguments."""
    if call_format == "fenced":  # which it writes as Python where it can, and reads in both
        return f'```json\n{{"name": {json.dumps(name)}, "arguments": ', "}\n```"
    before, _, after = FORMATS[call_format].write([ToolCall(name, {MARK: 0})], ()).partition(_mark())
    return before, after


def _between(call_format: str) -> str:
    """What two calls have between them."""
    if call_format == "fenced":
        return "\n"
    before, after = _around("f", call_format)
    both = FORMATS[call_format].write([ToolCall("f", {MARK: 0})] * 2, ()).split(_mark())[1]
    return both.removeprefix(after).removesuffix(before)


def _mark() -> str:
    return json.dumps({MARK: 0}, ensure_ascii=False)
