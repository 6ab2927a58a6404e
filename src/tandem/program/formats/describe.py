"""Tools told in words, for a model whose chat template knows none: Python signatures, and how a call is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tandem.program.formats.parsed import Tools
from tandem.types import ToolCall

_TYPES = {
    "integer": "int",
    "number": "float",
    "float": "float",
    "string": "str",
    "boolean": "bool",
    "array": "list",
    "tuple": "tuple",
    "object": "dict",
    "dict": "dict",
    "null": "None",
}
_EXAMPLES: Mapping[str, Any] = {"int": 1, "float": 1.5, "str": "text", "bool": True, "dict": {}, "None": None}


def describe(tools: Tools, write: Callable[[Sequence[ToolCall], Tools], str]) -> str:
    """What a system message says of the tools, with an example of a call by `write`."""
    functions = [tool.get("function", tool) for tool in tools]
    stubs = "\n\n".join(map(_stub, functions))
    return (
        f"You can call these functions:\n\n{stubs}\n\n"
        f"To call one, write it like this and stop; the next message has what it returned:\n\n"
        f"{write([_example(functions[0])], tools)}"
    )


def _stub(function: Mapping[str, Any]) -> str:
    """
    >>> print(_stub({"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}))
    def add(a: int): ...
    """
    declared, required = _parameters(function)
    given = [f"{name}: {_type(schema)}" for name, schema in declared.items() if name in required]
    given += [
        f"{name}: {_type(schema)} = {schema.get('default')!r}"
        for name, schema in declared.items()
        if name not in required
    ]
    head = f"def {function['name']}({', '.join(given)}):"
    told = [f"{name}: {one['description']}" for name, one in declared.items() if one.get("description")]
    lines = [str(function.get("description") or "").strip(), *told]
    words = "\n    ".join(line.replace("\n", "\n    ") for line in lines if line)
    return f'{head}\n    """{words}"""' if words else f"{head} ..."


def _parameters(function: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], Sequence[str]]:
    parameters = function.get("parameters") or {}
    return parameters.get("properties") or {}, parameters.get("required") or ()


def _type(schema: Mapping[str, Any]) -> str:
    """
    >>> _type({"type": "array", "items": {"enum": ["a", "b"]}}), _type({"type": ["integer", "null"]}), _type({})
    ("list[Literal['a', 'b']]", 'int | None', 'object')
    """
    if "enum" in schema:
        return f"Literal[{', '.join(map(repr, schema['enum']))}]"
    if "anyOf" in schema:
        return " | ".join(map(_type, schema["anyOf"]))
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    found = [_TYPES.get(kind, "object") for kind in kinds]
    if found == ["list"] and isinstance(schema.get("items"), Mapping):
        return f"list[{_type(schema['items'])}]"
    return " | ".join(found) or "object"


def _example(function: Mapping[str, Any]) -> ToolCall:
    declared, required = _parameters(function)
    given = {name: _value(declared[name]) for name in required if name in declared}
    if function["name"] == "python" and list(given.values()) == ["text"]:
        given = dict.fromkeys(given, "print(2 + 3)")
    return ToolCall(str(function["name"]), given)


def _value(schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    kind = _type(schema).split(" | ")[0]
    if kind.startswith(("list", "tuple")):
        return [_value(schema["items"])] if isinstance(schema.get("items"), Mapping) else []
    return _EXAMPLES.get(kind, "text")
