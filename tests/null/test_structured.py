"""Fields of calls that say what an answer is: whose they are, what they come to, and how a wrong one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem.engine.constraint import unmet
from tandem.errors import ConfigError
from tandem.program.formats.choose import FORMATS
from tandem.server.structured import CALLED, FIELDS, of_fields, of_format, of_tools
from tandem.types import Constraint, ToolCall

for name in ("llguidance", "jsonschema_rs"):
    pytest.importorskip(name, reason="constraints are those of the extra serve")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        (dict.fromkeys(FIELDS), None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": False},
                }
            },
            Constraint("json_schema", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Constraint("json_schema", TEXT)),
        ({"structured_outputs": {"json": TEXT, "disable_fallback": False}}, Constraint("json_schema", TEXT)),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Constraint("grammar", 'root ::= "a"')),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object")),
        ({"guided_json": SCHEMA}, Constraint("json_schema", TEXT)),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, Constraint("regex", "a+")),
        ({"guided_choice": ["a"]}, Constraint("choice", '["a"]')),
        ({"guided_grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
        ({"guided_json_object": False}, None),
    ],
)
def test_fields_by_hand(given, wanted):
    """A field of OpenAI's or vLLM's asks for another form, or for none."""
    assert of_fields(given) == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"response_format": "json"}, r"response_format.type is None. Allowed: text, json_object, json_schema"),
        ({"response_format": {"type": "structural_tag"}}, r"response_format.type is 'structural_tag'"),
        ({"response_format": {"type": "json_schema"}}, r"response_format.schema is None"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, r"json_schema.schema is 3"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, r"json_schema.schema is None"),
        ({"structured_outputs": "json"}, r"structured_outputs is 'json'"),
        ({"structured_outputs": {}}, r"structured_outputs has nothing"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, r"structured_outputs has json and regex"),
        ({"structured_outputs": {"jsn": {}}}, r"'jsn'. Did you mean json"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, r"disable_any_whitespace is True"),
        ({"structured_outputs": {"choice": "a"}}, r"structured_outputs.choice is 'a'. Give a list"),
        ({"guided_regex": 3}, r"guided_regex is 3. Give a text"),
        ({"guided_json": 3}, r"guided_json is 3. Give a schema"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            r"guided_regex and response_format|two forms",
        ),
    ],
)
def test_a_wrong_field_is_named(given, named):
    """A form that is not served is taken for one that is, or the error names none of what the caller wrote."""
    with pytest.raises(ConfigError, match=named):
        of_fields(given)


def test_the_format_of_a_response():
    """Responses have the schema beside its type, and it is not found there."""
    assert of_format(
        {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "text.format"
    ) == Constraint("json_schema", TEXT)
    with pytest.raises(ConfigError, match=r"text\.format\.schema is None"):
        of_format({"type": "json_schema", "name": "n"}, "text.format")


def tool(name: str, strict: bool = False, schema: Any = SCHEMA) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


def written(call_format: str, *calls: ToolCall) -> str:
    if call_format != "fenced":
        return FORMATS[call_format].write(calls, ())
    values = [json.dumps({"name": one.name, "arguments": one.arguments}) for one in calls]
    return "\n".join(f"```json\n{value}\n```" for value in values)


@pytest.mark.parametrize("call_format", CALLED)
def test_forced_calls_are_what_the_format_reads(call_format):
    """A forced answer is no call in the model's format, has other arguments than its schema, or another tool's."""
    tools = [tool("add"), tool("drop", schema=None)]
    right, other, wrong = ToolCall("add", {"a": 1}), ToolCall("drop", {"b": [2]}), ToolCall("add", {"a": "x"})
    both = of_tools(tools, "required", True, call_format)
    named = of_tools(tools, {"type": "function", "function": {"name": "add"}}, True, call_format)
    assert both is not None and named is not None
    for calls, by_any, by_name in (
        ((right,), True, True),
        ((other,), True, False),
        ((wrong,), False, False),
        ((right, other), call_format != "fenced", False),
        ((ToolCall("sub", {"a": 1}),), False, False),
    ):
        text = written(call_format, *calls)
        assert (unmet(both, text) == "", unmet(named, text) == "") == (by_any, by_name), text
        parsed = FORMATS[call_format].parse(text, tools)
        assert not by_any or ([one.name for one in parsed.calls], parsed.faults) == ([one.name for one in calls], ())
    assert unmet(both, "Hello") and unmet(both, "") and unmet(both, written(call_format, right) + " done")
    one = of_tools(tools, "required", False, call_format)
    assert one is not None and unmet(one, written(call_format, right, other))


def test_strict_tools_leave_text_free():
    """A strict tool takes the model's words away, or a call among them does not fit its schema."""
    tools = [tool("add", strict=True), tool("drop", schema={"type": "object", "not": {}})]
    found = of_tools(tools, "auto", True, "hermes")
    assert found is not None and found == of_tools(tools, None, True, "hermes")
    add, drop = (written("hermes", ToolCall(name, {"a": 1})) for name in ("add", "drop"))
    for text in ("", "Hello.", "a <tool", add, f"I call:\n{add}\n{drop} there", drop):
        assert unmet(found, text) == "", text
    for text in ("<tool_call>", "<tool_call> b", add.replace("1", '"x"'), add.replace("add", "sub"), add[:-3]):
        assert unmet(found, text) != "", text
    alone = of_tools(tools, "auto", False, "hermes")
    assert alone is not None and unmet(alone, f"Hi {add}") == "" != unmet(alone, add + add)


def test_calls_that_need_nothing_or_cannot_be_held():
    """Free tools cost a mask a token; a format that cannot be held is served as if it were."""
    assert of_tools([tool("add")], "auto", True, "qwen3_coder") is None
    assert of_tools([tool("add", strict=True)], "none", True, "hermes") is None
    assert of_tools([], None, True, "hermes") is None
    for choice, call_format, named in (
        ("required", "qwen3_coder", "tool_choice asks for calls that fit, and this model writes them as 'qwen3_coder'"),
        ("auto", "llama3", "tools asks for calls that fit.*in hermes"),
        ({"function": {"name": "adds"}}, "hermes", "tool_choice names 'adds'. Did you mean add"),
    ):
        with pytest.raises(ConfigError, match=named):
            of_tools([tool("add", strict=True)], choice, True, call_format)
    with pytest.raises(ConfigError, match="there are no tools"):
        of_tools([], "required", True, "hermes")
