"""Tool calls that are read otherwise than the model wrote them, that end a program, or that nobody is told of."""

from __future__ import annotations

import json
import pickle
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.program.formats.choose import FORMATS, PROBE_CALL, format_of
from tandem.program.formats.describe import describe
from tandem.types import Message, ToolCall

BFCL = Path(__file__).parents[2].parent / "shared" / "data" / "bfcl"

# The kinds of calls that BFCL has, and the values that formats trip over.
CALLS = [
    ToolCall("add", {"a": 1, "b": -2.5}),
    ToolCall("now", {}),
    ToolCall("math.factorial", {"number": 5}),
    ToolCall("my-tool", {"from": "Köln", "to-day": True, "class": None}),
    ToolCall("plan", {"where": {"lat": 48.1, "lon": [1e-7, 1e300]}, "stops": [], "tags": [["a"], ["b", {}]]}),
    ToolCall("say", {"text": "He said \"it's 5 o'clock\".\n\tThen:\\ \U0001f600 é   end "}),
    ToolCall("text", {"a": "5", "b": "true", "c": "None", "d": "[1]", "e": '"q"', "f": "", "g": "{", "h": "\n\n"}),
    ToolCall("say", {"text": "```\n[TOOL_CALLS] <tool_call> </tool_call> <|call|> <think> ; {"}),
]


def called(calls: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(call.name, call.arguments) for call in calls]


