"""Plain fenced code, for models whose chat template knows no tools: calls as Python or as JSON.

    ```python
    add(a=1, b=2)
    ```

Python is read, never run: statements that are calls with literal values. Where a tool is named `python`, any other code
is its argument. Other fences, and JSON that calls nothing, are content.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tandem.program.formats.parsed import (
    Malformed,
    Parsed,
    Tools,
    as_call,
    behind_thought,
    checked,
    dumps,
    fault,
    names,
    once,
    properties,
    quoted,
    read_json,
    thought,
)
from tandem.types import ToolCall

# In a list a fence is indented, its end as its beginning.
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```[ \t]*(?P<language>\w*)[^\n]*\n(?P<code>.*?)(?:^(?P=indent)```[ \t]*\r?$\n?|\Z)",
    re.MULTILINE | re.DOTALL,
)
_PYTHON = ("python", "py", "tool_code")
_JSON = ("json", "tool_call")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> parse("```python\\nadd(a=1, b=[2])\\n```").calls[0].arguments
    {'a': 1, 'b': [2]}
    """
    reasoning, text = thought(text)
    rest: list[str] = []
    calls: list[ToolCall] = []
    faults: list[str] = []
    place = 0
    thinks = 0  # where a think block ends that was seen
    for found in _FENCE.finditer(text):
        thinks = max(thinks, behind_thought(text, max(place, thinks), found.start()))
        if found.start() < thinks:
            continue
        language, code = found["language"].lower(), found["code"]
        if found["indent"]:
            code = textwrap.dedent(code)
        read = python_calls if language in _PYTHON else _json_calls if language in _JSON else None
        try:
            given = read(code, tools) if read is not None else None
        except Malformed as error:
            faults.append(fault(len(calls) + len(faults), error))
            continue
        if given is not None:
            calls += given
            rest.append(text[place : found.start()])
            place = found.end()
    rest.append(text[place:])
    content = "".join(rest)
    return Parsed(content.strip() if calls else content, reasoning, tuple(calls), tuple(faults))


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """As Python, or as JSON where a name is none of Python's; code for the tool `python` as it stands.

    >>> print(write([ToolCall("add", {"a": 1, "from": "x"})]))
    ```python
    add(a=1, **{'from': 'x'})
    ```
    """
    if len(calls) == 1 and (code := _code(calls[0], tools)):
        text = f"```python\n{code}\n```"
        if parse(text, tools).calls == (replace(calls[0], id=""),):
            return text
    if all(all(map(_plain, call.name.split("."))) for call in calls):
        return "\n".join(["```python", *map(_written, calls), "```"])
    values = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"```json\n{dumps(values)}\n```"


def python_calls(code: str, tools: Tools) -> list[ToolCall] | None:
    """The calls that `code` consists of; None where it is other code, and no tool takes that.

    Malformed where it names a tool, but is more than calls with literal values.
    """
    declared = names(tools)
    try:
        return _calls_of(code, tools) or None  # comments
    except Malformed as error:
        if "python" in declared:
            return [checked("python", {_code_name(tools): code.removesuffix("\n")})]
        if tools and not any(re.search(rf"(?<![\w.]){re.escape(name)}\s*\(", code) for name in declared):
            return None
        raise error


def _calls_of(code: str, tools: Tools) -> list[ToolCall]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            body = ast.parse(code.strip()).body
    except SyntaxError as error:
        raise Malformed(f"it is no Python: {error.msg}, line {error.lineno}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Malformed(f"it is no Python: {str(error) or 'it nests too deep'}") from None
    try:
        return [_call_of(statement, tools) for statement in body]
    except RecursionError:
        raise Malformed("it is nested too deep") from None


def _call_of(statement: ast.stmt, tools: Tools) -> ToolCall:
    value = statement.value if isinstance(statement, ast.Expr) else None
    name = _dotted(value.func) if isinstance(value, ast.Call) else None
    if not isinstance(value, ast.Call) or name is None:
        raise Malformed(f"line {statement.lineno} is {quoted(ast.unparse(statement))}, not the call of a tool")
    declared = properties(tools, name)
    if tools and declared is None:
        raise Malformed(f"there is no tool {name}; there are {', '.join(names(tools))}")
    keys = list(declared or ())
    if len(value.args) > len(keys):
        raise Malformed(f"the arguments of {name} need their names, as in {name}(NAME=VALUE)")
    arguments = [(key, _literal(name, key, given)) for key, given in zip(keys, value.args, strict=False)]
    for one in value.keywords:
        found = _literal(name, one.arg or "**", one.value)
        if one.arg is None and not isinstance(found, dict):
            raise Malformed(f"what {name} is given by ** is no dictionary")
        arguments += found.items() if one.arg is None else [(one.arg, found)]
    return checked(name, once(arguments))


def _literal(name: str, key: str, node: ast.expr) -> Any:
    try:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Dict):
                once([(ast.literal_eval(one), None) for one in inner.keys if one is not None])
        return ast.literal_eval(node)
    except Malformed:
        raise
    except (ValueError, TypeError, SyntaxError, MemoryError):
        raise Malformed(f"{key} of {name} is {quoted(ast.unparse(node))}, not a literal value") from None


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def _json_calls(code: str, tools: Tools) -> list[ToolCall] | None:
    try:
        value, end = read_json(code)
        if code[end:].strip():
            raise Malformed(f"behind its JSON stands {quoted(code[end:].strip())}")
    except Malformed:
        if re.search(r'"name"\s*:', code) is None:
            return None
        raise
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, dict) and _is_call(one, tools) for one in values):
        return None
    return [as_call(one) for one in values]


def _is_call(value: dict[str, Any], tools: Tools) -> bool:
    return "name" in value and ("arguments" in value or "parameters" in value or value["name"] in names(tools))


def _code_name(tools: Tools) -> str:
    return next(iter(properties(tools, "python") or ()), "code")


def _code(call: ToolCall, tools: Tools) -> str:
    """What the tool `python` is given, where it is given code alone."""
    declared = call.name == "python" and "python" in names(tools)
    code = call.arguments.get(_code_name(tools)) if declared and len(call.arguments) == 1 else ""
    return code if isinstance(code, str) else ""


def _written(call: ToolCall) -> str:
    named = {key: value for key, value in call.arguments.items() if _plain(key)}
    other = {key: value for key, value in call.arguments.items() if key not in named}
    given = [f"{key}={value!r}" for key, value in named.items()] + ([f"**{other!r}"] if other else [])
    return f"{call.name}({', '.join(given)})"


def _plain(name: str) -> bool:
    """Whether Python takes it as a name, unchanged."""
    return _NAME.fullmatch(name) is not None and not keyword.iskeyword(name) and not name.startswith("__")
