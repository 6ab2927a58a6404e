"""`bench sft`: chats learned, four microbatches of 1,024 tokens a step: tokens a second, and the peak of memory.

The chats are as long as GSM8K's questions and answers: made of words and numbers, since the data set is not ours to
ship. A peer that reads GSM8K itself (work names "sft 4x1024" and "sft memory", and with " lora" behind them) does the
same work. All weights and an adapter are trained in a process each.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.bench.peers import Figure
from tandem.bench.work import MODEL
from tandem.plan import roofline
from tandem.plan.roofline import SMOLLM2

if TYPE_CHECKING:
    from tandem.plan.roofline import Machine

STEPS, MICROBATCHES, LENGTH = 6, 4, 1024
RANK, ALPHA = 16, 32.0
WORK = f"sft {MICROBATCHES}x{LENGTH}"
CHATS = 800
# Characters of question and answer: every 53rd of GSM8K's first 800 by length of the question.
CHARACTERS = (
    (111, 189), (132, 124), (149, 265), (162, 238), (175, 210), (189, 231), (207, 106), (223, 239),
    (238, 156), (256, 189), (275, 321), (296, 554), (320, 217), (359, 505), (447, 359),
)  # fmt: skip
WORDS = (
    "the of and in each day she has apples bought for more than how many left after week dollars cost hours "
    "miles friends gave twice half total number students boxes sold minutes per pounds books money spent"
).split()


def chats(count: int) -> Iterator[dict[str, object]]:
    """Rows with `messages`."""
    drawn = random.Random(0)

    def text(characters: int) -> str:
        said = ""
        while len(said) < characters:
            said += f"{drawn.randrange(1, 200)} " if drawn.random() < 0.2 else f"{drawn.choice(WORDS)} "
        return said[:characters].strip()

    for number in range(count):
        asked, answered = (text(length) for length in CHARACTERS[number % len(CHARACTERS)])
        yield {"messages": [{"role": "user", "content": f"{asked}?"}, {"role": "assistant", "content": f"{answered}."}]}


def sft(machine: Machine, lora: bool = False) -> Iterator[Figure]:
    """The median rate of the steps behind the first, and what the process held at most until then.

    Counted are the tokens of all sequences; those that they begin with alike are run once a microbatch. The limit is of
    a learner that runs each, and trains all weights.
    """
    from tandem.corpus.config import CorpusConfig
    from tandem.engine.config import EngineConfig
    from tandem.models.config import AdapterConfig, ModelConfig
    from tandem.report.live import LiveTable
    from tandem.report.metrics import read_metrics
    from tandem.run.config import EvaluationConfig, RunConfig
    from tandem.run.local import train
    from tandem.train.config import LearnerConfig

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "chats.jsonl"
        written.write_text("".join(json.dumps(row) + "\n" for row in chats(CHATS)), encoding="utf-8")
        config = RunConfig(
            "bench",
            steps=STEPS,
            model=ModelConfig(MODEL),
            adapter=AdapterConfig(rank=RANK, alpha=ALPHA) if lora else AdapterConfig(),
            objective="next_token",
            corpus=CorpusConfig((str(written),), tokens_per_step=MICROBATCHES * LENGTH),
            engine=EngineConfig(kv_memory_bytes=1 << 26),
            learner=LearnerConfig(lr=1e-5, microbatch_tokens=LENGTH),
            evaluation=EvaluationConfig(prompts=0),
        )
        train(config, out=Path(folder) / "run", resume=None, display=LiveTable(config.steps, sys.stderr))
        rows = [row for row in read_metrics(Path(folder) / "run") if row["step"] > 0]
        rates, lengths = list[float](), list[int]()
        for row in rows[1:]:
            path = Path(folder) / "run" / "trajectories" / f"step-{row['step']}.jsonl"
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            own = [len(line["tokens"]["ids"]) for line in lines]
            rates.append(sum(own) / (sum(row["seconds"].values()) - row["seconds"].get("checkpoint", 0.0)))
            lengths += own
    tokens, count = sum(lengths) / len(rates), len(lengths) // len(rates)
    least_s = machine.least_s(roofline.train_cost(SMOLLM2, count, round(tokens / count)))
    named = " lora" if lora else ""
    if not lora:
        yield Figure("limit", WORK, tokens / least_s)
    yield Figure("tandem", WORK + named, statistics.median(rates))
    yield Figure("tandem", f"sft memory{named}", max(row["peak_memory_bytes"] for row in rows) / 1e9, "GB")
