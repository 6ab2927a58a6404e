#!/usr/bin/env bash
# llguidance 1.9.1 through Python, on a tokeniser of a byte each, "true" and an end:
#   where all texts go on with the same bytes, the mask has the one token that the tokeniser makes of them; consume_token takes others all the same
#   a tokeniser whose end it doesn't know, and isn't told, has token 0 as the end: it is allowed where a text may end, and stands for no text there
#   n_vocab beyond the tokeniser's own size makes no id for an end: eos_token has to be one that the tokeniser has
#   "\u00e9" is no JSON string unless json_allow_general_unicode_escapes is set; 2023-02-29 is a date; a key may come twice
#   its own grammar_from("choice", ...) of 2,001 texts compiles without an error, has a mask, and takes no token of it ("max is 2000")
#   a schema's own "x-guidance" can make it lenient: then keywords that it doesn't know are dropped, as xgrammar does
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
boolean: ['f', 't', 'true']
always true: ['t'], though 'true' is taken: True
an end that it knows by no name: 0
x*, x: ['!', 'x']
eos_token 300 with n_vocab 400: EOS token ID 300 is out of range (vocab_size=258)
"\u00e9": False, then True
"2023-02-29": True
{"a": 1, "a": 2}: True
2001 choices: no error, ['v'], taken: False, Parser Error: Current row has 2002 items; max is 2000
not, then lenient: Unimplemented keys: ["not"], then taken
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1
"$folder/venv/bin/python" - > "$folder/seen" <<'END'
import json

from llguidance import LLMatcher, LLTokenizer, grammar_from

byte = {**{code: chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))}}
rest = (code for code in range(256) if code not in byte)
byte |= {code: chr(256 + place) for place, code in enumerate(rest)}
level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
names = ["!", *(byte[code] for code in range(256) if code != 33), "true", "<end>"]


def tokenizer(**more):
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    return LLTokenizer(json.dumps({"version": "1.0", "pre_tokenizer": level, "decoder": level, "model": model}), **more)


def allowed(matcher):
    mask = matcher.compute_bitmask()
    return sorted(name for i, name in enumerate(names) if mask[i // 8] >> i % 8 & 1)


def takes(schema, text, **options):
    matcher = LLMatcher(told, LLMatcher.grammar_from_json_schema(schema, options), log_level=0)
    if matcher.is_error():
        return matcher.get_error().split("\n")[0]
    ids = [names.index(byte[code]) for code in text.encode()]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


told = tokenizer(eos_token=257)
boolean, always = (LLMatcher(told, LLMatcher.grammar_from_json_schema(s)) for s in ({"type": "boolean"}, {"enum": [True]}))
print(f"boolean: {allowed(boolean)}")
print(f"always true: {allowed(always)}, though 'true' is taken: {always.consume_token(256)}")
untold = tokenizer()
print(f"an end that it knows by no name: {untold.eos_token}")
matcher = LLMatcher(untold, LLMatcher.grammar_from_regex("x*"))
matcher.consume_token(names.index("x"))
print(f"x*, x: {allowed(matcher)}")
try:
    tokenizer(eos_token=300, n_vocab=400)
except ValueError as error:
    print(f"eos_token 300 with n_vocab 400: {error}")
escape = r'"\u00e9"'
print(f"{escape}: {takes({'type': 'string'}, escape)}, then", takes({"type": "string"}, escape, json_allow_general_unicode_escapes=True))
print('"2023-02-29":', takes({"type": "string", "format": "date"}, '"2023-02-29"'))
print('{"a": 1, "a": 2}:', takes({"type": "object"}, '{"a": 1, "a": 2}'))
many = LLMatcher(told, grammar_from("choice", json.dumps([f"v{i}" for i in range(2001)])), log_level=0)
print(f"2001 choices: {many.get_error() or 'no error'}, {allowed(many)}, taken:", many.consume_token(names.index("v")), end=", ")
print(";".join(many.get_error().split(";")[:2]))
lenient = takes({"not": {}, "x-guidance": {"lenient": True}}, "1")
print(f"not, then lenient: {takes({'not': {}}, '1')}, then {'taken' if lenient is True else lenient}")
END
diff "$folder/expected" "$folder/seen"
