"""Speed beside peers, in one sitting: tandem and each peer in turn, round after round, each in a process of its own.

A peer is any command that prints a JSON line a measurement, {"peer": name, "work": name, "tok_s": x} or {..., "s": x}.
Work of the same name is compared: the median over the rounds of the ratio within a round. Beside it stands the share
of the machine's limit, the roofline of the measured matrix rate and memory bandwidth (`roofline.py`).

`decode NxM` is N prompts at once, M new tokens each, from the first submission to the last token, prompts included;
`decode step N` counts only the steps in which all N ran one token. `groups PxLxGxM`: P prompts of L tokens, G samples
of M tokens each.

The work `parity` has itself as a peer: tandem with `model.kernels = "library"`, which gives batch invariance up. The
price of exactness is the time of the exact kernels over that of the library's.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.bench import roofline
from tandem.bench.gpu import check_device, gpu
from tandem.bench.peers import Figure, Side, peer_side, run_side
from tandem.bench.roofline import SMOLLM2, Machine, measure, timed
from tandem.bench.work import MODEL, answer, build_engine, build_learner
from tandem.errors import WorldError

if TYPE_CHECKING:
    from tandem.models.config import Kernels
    from tandem.run.config import RunConfig
    from tandem.run.parts import Parts
    from tandem.types import Request

DECODES = ((64, 128), (16, 64), (1, 128), (256, 64))  # prompts at once, new tokens each
PROMPT_TOKENS = 47  # of a prompt of these
PREFILL = (16, 1024)  # prompts, tokens each
GROUPS = (8, 512, 16, 32)  # prompts, tokens each, samples of each, new tokens each
AGAINST = {"decode 256x64": "decode 64x128"}  # works whose rate is also given over that of another of tandem's own
PARITY_DECODES = ((64, 128), (1, 128))
PARITY_STEPS = 8
REPEATS = 3  # of a measurement within a process; the best counts, for each side alike


def _machine() -> Iterator[Figure]:
    """Matrix rate in bf16 (FLOP/s) and memory bandwidth (bytes/s), under the names of limits."""
    machine = measure()
    yield Figure("limit", "matrix FLOP/s", machine.flop_s, None)
    yield Figure("limit", "memory bytes/s", machine.bytes_s, None)


def _chats(parts: Parts, count: int, new: int, attempt: int) -> list[Request]:
    """The prompts that every peer answers."""
    from tandem.types import Message, Request, Sampling

    requests = []
    for i in range(count):
        text = f"What is {i * 7 % 97} + {i * 13 % 89}? Explain step by step in detail."
        tokens = tuple(parts.tokenizer.render_messages([Message("user", text)], add_generation_prompt=True))
        name = f"{count}/{attempt}/{i}"
        requests.append(Request(name, name, tokens, Sampling(max_new_tokens=new), seed=attempt << 20 | i))
    return requests


def _decode(parts: Parts, count: int, new: int, suffix: str = "") -> Iterator[Figure]:
    for attempt in range(REPEATS):
        seconds, step_s = answer(parts.engine, _chats(parts, count, new, attempt))
        yield Figure("tandem", f"decode {count}x{new}{suffix}", count * new / seconds, None)
        yield Figure("tandem", f"decode step {count}{suffix}", count / step_s, None)


def _codes() -> Iterator[Figure]:
    """A single stream on the 4-bit codes of the file."""
    parts = build_engine(codes=True)
    parts.engine.generate(_chats(parts, 1, 8, REPEATS))
    yield from _decode(parts, 1, 128, " q4")


def _engine(decodes: Sequence[tuple[int, int]] = DECODES, kernels: Kernels = "exact") -> Iterator[Figure]:
    import tandem.run.parts  # noqa: F401  (before the clock, as a peer's imports are)
    from tandem.types import Request, Sampling

    start = time.perf_counter()
    parts = build_engine(kernels)
    engine = parts.engine
    engine.generate(_chats(parts, 4, 8, 0))
    yield Figure("tandem", "start", None, time.perf_counter() - start)
    for count, new in decodes:
        yield from _decode(parts, count, new)
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[tuple[int, ...]]:
        return [tuple(rng.randrange(100, 40000) for _ in range(length)) for _ in range(count)]

    count, length = PREFILL
    for attempt in range(REPEATS):
        requests = [
            Request(f"p/{attempt}/{i}", "p", prompt, Sampling(max_new_tokens=1), i)
            for i, prompt in enumerate(prompts(count, length))
        ]
        seconds = timed(partial(engine.generate, requests))
        yield Figure("tandem", f"prefill {count}x{length}", count * length / seconds, None)
    count, length, samples, new = GROUPS
    for attempt in range(REPEATS):
        requests = [
            Request(f"g/{attempt}/{i}/{k}", f"g/{i}", prompt, Sampling(max_new_tokens=new), i << 10 | k)
            for i, prompt in enumerate(prompts(count, length))
            for k in range(samples)
        ]
        seconds = timed(partial(engine.generate, requests))
        yield Figure("tandem", f"groups {count}x{length}x{samples}x{new}", None, seconds)


def _learner() -> Iterator[Figure]:
    from tandem.algo.pack import count_prompts

    learner, samples = build_learner(16, 256)
    totals = count_prompts(samples)
    for _ in range(REPEATS + 1):  # the first is a warm-up on both sides: the best counts
        seconds = timed(lambda: learner.step(samples, totals))
        yield Figure("tandem", "train 16x256", 16 * 256 / seconds, None)


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
    "engine": lambda: chain(_engine(), _codes()),
    "learner": _learner,
    "step": _step,
    "parity": partial(_parity, "exact"),
    "parity/library": partial(_parity, "library"),
    "gpu": gpu,
}


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
    """The roofline of a work on SmolLM2-135M, in its unit (tokens a second, or seconds); None for one without.

    Products and bytes as in roofline.py. Of a decode the steps alone count, at their mean context, not the prompts.
    """
    found = re.fullmatch(r"(decode|decode step|prefill|groups|train) ([\dx]+)( q4)?", work)
    if found is None:
        return None
    machine, spec = Machine(flop_s, bytes_s), SMOLLM2
    kind, shape = found[1], [int(number) for number in found[2].split("x")]
    if kind in ("decode", "decode step"):
        rows, new = shape[0], (shape[1:] or [dict(DECODES)[shape[0]]])[0]
        weights = roofline.Q4_FILE_BYTES if found[3] else None
        return rows / machine.least_s(roofline.decode_cost(spec, rows, PROMPT_TOKENS + new / 2, weights))
    if kind == "prefill":
        return shape[0] * shape[1] / machine.least_s(roofline.prefill_cost(spec, *shape))
    if kind == "train":
        return shape[0] * shape[1] / machine.least_s(roofline.train_cost(spec, *shape))
    prompts, length, samples, new = shape
    step_s = machine.least_s(roofline.group_cost(spec, prompts, length, samples, new / 2))
    return machine.least_s(roofline.prefill_cost(spec, prompts, length)) + (new - 1) * step_s


def compare(rounds: Sequence[Sequence[Figure]]) -> list[dict[str, Any]]:
    """A row for each work of tandem's: medians over the rounds, ratios within a round, share of the limit.

    Beside the peer "library" also the price of exactness, the time of tandem's exact kernels over the library's. Of a
    work in AGAINST also "own": its rate over that of the other work.

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
        ceiling = limits.get(work) or (
            limit(work, limits["matrix FLOP/s"], limits["memory bytes/s"]) if limits else None
        )
        over = row["tandem"] / ceiling if ceiling else None
        row["share_of_limit"] = 1.0 / over if over and unit == "s" else over
        own = AGAINST.get(work)
        if own and ("tandem", own) in best[0]:
            ratio = statistics.median(f["tandem", work].speed / f["tandem", own].speed for f in best)
            row["own"] = {"work": own, "ratio": ratio}
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
    """Measure a work and its peers in turn. WorldError where a side fails before tandem has a figure.

    A later failure ends the measurement and is the result's "failure"; rows are of the whole rounds, or of what there
    is of the first.
    """
    if work == "gpu":
        check_device()
    own = (name for name in WORKS if name.split("/")[0] == work)
    sides = [Side((sys.executable, "-m", "tandem.bench.beside", name), own=True) for name in own]
    sides += [peer_side(peer) for peer in peers]
    measured: list[list[Sequence[Figure]]] = []
    failure = None
    try:
        for _ in range(rounds):
            measured.append([])
            for side in sides:
                measured[-1].append(_measure(side, measured))
    except WorldError as error:
        failure = str(error)
        if len(measured) > 1:
            measured.pop()
        if not measured[0]:
            raise
    whole = [[figure for figures in of_round for figure in figures] for of_round in measured]
    limits = {f.work: f.tok_s for f in whole[0] if f.peer == "limit"}
    return {"bench": work, "rounds": len(whole), "limits": limits, "rows": compare(whole), "failure": failure}


