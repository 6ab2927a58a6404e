"""64 programs of 6 turns of 32 tokens with TRL's GRPOTrainer: its tools answer after 10 to 500 ms.

    agents_trl.py MODEL_DIR

A line for the rollouts of each of two batches, as `tandem bench agents` times its own; no learning in it. Each
sampled text is taken as a call of the tool, so that every program has six turns, as in tandem's own side. The waits are
those of tandem.bench.slow_tools.
"""

import asyncio
import json
import math
import os
import random
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

PROGRAMS, TURNS, NEW = 64, 6, 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
calls = 0


def wait_s():
    global calls
    calls += 1
    return min(max(random.Random(calls).lognormvariate(math.log(0.04), 1.2), 0.01), 0.5)


async def ask(step: int) -> str:
    """Tells what follows.

    Args:
        step: which step.
    """
    await asyncio.sleep(wait_s())
    return f"The tool says {calls * 7919 % 1000}. What follows? Explain the next step."


def called(tokenizer, ids, prefix=None, tools=None):
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"type": "function", "function": {"name": "ask", "arguments": {"step": 1}}}],
    }


def question(index):
    text = f"What is {index * 7 % 97} + {index * 13 % 89}, and why? Use the tool before you answer, step by step."
    return f"Problem train {index}. {text}"


grpo_trainer.parse_response = called
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.chat_template = TEMPLATE
tokenizer.response_schema = {"type": "object"}
config = GRPOConfig(
    output_dir="trl_out",
    per_device_train_batch_size=16,
    gradient_accumulation_steps=4,
    num_generations=4,
    max_completion_length=600,
    max_tool_calling_iterations=TURNS - 1,
    learning_rate=5e-6,
    max_steps=2,
    logging_steps=1,
    bf16=True,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    temperature=1.0,
    beta=0.0,
    model_init_kwargs={"dtype": "bfloat16"},
    gradient_checkpointing=False,
)
data = Dataset.from_list([{"prompt": [{"role": "user", "content": question(index)}]} for index in range(400)])
trainer = GRPOTrainer(
    model=sys.argv[1],
    processing_class=tokenizer,
    tools=[ask],
    args=config,
    train_dataset=data,
    reward_funcs=lambda completions, **_: [random.random() for _ in completions],
)
trainer.generation_config.max_new_tokens = NEW
generate, turn = trainer._generate, trainer._generate_single_turn
turns = []


def timed(prompts):
    for _ in range(2):
        began = time.perf_counter()
        generate(prompts)
        print(json.dumps({"peer": "trl", "work": "agents 64x6x32", "s": time.perf_counter() - began}), flush=True)
    assert turns == [PROGRAMS] * TURNS * 2, turns
    os._exit(0)  # no learning is timed


def counted(*arguments, **named):
    answer = turn(*arguments, **named)
    turns.append(len(answer[0]))
    return answer


trainer._generate, trainer._generate_single_turn = timed, counted
trainer.train()
