#!/usr/bin/env bash
# xgrammar 0.2.9 compiles schemas of which it drops keywords, without an error: texts that do not fit are taken.
#   not, if/then, contains, uniqueItems, dependentRequired, unevaluatedProperties: dropped; so are allOf of two schemas (all but the first),
#   bounds without a type or beside $ref, maxLength beside pattern, and a required key that no property describes
#   a pattern is of the whole string: "b" takes "b" alone, and no "abc"; so patternProperties "^x" has no key "x1"; a lookahead is ignored
#   a $ref to http is anything. Where it warns, it does so on stderr
# Output seen: the lines under "expected" (schema, text, whether it is taken).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
{"not": {"type": "string"}} | "a" | True
{"if": {"type": "string"}, "then": {"minLength": 3}} | "a" | True
{"type": "array", "contains": {"type": "integer"}} | ["a"] | True
{"type": "array", "items": {"type": "integer"}, "uniqueItems": true} | [1, 1] | True
{"type": "object", "dependentRequired": {"a": ["b"]}} | {"a": 1} | True
{"type": "object", "properties": {"a": {}}, "unevaluatedProperties": false} | {"b": 1} | True
{"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]} | 2 | True
{"minimum": 3} | 2 | True
{"$defs": {"i": {"type": "integer"}}, "$ref": "#/$defs/i", "maximum": 3} | 9 | True
{"type": "string", "pattern": "^a+$", "maxLength": 2} | "aaa" | True
{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "z"]} | {"a": 1} | True
{"type": "string", "pattern": "b"} | "abc" | False
{"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": false} | {"x1": 1} | False
{"type": "string", "pattern": "^(?=a)[ab]+$"} | "ba" | True
{"$ref": "http://127.0.0.1:9/x"} | [null] | True
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 xgrammar==0.2.9
"$folder/venv/bin/python" - "$folder/expected" 2> /dev/null > "$folder/seen" <<'END'
import sys

import xgrammar

tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
compiler = xgrammar.GrammarCompiler(info, max_threads=1)
for line in open(sys.argv[1], encoding="utf-8"):
    schema, text, _ = line.rstrip("\n").split(" | ")
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema, strict_mode=False))
    taken = all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(256)
    print(schema, text, taken, sep=" | ")
END
diff "$folder/expected" "$folder/seen"
