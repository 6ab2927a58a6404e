#!/usr/bin/env bash
# trl 1.16.0 (transformers 5.24.0): GRPOTrainer takes tools that are `async def`, and gathers only the calls of one
# message. Programs are waited for one after another: with 8 programs in a batch that each call a tool that takes
# 0.2 s, one call is under way at any time and the batch waits 1.6 s, as with a tool that is no coroutine. Two calls in
# one message do run together. The model generates for nobody meanwhile.
# Here a model of random weights draws, and each text counts as calls (parse_response is replaced), so no weights are
# fetched. Takes some minutes. Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
8 programs with 1 call each: 8 calls, most under way at once 1, waited 8 times the tool's time
8 programs with 2 calls each: 16 calls, most under way at once 2, waited 8 times the tool's time
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.24.0 datasets==5.2.0
cd "$folder"
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/err" <<'END' || { tail -20 "$folder/err" >&2; exit 1; }
import asyncio
import sys
import time

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

TOOL_S = 0.2
words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(29))])}, "<unk>"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %} {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %} <eos> "
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
tokenizer.response_schema = {"type": "object"}
under_way = most = made = asked = 0
spans = []


async def ask(number: int) -> str:
    """Answers.

    Args:
        number: what is asked.
    """
    global under_way, most, made
    under_way, made, began = under_way + 1, made + 1, time.monotonic()
    most = max(most, under_way)
    await asyncio.sleep(TOOL_S)
    under_way -= 1
    spans.append((began, time.monotonic()))
    return "7"


def calls(tokenizer, ids, prefix=None, tools=None):
    call = {"type": "function", "function": {"name": "ask", "arguments": {"number": 1}}}
    return {"role": "assistant", "content": "1", "tool_calls": [call] * asked}


def union(spans):
    total = end = 0.0
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return total


grpo_trainer.parse_response = calls
for asked in (1, 2):
    most = made = 0
    spans.clear()
    config = GRPOConfig(
        output_dir="out", per_device_train_batch_size=8, num_generations=8, max_completion_length=256, max_steps=1,
        max_tool_calling_iterations=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        )),
        processing_class=tokenizer, tools=[ask], args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "1 2 3"}]}] * 8),
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
    )
    trainer.generation_config.max_new_tokens = 4
    trainer.train()
    waited = union(spans) / TOOL_S
    assert abs(waited - round(waited)) < 0.3, waited
    print(f"8 programs with {asked} call{'s' * (asked > 1)} each: {made} calls, most under way at once {most}, "
          f"waited {round(waited)} times the tool's time", file=sys.__stdout__)
END
grep '^8 programs' "$folder/seen" > "$folder/lines"
diff "$folder/expected" "$folder/lines"
