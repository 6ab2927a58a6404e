"""`bench dpo`: DPO on eight pairs a step, the right answer against another question's: pairs a second.

The texts are as long as GSM8K's (bench/sft.py). A peer that takes them from GSM8K itself (work "dpo 8 pairs") does the
same work: the policy's forward and backward pass and the reference's forward. "dpo 8 pairs, again" is the second epoch,
in which the reference's log-probs are known; a peer that keeps them too may give that name.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.bench.peers import Figure
from tandem.bench.sft import chats
from tandem.bench.work import MODEL
from tandem.plan import roofline
from tandem.plan.roofline import SMOLLM2

if TYPE_CHECKING:
    from tandem.plan.roofline import Machine

STEPS, BATCH = 4, 8  # of an epoch, of which the last two are timed
WORK = f"dpo {BATCH} pairs"


def pairs(count: int) -> Iterator[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`."""
    rows: list[Any] = [row["messages"] for row in chats(count)]
    for number, (asked, answered) in enumerate(rows):
        yield {"prompt": [asked], "chosen": [answered], "rejected": [rows[number - 1][1]]}


def dpo(machine: Machine) -> Iterator[Figure]:
    """The last two steps' rate of either epoch, with the limit of the rows that were run."""
    from tandem.corpus.config import CorpusConfig
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.report.live import LiveTable
    from tandem.report.metrics import read_metrics
    from tandem.rollout.config import RolloutConfig
    from tandem.run.config import EvaluationConfig, RunConfig
    from tandem.run.local import train
    from tandem.train.config import LearnerConfig

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "pairs.jsonl"
        written.write_text("".join(json.dumps(row) + "\n" for row in pairs(STEPS * BATCH)), encoding="utf-8")
        config = RunConfig(
            "bench",
            steps=2 * STEPS,
            model=ModelConfig(MODEL),
            objective="preference",
            corpus=CorpusConfig((str(written),)),
            rollout=RolloutConfig(prompts_per_step=BATCH),
            engine=EngineConfig(kv_memory_bytes=1 << 26),
            learner=LearnerConfig(lr=1e-6, microbatch_tokens=2048),
            evaluation=EvaluationConfig(prompts=0),
        )
        train(config, out=Path(folder) / "run", resume=None, display=LiveTable(config.steps, sys.stderr))
        rows = {row["step"]: row for row in read_metrics(Path(folder) / "run")}
    for work, last in ((WORK, STEPS), (f"{WORK}, again", 2 * STEPS)):
        steps = [rows[last - 1], rows[last]]
        each = [sum(row["seconds"].values()) - row["seconds"].get("checkpoint", 0.0) for row in steps]
        tokens = statistics.fmean(row["learner_rows"] for row in steps)
        cost = roofline.train_cost(SMOLLM2, BATCH, round(tokens / BATCH))
        if work == WORK:
            cost += roofline.prefill_cost(SMOLLM2, BATCH, round(tokens / BATCH))
        yield Figure("limit", work, BATCH / machine.least_s(cost), "pairs/s")
        yield Figure("tandem", work, BATCH / statistics.fmean(each), "pairs/s")