def declared(*calls: ToolCall) -> list[dict[str, Any]]:
    """Schemas of tools with the arguments of `calls`."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    tools: dict[str, dict[str, Any]] = {}
    for call in calls:
        found = tools.setdefault(call.name, {})
        for name, value in call.arguments.items():
            found[name] = {"type": kinds.get(type(value), "null")}
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in tools.items()
    ]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_written_is_read(name: str, known: bool) -> None:
    """A name, a nested value, a quote or a number that a format writes and reads back as another."""
    one = FORMATS[name]
    for calls in (*([call] for call in CALLS), CALLS[:3], [CALLS[1], CALLS[1]], [CALLS[3], CALLS[0]]):
        tools = declared(*calls) if known else ()
        text = one.write(calls, tools)
        found = one.parse(text, tools)
        assert not found.faults and not found.content and called(found.calls) == called(calls), text


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}(\.[A-Za-z_][A-Za-z0-9_]{0,8})?|[a-z]+-[a-z]+", fullmatch=True)
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|eom_id|>", "<|call|>", "<|end|>")
MARKS += (
    "<|message|>",
    "<|start|>",
    "```python\n",
    "\n```",
    "</function>",
    "</s>",
    "</think>",
    "}; {",
    "\u2028",
    "\x1c",
)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.lists(st.sampled_from(MARKS)).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
keys = st.text(string.ascii_letters + string.digits + "_-. ", min_size=1, max_size=8).filter(
    lambda key: key == key.strip()
)
drawn = st.lists(st.builds(ToolCall, names, st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(calls=drawn, name=st.sampled_from(sorted(FORMATS)))
def test_any_calls_are_read_back(calls: list[ToolCall], name: str) -> None:
    """Calls with values that nobody thought of come back as other calls, as text or as a fault."""
    one = FORMATS[name]
    found = one.parse(one.write(calls, ()), ())
    assert not found.faults and called(found.calls) == called(calls)


@settings(max_examples=200, deadline=None)
@given(calls=drawn, name=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1))
def test_a_cut_text_has_the_calls_before_it(calls: list[ToolCall], name: str, share: float) -> None:
    """A call that was cut in the midst is made, with less than was meant."""
    one = FORMATS[name]
    whole = one.write(calls, ())
    found = called(one.parse(whole[: int(share * len(whole))], ()).calls)
    assert found == called(calls)[: len(found)]


@settings(max_examples=100, deadline=None)
@given(calls=drawn, name=st.sampled_from(sorted({*FORMATS} - {"harmony"})), thoughts=texts)
def test_no_call_is_made_in_a_thought(calls: list[ToolCall], name: str, thoughts: str) -> None:
    """A call that a model only thinks of is made; or one behind its thoughts is not."""
    one = FORMATS[name]
    said = one.write(calls, ())
    opening, closing = ("[THINK]", "[/THINK]") if name == "mistral" else ("<think>", "</think>")
    if any(tag in json.dumps([dict(call.arguments) for call in calls]) + thoughts for tag in (opening, closing)):
        return
    found = one.parse(f"{opening}{thoughts}\n{said}\n{closing}{said}", ())
    assert called(found.calls) == called(calls) and not found.faults
    assert not one.parse(f"{opening}{thoughts}\n{said}", ()).calls  # cut within


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [*"{}[]\"':,;=() \n", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>"]
            + [
                "<|channel|>",
                "commentary",
                " to=functions.f",
                "<|message|>",
                "<|call|>",
                "```python\n",
                "```",
                "f(a=1)",
            ]
            + [
                "<function=f>",
                "<parameter=a>",
                "</parameter>",
                "</function>",
                '{"name": "f", "arguments": {}}',
                "1e999",
            ]
            + ["NaN", "\\ud800", "9" * 5000, "\0", "</think>", "x"]
        ),
        max_size=12,
    ).map("".join),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_no_text_ends_a_program(text: str, name: str) -> None:
    """A text that no format foresaw raises in the run, or gives a call that cannot be written into a prompt."""
    found = FORMATS[name].parse(text, ())
    for call in found.calls:
        json.dumps({"name": call.name, "arguments": call.arguments}, allow_nan=False, ensure_ascii=False).encode()
    assert all(fault.startswith("tool call ") and "\n" not in fault for fault in found.faults)


DEEP = "[" * 100_000
ONE = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
MALFORMED = {
    "hermes": [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "JSON is broken at character 36"),
        (
            f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 500}{"]" * 500}}}}}</tool_call>',
            "the arguments of f are nested more than 100 deep",
        ),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "the arguments of f are '[1]', not an object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "it has no name"),
        ("<tool_call>f(1)</tool_call>", "JSON is broken at character 1, at 'f(1)</tool_call>'"),
        ('<tool_call>{"name": "f", "arguments": {}} and</tool_call>', "behind its end stands 'and</tool_call>'"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON number"),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "hold half of a character"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "cannot be written as JSON"),
        (f'<tool_call>{{"name": "f", "arguments": {DEEP}', "cannot be read"),
        ("<tool_call>", "JSON is broken at character 1"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>', "a is given twice"),
        ('<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>', "name is given twice"),
        ('<tool_call>{"name": "f", "arguments": {"a": {"b": 1, "b": 1}}}</tool_call>', "b is given twice"),
        (f'<tool_call>{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}</tool_call>', "a number of 5,000 digits"),
        ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "not an object with name and arguments"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_c', "behind its end stands '</tool_c'"),
    ],
    "qwen3_coder": [
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', "not <function=NAME>"),
        ("<tool_call><function=f><parameter=a>1", "parameter a has no </parameter>"),
        ("<tool_call><function=f>a=1</function></tool_call>", "behind its end stands 'a=1"),
        ("<tool_call><function=f><parameter=n>many</parameter></function></tool_call>", "n is 'many', not integer"),
        (
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
            "parameter a is given twice",
        ),
        ("<tool_call><function=f><parameter=a>1</parameter>", "it ends before its </function>"),
    ],
    "llama3": [
        ('{"name": "f", "parameters": {"a": }}', "JSON is broken"),
        ('{"name": "f", "parameters": {}} {"name": 1}', "it has no name"),
        ('<|python_tag|>{"name": "f"} so', "behind its end stands 'so'"),
        ("<|python_tag|>x = 1", "not the call of a tool"),
        ('{"name": "f", "parameters": {"a": 1', "JSON is broken"),
        ('{"name": "f", "parameters": {"a": 1, "a": 2}}', "a is given twice"),
        ('{"name": "f", "parameters": [1]}', "the arguments of f are '[1]'"),
        ('{"name": "f", "parameters": {}} and so on', "behind its end stands 'and so on'"),
        ("<|python_tag|>", "'' calls no tool"),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "f", "arguments": {}}', "JSON is broken"),
        ("[TOOL_CALLS]f{}", "neither a list of calls nor NAME[ARGS]"),
        ("[TOOL_CALLS]f[ARGS]a=1", "JSON is broken at character 1, at 'a=1'"),
        ("[TOOL_CALLS]f[ARGS][1]", "the arguments of f are '[1]', not an object"),
        ("[TOOL_CALLS]f", "neither a list of calls nor NAME[ARGS]"),
        ("[TOOL_CALLS][]", "its list has no call"),
        ('[TOOL_CALLS]f[ARGS]{"a": 1, "a": 1}', "a is given twice"),
    ],
    "harmony": [
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>a=1<|call|>", "JSON is broken"),
        ("<|channel|>commentary to=functions.f<|message|>{} and<|call|>", "behind its end stands ' and"),
        ("<|channel|>commentary to=functions.f <|constrain|>json", "it ends before its <|message|>"),
        ('<|channel|>commentary to=functions.f<|message|>{"a": 1, "a": 1}<|call|>', "a is given twice"),
    ],
    "fenced": [
        ("```python\nf(a=1, a=2)\n```", "a is given twice"),
        ("```python\nf(a=1, **{'a': 2})\n```", "a is given twice"),
        ("```python\nf(a=[{'b': 1, 'b': 2}])\n```", "b is given twice"),
        ('```json\n{"name": "f", "arguments": {"a": 1, "a": 2}}\n```', "a is given twice"),
        ("```python\nf(a=1\n```", "no Python: '(' was never closed, line 1"),
        ("```python\nf(a=x)\n```", "a of f is 'x', not a literal value"),
        ("```python\nf(1)\n```", "the arguments of f need their names"),
        ("```python\nprint(f(n=1))\n```", "need their names"),
        ("```python\nx = f(n=1)\n```", "line 1 is 'x = f(n=1)', not the call of a tool"),
        ('```json\n{"name": "f", "arguments": {"a": }}\n```', "JSON is broken"),
        (f"```python\nf(a={DEEP}\n```", "it is no Python"),
        (f"```python\nf(a={'-' * 100_000}1)\n```", "it is no Python"),
        (f"```python\nf{'.a' * 100_000}()\n```", "it is no Python"),
        (f"```python\nf(a=1{'+1' * 3_000})\n```", "it is"),
    ],
}


@pytest.mark.parametrize(("name", "text", "reason"), [(name, *row) for name in MALFORMED for row in MALFORMED[name]])
def test_a_malformed_call_is_a_fault(name: str, text: str, reason: str) -> None:
    """A malformed call raises, is taken for an answer, or hides the calls beside it; or its reason helps nobody."""
    tools = [{"function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
    found = FORMATS[name].parse(text, tools if name == "qwen3_coder" else ())
    assert not found.calls and len(found.faults) == 1 and reason in found.faults[0], found
    assert found.faults[0].startswith("tool call 1: ") and len(found.faults[0]) < 200
    assert found.content == text  # it stays in what the model said


@pytest.mark.parametrize("name", FORMATS)
def test_a_deep_call_reaches_its_environment(name: str) -> None:
    """A call that is read, and that then ends the run on its way to the process of its environment."""
    deep: list[Any] = []
    for _ in range(98):
        deep = [deep]
    one = FORMATS[name]
    found = one.parse(one.write([ToolCall("f", {"a": deep})], ()), ())
    assert called(found.calls) == [("f", {"a": deep})]
    assert pickle.loads(pickle.dumps(Message("assistant", "", found.calls))).calls == found.calls


def test_a_call_beside_a_malformed_one() -> None:
    """One malformed call takes those before or after it with it."""
    good, bad = '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>{</tool_call>"
    found = FORMATS["hermes"].parse(f"So:\n{good}\n{bad}\n{good}", ())
    assert called(found.calls) == [("f", {}), ("f", {})] and found.faults[0].startswith("tool call 2: ")
    assert found.content == f"So:\n\n{bad}"
    other = FORMATS["mistral"].parse("[TOOL_CALLS]f[ARGS]{[TOOL_CALLS]f[ARGS]{}", ())
    assert called(other.calls) == [("f", {})] and other.content == "[TOOL_CALLS]f[ARGS]{"
    fences = FORMATS["fenced"].parse("```python\nf(a=1)\n```\n```python\nf(\n```", ())
    assert called(fences.calls) == [("f", {"a": 1})] and fences.content == "```python\nf(\n```"


@pytest.mark.parametrize(
    ("name", "text", "content", "reasoning", "calls"),
    [
        ("hermes", '<think>\nadd\n</think>\n\nSo:\n<tool_call>\n{"name": "f"}', "So:", "add", [("f", {})]),
        ("hermes", "<think>cut", "", "cut", []),
        ("hermes", "what </think> means", "what </think> means", "", []),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("f", {"a": 1})]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=b>\nTrue\n</parameter>\n</function>\n</tool_call>",
            "",
            "",
            [("f", {"b": True})],
        ),
        ("hermes", f"So <think>{ONE}</think> 4 {ONE}", f"So <think>{ONE}</think> 4", "", [("f", {"a": 1})]),
        ("hermes", f"Say <think>, or {ONE}", "Say <think>, or", "", [("f", {"a": 1})]),
        (
            "fenced",
            "So <think>\n```python\nf(a=1)\n```\n</think>\n```python\nf(a=2)\n```",
            "So <think>\n```python\nf(a=1)\n```\n</think>",
            "",
            [("f", {"a": 2})],
        ),
        ("fenced", "```python\n# nothing\n```\n4", "```python\n# nothing\n```\n4", "", []),
        ("llama3", '{"city": "Bonn"}', '{"city": "Bonn"}', "", []),
        ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', "", []),
        ("llama3", '{"name": "Ann", "age": ', '{"name": "Ann", "age": ', "", []),
        ("llama3", '{"type": "cat", "name": "Tom"}', '{"type": "cat", "name": "Tom"}', "", []),
        ("llama3", '[{"name": "f", "parameters": {}}]', '[{"name": "f", "parameters": {}}]', "", []),
        ("llama3", 'As in {"name": "f", "parameters": {}}', 'As in {"name": "f", "parameters": {}}', "", []),
        ("llama3", '{"parameters": {"a": 1}, "name": "f"}', "", "", [("f", {"a": 1})]),
        ("llama3", '{"type": "function", "name": "f", "parameters": {}}', "", "", [("f", {})]),
        ("llama3", '{"name": "tool"}', "", "", [("tool", {})]),
        (
            "llama3",
            '{"name": "f", "parameters": {}}; {"name": "say", "parameters": {"text": "<|python_tag|>"}}',
            "",
            "",
            [("f", {}), ("say", {"text": "<|python_tag|>"})],
        ),
        ("llama3", '{"a": 1}<|python_tag|>f.call(a=2)', '{"a": 1}', "", [("f", {"a": 2})]),
        ("llama3", '<|python_tag|>search.call(query="a")<|eom_id|>', "", "", [("search", {"query": "a"})]),
        (
            "llama3",
            '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
            "",
            "",
            [("f", {"a": 1}), ("g", {})],
        ),
        (
            "mistral",
            '[THINK]so[/THINK]Yes.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</s>',
            "Yes.",
            "so",
            [("f", {"a": 1}), ("g", {})],
        ),
        (
            "mistral",
            'a[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
            "a",
            "",
            [("f", {"a": 1}), ("g", {})],
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>sum<|end|><|start|>assistant<|channel|>final<|message|>4",
            "4",
            "sum",
            [],
        ),
        (
            "harmony",
            '<|channel|>commentary<|message|>So<|end|><|start|> to=functions.f<|channel|>commentary<|message|>{"a": 1}',
            "So",
            "",
            [("f", {"a": 1})],
        ),
        (
            "harmony",
            "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
            "",
            "",
            [("python", {"code": "print(1)"})],
        ),
        ("harmony", "plain", "plain", "", []),
        ("fenced", "So:\n```python\nf(a=1)\nf(a=2)\n```", "So:", "", [("f", {"a": 1}), ("f", {"a": 2})]),
        ("fenced", "So:\r\n```python\r\nf(a=1)\r\n```\r\n", "So:", "", [("f", {"a": 1})]),
        ("fenced", "1. So:\n   ```python\n   f(a=1)\n   ```\n", "1. So:", "", [("f", {"a": 1})]),
        ("fenced", "```\nf(a=1)\n```", "```\nf(a=1)\n```", "", []),
        ("fenced", '```json\n{"name": "Ann", "age": 3}\n```', '```json\n{"name": "Ann", "age": 3}\n```', "", []),
        ("fenced", "```json\n[1, 2]\n```", "```json\n[1, 2]\n```", "", []),
        ("fenced", '```json\n[{"name": "f", "arguments": {"a": 1}}]\n```', "", "", [("f", {"a": 1})]),
    ],
)
def test_by_hand(name: str, text: str, content: str, reasoning: str, calls: list[Any]) -> None:
    """What models write around their calls (reasoning, a preamble, an end, code that calls nothing) goes elsewhere."""
    tools = declared(ToolCall("tool", {})) if '"tool"' in text else ()
    found = FORMATS[name].parse(text, tools)
    assert (found.content, found.reasoning, called(found.calls), found.faults) == (content, reasoning, calls, ())


def test_fenced_code_and_what_is_declared() -> None:
    """Ordinary code is taken for a call, code for the tool `python` is not, or places have no names."""
    tools = declared(ToolCall("add", {"a": 1, "b": 2}))
    parse = FORMATS["fenced"].parse
    assert called(parse("```python\nadd(1, b=2)\n```", tools).calls) == [("add", {"a": 1, "b": 2})]
    code = "```python\nfor n in range(3):\n    print(n)\n```"
    assert parse(code, tools).content == code and not parse(code, tools).faults
    wrong = parse("```python\nprint(add(1, 2))\n```", tools)
    assert wrong.faults == ("tool call 1: there is no tool print; there are add",) and not wrong.calls
    runs = [*tools, *declared(ToolCall("python", {"source": ""}))]
    assert called(parse(code, runs).calls) == [("python", {"source": code[10:-4]})]
    write = FORMATS["fenced"].write
    for source in ("print(2)", "17 * 25\n\n", "a = 1\n```\nb", "add(1, 2)", "python(source='x')", "", "x ="):
        calls = [ToolCall("python", {"source": source})]
        assert called(parse(write(calls, runs), runs).calls) == called(calls)
    assert write([ToolCall("python", {"source": "17 * 25"})], runs) == "```python\n17 * 25\n```"
    assert called(parse("```python\nadd(1, 2)\n```", runs).calls) == [("add", {"a": 1, "b": 2})]


def test_a_probe_is_read_by_one_format_alone() -> None:
    """What a template writes for a call is taken for another format's."""
    for name, one in FORMATS.items():
        assert format_of(one.write([PROBE_CALL], ())) == name
    assert format_of("") == format_of("look_up oak 2") == ""


