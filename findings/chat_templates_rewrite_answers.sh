#!/usr/bin/env bash
# Chat templates as unsloth 2026.10.9 carries them, rendered by jinja2 3.1.6: what an assistant said is written otherwise
# when more follows, so a conversation rendered anew is not the tokens that were sampled.
# Qwen3: an answer without reasoning gains an empty think block while it is the last, and loses it when a question
# follows; reasoning before the last question is gone. gpt-oss: the analysis of a turn is there while it is the last, and
# gone when a question follows. Llama 3.1: two calls in a turn raise.
# Seen: True True True True.
# Exits non-zero if that changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q "jinja2==3.1.6"
"$place/venv/bin/pip" download -q --no-deps --dest "$place" "unsloth==2026.10.9"
"$place/venv/bin/python" - "$place" <<'PY'
import ast, json, sys, zipfile
from pathlib import Path
from jinja2.sandbox import ImmutableSandboxedEnvironment

(wheel,) = Path(sys.argv[1]).glob("unsloth-*.whl")
source = zipfile.ZipFile(wheel).read("unsloth/chat_templates.py").decode()
templates = {}
for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant):
        templates[node.targets[0].id] = node.value.value


def refuse(reason):
    raise ValueError(reason)


environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "2026-01-01"}


def render(name, *messages, **more):
    return environment.from_string(templates[name]).render(messages=messages, bos_token="", eos_token="", **more)


ask, more = {"role": "user", "content": "q"}, {"role": "user", "content": "r"}
plain = {"role": "assistant", "content": "4"}
thought = plain | {"reasoning_content": "sum", "thinking": "sum"}
block = "<think>\n\n</think>\n\n4"
seen = [
    block in render("qwen3_template", ask, plain) and block not in render("qwen3_template", ask, plain, more),
    "sum" in render("qwen3_template", ask, thought) and "sum" not in render("qwen3_template", ask, thought, more),
    "sum" in render("gptoss_template", ask, thought) and "sum" not in render("gptoss_template", ask, thought, more),
]
call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
try:
    render("llama31_template", ask, plain | {"tool_calls": [call, call]}, tools=tools)
    seen.append(False)
except ValueError as error:
    seen.append("single tool-calls" in str(error))
print(*seen)
sys.exit(not all(seen))
PY
