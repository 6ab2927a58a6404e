#!/usr/bin/env bash
# transformers 5.23.0, jinja2 3.1.6: apply_chat_template changes messages before the template sees them, so the same
# template rendered by jinja gives another text. A key whose value is None is gone (`is defined` is then false), and
# reasoning given as `reasoning_content`, `thinking` or `reasoning` is there under the first two names.
# Seen: Transformers "no sum sum ", jinja "yes sum  ".
# Exits non-zero if that changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q "transformers==5.23.0" "jinja2==3.1.6"
"$place/venv/bin/python" - <<'PY' 2>/dev/null
import sys
import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

template = (
    "{{ 'yes' if messages[0].tool_calls is defined else 'no' }} {{ messages[0].reasoning_content }} "
    "{{ messages[0].thinking }} {{ messages[0].reasoning }}"
)
messages = [{"role": "assistant", "content": "4", "tool_calls": None, "reasoning_content": "sum"}]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
theirs = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
plain = jinja2.Template(template).render(messages=messages)
print(f"Transformers {theirs!r}, jinja {plain!r}")
sys.exit((theirs, plain) != ("no sum sum ", "yes sum  "))
PY