def test_a_description_by_hand() -> None:
    """A tool without its types, its words or an example of a call."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": "find",
                "description": "Find words.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "word": {"type": "string", "description": "What to find."},
                        "most": {"type": "integer", "default": 3},
                        "how": {"enum": ["all", "any"]},
                    },
                    "required": ["word", "how"],
                },
            },
        },
        {"name": "now"},
    ]
    assert describe(tools, FORMATS["fenced"].write) == (
        "You can call these functions:\n\n"
        "def find(word: str, how: Literal['all', 'any'], most: int = 3):\n"
        '    """Find words.\n    word: What to find."""\n\n'
        "def now(): ...\n\n"
        "To call one, write it like this and stop; the next message has what it returned:\n\n"
        "```python\nfind(word='text', how='all')\n```"
    )


def bfcl(name: str) -> list[tuple[list[dict[str, Any]], list[ToolCall]]]:
    """The tools of each row, and the calls that answer it."""
    if not BFCL.is_dir():
        pytest.skip("BFCL's files are not beside the checkout (../shared/data/bfcl)")
    asked = [json.loads(line) for line in (BFCL / name).read_text().splitlines()]
    answers = [json.loads(line) for line in (BFCL / "possible_answer" / name).read_text().splitlines()]
    rows = []
    for row, answer in zip(asked, answers, strict=True):
        assert row["id"] == answer["id"]
        calls = []
        types = {one["name"]: one["parameters"]["properties"] for one in row["function"]}
        for (tool, allowed), *_ in (one.items() for one in answer["ground_truth"]):
            chosen = {}
            for key, several in allowed.items():
                value = next((one for one in several if one != ""), None)  # "": it may be left out
                if value is not None:  # some answers are no text, where the schema says text
                    as_text = types[tool][key]["type"] == "string" and not isinstance(value, str)
                    chosen[key] = str(value) if as_text else value
            calls.append(ToolCall(tool, chosen))
        rows.append((row["function"], calls))
    return rows


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("file", ["BFCL_v4_simple_python.json", "BFCL_v4_parallel.json"])
def test_bfcl(file: str, name: str) -> None:
    """A call of BFCL that is read otherwise than it is written."""
    one, rows = FORMATS[name], bfcl(file)
    assert len(rows) >= 200
    for tools, calls in rows:
        assert describe(tools, one.write)
        for known in ((), tools):
            found = one.parse(one.write(calls, known), known)
            assert not found.faults and called(found.calls) == called(calls)