def _measure(side: Side, measured: Sequence[Sequence[Sequence[Figure]]]) -> Sequence[Figure]:
    """The figures of a side that is next in the last round; WorldError where they do not fit those before them."""
    earlier = [figure for figures in measured[-1] for figure in figures]
    figures = run_side(side, {f.work: f.unit for f in earlier if f.peer == "tandem"})
    keys = {(f.peer, f.work) for f in figures}
    for peer, work in sorted(keys & {(f.peer, f.work) for f in earlier if f.peer != "limit"}):
        raise WorldError(f"{side} gives {work!r} of {peer!r}, as a side before it does. Give each peer its own name.")
    first = {(f.peer, f.work) for f in measured[0][len(measured[-1])]} if len(measured) > 1 else keys
    for peer, work in sorted(keys ^ first):
        lacking = f"round {len(measured)}" if (peer, work) in first else "round 1"
        raise WorldError(f"{side} gave no {work!r} of {peer!r} in {lacking}: every round has to have the same works.")
    return figures


def _main(work: str) -> None:
    env.limit_spinning()
    for part in (_machine, WORKS[work]) if work != "gpu" else (gpu,):
        for figure in part():
            line = {"peer": figure.peer, "work": figure.work, "tok_s": figure.tok_s, "s": figure.s}
            print(json.dumps({key: value for key, value in line.items() if value is not None}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
