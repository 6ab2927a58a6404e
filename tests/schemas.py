"""Some sixty JSON schemas with texts that fit and texts that do not, for what a backend makes of them.

Texts are in the order of a schema's keys, which backends fix. Which fit is what the package `jsonschema` says, with its
formats asserted, but for BEYOND: Python's json takes a key twice, and without more packages date-time is not known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BEYOND = ('{"a": 1, "a": 2}', '"2024-01-02"')


class Case(NamedTuple):
    name: str
    schema: dict[str, Any]
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def of(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


INTEGER, STRING, BOOLEAN, NULL = of("integer"), of("string"), of("boolean"), of("null")
A = {"a": INTEGER}
UNION = [
    of("object", properties={"kind": {"const": kind}, "v": one}, required=["kind", "v"])
    for kind, one in (("i", INTEGER), ("s", STRING))
]

CASES = (
    Case("string", STRING, ('""', '"a b"', '"é😀"', r'"\n\"\\"'), ("a", '"a', "1")),
    Case("escapes `\\u`", STRING, (r'"\u00e9"', r'"\ud83d\ude00"'), (r'"\u00"',)),
    Case("integer", INTEGER, ("0", "-7", "12345678901234567890123"), ("01", "1.5", "+1", '"1"')),
    Case("integer written `1.0`, `1e2`", INTEGER, ("1.0", "1e2"), ("1.5",)),
    Case("number", of("number"), ("0.5", "-1e-9", "3"), (".5", "1.", "NaN", "0x1")),
    Case("boolean, null", {"anyOf": [BOOLEAN, NULL]}, ("true", "null"), ("True", "nul")),
    Case("list of types", of(["string", "null"]), ('"a"', "null"), ("1",)),  # type: ignore[arg-type]
    Case("empty schema", {}, ("1", '{"a": [null]}', '"x"'), ("{", "nope")),
    Case("whitespace", of("array", items=INTEGER), ("[1, 2]", "[\n  1,\n  2\n]", "[1 ,2]"), ("[1,]", "[1 2]")),
    Case("object, required", of("object", properties=A, required=["a"]), ('{"a": 1}', '{"a": 1, "b": 2}'), ("{}",)),
    Case("optional keys", of("object", properties=A | {"b": STRING}), ("{}", '{"b": "x"}'), ('{"b": 1}', '{"a": ""}')),
    Case(
        "keys in another order",
        of("object", properties=A | {"b": INTEGER}),
        ('{"b": 1, "a": 2}',),
        ('{"b": 1, "a": ""}',),
    ),
    Case(
        "additionalProperties false",
        of("object", properties=A, additionalProperties=False),
        ('{"a": 1}',),
        ('{"b": 1}',),
    ),
    Case("additionalProperties schema", of("object", additionalProperties=INTEGER), ('{"x": 1}',), ('{"x": "1"}',)),
    Case(
        "required without properties",
        of("object", properties=A, required=["a", "z"]),
        ('{"a": 1, "z": 2}',),
        ('{"a": 1}',),
    ),
    Case("properties without type", {"properties": A}, ('{"a": 1}', '"x"', "3"), ('{"a": "x"}',)),
    Case(
        "nested objects",
        of("object", properties={"o": of("object", properties=A, required=["a"])}),
        ('{"o": {"a": 1}}',),
        ('{"o": {}}',),
    ),
    Case(
        "array of objects",
        of("array", items=of("object", properties=A, required=["a"])),
        ("[]", '[{"a": 1}]'),
        ("[{}]",),
    ),
    Case(
        "minItems, maxItems", of("array", items=INTEGER, minItems=1, maxItems=2), ("[1]", "[1, 2]"), ("[]", "[1, 2, 3]")
    ),
    Case(
        "prefixItems",
        of("array", prefixItems=[INTEGER, STRING], items=False),
        ('[1, "a"]', "[1]"),
        ('["a"]', '[1, "a", 2]'),
    ),
    Case(
        "items as a list (draft 7)",
        {"$schema": "http://json-schema.org/draft-07/schema#"} | of("array", items=[INTEGER], additionalItems=False),
        ("[1]",),
        ("[1, 2]", '["a"]'),
    ),
    Case("uniqueItems", of("array", items=INTEGER, uniqueItems=True), ("[1, 2]",), ("[1, 1]",)),
    Case("contains", of("array", contains=INTEGER), ("[1]", '["a", 1]'), ("[]", '["a"]')),
    Case("minContains", of("array", contains=INTEGER, minContains=2), ("[1, 2]",), ("[1]",)),
    Case("minProperties", of("object", minProperties=1), ('{"a": 1}',), ("{}",)),
    Case("maxProperties", of("object", maxProperties=1), ('{"a": 1}', "{}"), ('{"a": 1, "b": 2}',)),
    Case("propertyNames", of("object", propertyNames={"pattern": "^x"}), ('{"x1": 1}',), ('{"y": 1}',)),
    Case(
        "patternProperties",
        of("object", patternProperties={"^x": INTEGER}, additionalProperties=False),
        ('{"x1": 1}',),
        ('{"y": 1}', '{"x1": ""}'),
    ),
    Case(
        "patternProperties, unanchored",
        of("object", patternProperties={"x": INTEGER}, additionalProperties=False),
        ('{"axb": 1}',),
        ('{"y": 1}',),
    ),
    Case(
        "dependentRequired",
        of("object", dependentRequired={"a": ["b"]}),
        ('{"a": 1, "b": 2}', '{"b": 1}'),
        ('{"a": 1}',),
    ),
    Case(
        "dependentSchemas",
        of("object", dependentSchemas={"a": {"required": ["b"]}}),
        ('{"a": 1, "b": 2}',),
        ('{"a": 1}',),
    ),
    Case(
        "unevaluatedProperties", of("object", properties=A, unevaluatedProperties=False), ('{"a": 1}',), ('{"b": 1}',)
    ),
    Case("a key twice", of("object"), ('{"a": 1, "b": 2}',), ('{"a": 1, "a": 2}',)),
    Case("enum", {"enum": ["a", 1, None, [1]]}, ('"a"', "1", "null", "[1]"), ('"b"', "2", "[]")),
    Case("const", {"const": {"a": [1, 2]}}, ('{"a": [1, 2]}', '{"a":[1,2]}'), ('{"a": [1]}',)),
    Case(
        "minLength, maxLength", of("string", minLength=2, maxLength=3), ('"ab"', '"éé"', '"😀😀😀"'), ('"a"', '"abcd"')
    ),
    Case("pattern, anchored", of("string", pattern="^[a-z]+$"), ('"ab"',), ('"aB"', '""')),
    Case("pattern, unanchored", of("string", pattern="b"), ('"b"', '"abc"'), ('"ac"',)),
    Case("pattern with lookahead", of("string", pattern="^(?=a)[ab]+$"), ('"ab"',), ('"ba"',)),
    Case("pattern, maxLength", of("string", pattern="^a+$", maxLength=2), ('"aa"',), ('"aaa"', '"b"')),
    Case("format date", of("string", format="date"), ('"2024-02-29"',), ('"2024-02-30"', '"2023-02-29"', '"x"')),
    Case("format date-time", of("string", format="date-time"), ('"2024-01-02T03:04:05Z"',), ('"2024-01-02"',)),
    Case("format email", of("string", format="email"), ('"a@b.de"',), ('"a.b.de"',)),
    Case("format ipv4", of("string", format="ipv4"), ('"1.2.3.4"',), ('"1.2.3.400"',)),
    Case("format uuid", of("string", format="uuid"), ('"123e4567-e89b-12d3-a456-426614174000"',), ('"123e4567"',)),
    Case("an unknown format", of("string", format="postcode"), ('"x"',), ("1",)),
    Case("minimum, maximum", of("integer", minimum=3, maximum=120), ("3", "57", "120"), ("2", "121", "1000")),
    Case(
        "exclusive bounds",
        of("number", exclusiveMinimum=0.5, exclusiveMaximum=10),
        ("0.51", "9.99"),
        ("0.5", "10", "11"),
    ),
    Case("bounds without type", {"minimum": 3}, ("3", '"a"'), ("2",)),
    Case("multipleOf", of("integer", multipleOf=3), ("9", "0"), ("10",)),
    Case("$ref to $defs", {"$defs": {"i": INTEGER}, "$ref": "#/$defs/i"}, ("1",), ('"a"',)),
    Case("bounds beside $ref", {"$defs": {"i": INTEGER}, "$ref": "#/$defs/i", "maximum": 3}, ("1",), ("9",)),
    Case(
        "$ref to itself",
        of("object", properties={"a": {"$ref": "#"}}, additionalProperties=False),
        ('{"a": {"a": {}}}', "{}"),
        ('{"a": 1}',),
    ),
    Case("anyOf", {"anyOf": [of("string", maxLength=2), INTEGER]}, ('"ab"', "1"), ('"abc"', "null")),
    Case("oneOf, apart", {"oneOf": [INTEGER, STRING]}, ("1", '"a"'), ("null",)),
    Case(
        "oneOf by a constant key",
        {"oneOf": UNION},
        ('{"kind": "i", "v": 1}', '{"kind": "s", "v": "x"}'),
        ('{"kind": "i", "v": "x"}',),
    ),
    Case("oneOf, overlapping", {"oneOf": [INTEGER, of("number")]}, ("1.5",), ("1",)),
    Case("allOf of one", {"allOf": [of("object", properties=A, required=["a"])]}, ('{"a": 1}',), ("{}",)),
    Case(
        "allOf of two",
        {"allOf": [of("object", properties=A, required=["a"]), {"properties": {"b": STRING}, "required": ["b"]}]},
        ('{"a": 1, "b": "x"}',),
        ('{"a": 1}', '{"b": "x"}'),
    ),
    Case("allOf of bounds", {"allOf": [of("integer", minimum=3), {"maximum": 5}]}, ("4",), ("2", "6")),
    Case("not", {"not": STRING}, ("1",), ('"a"',)),
    Case("if, then", {"if": STRING, "then": {"minLength": 3}}, ('"abc"', "1"), ('"a"',)),
    Case("nullable (OpenAPI)", of("string", nullable=True), ('"a"',), ("null",)),
    Case("a remote $ref", {"$ref": "http://127.0.0.1:9/x"}, (), ()),
)
