"""Speed beside peers, in one sitting: tandem and each peer in turn, round after round, each in a process of its own.

A peer is any command that prints a JSON line a measurement, {"peer": name, "work": name, "tok_s": x} or {..., "s": x}.
Work of the same name is compared: the median over the rounds of the ratio within a round. Beside it stands the share
of the machine's limit, which each work gives as a figure of the peer "limit": the roofline of the matrix rate and
memory bandwidth measured in its process (`roofline.py`). Of a decode the steps alone count, at their mean context.

`decode NxM` is N prompts at once, M new tokens each, from the first submission to the last token, prompts included;
`decode step N` counts only the steps in which all N ran one token. `groups PxLxGxM`: P prompts of L tokens, G samples
of M tokens each.

`numerics` with peers is tandem in W8A8 (the learner with int8 gradients too) beside its own bf16 and the peers; of
`quantise` CPU seconds are compared.

The work `parity` has itself as a peer: tandem with `model.kernels = "library"`, which gives batch invariance up. The
price of exactness is the time of the exact kernels over that of the library's.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.bench.agents import agents
from tandem.bench.books import spent_in
from tandem.bench.distil import distil
from tandem.bench.dpo import dpo
from tandem.bench.gpu import check_device, gpu
from tandem.bench.gpu import measure as measure_device
from tandem.bench.peers import RATES, Figure, Side, beside_limit, peer_side, run_side
from tandem.bench.sft import WORK as SFT
from tandem.bench.sft import sft
from tandem.bench.speculate import peered as speculation
from tandem.bench.work import MODEL, answer, build_engine, build_learner, folded_programs, random_requests
from tandem.errors import WorldError
from tandem.plan import roofline
from tandem.plan.roofline import SMOLLM2, Machine, measure, timed

if TYPE_CHECKING:
    from tandem.models.config import Kernels
    from tandem.run.parts import Parts
    from tandem.types import Request

DECODES = ((64, 128), (16, 64), (1, 128), (256, 64))  # prompts at once, new tokens each
PROMPT_TOKENS = 47  # of a prompt of these
PREFILL = (16, 1024)  # prompts, tokens each
TRAIN = (16, 256)  # samples, tokens each
TURNS = (4, 6, 128, 32)  # programs of a group, turns of each, tokens of their prompt, tokens that a turn samples
GROUPS = (8, 512, 16, 32)  # prompts, tokens each, samples of each, new tokens each
AGAINST = {
    "decode 256x64": "decode 64x128",
    f"{SFT} lora": SFT,
}  # works whose rate is also given over that of another of tandem's own
PARITY_DECODES = ((64, 128), (1, 128))
PARITY_STEPS = 8
REPEATS = 3  # of a measurement within a process; the best counts, for each side alike


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


def _decode(parts: Parts, machine: Machine, count: int, new: int, codes: bool = False) -> Iterator[Figure]:
    weights = roofline.Q4_FILE_BYTES if codes else None
    least_s = machine.least_s(roofline.decode_cost(SMOLLM2, count, PROMPT_TOKENS + new / 2, weights))
    answers = (answer(parts.engine, _chats(parts, count, new, attempt)) for attempt in range(REPEATS))
    whole_s, steps_s = zip(*answers, strict=True)
    suffix = " q4" if codes else ""
    yield from beside_limit(f"decode {count}x{new}{suffix}", new * least_s, whole_s, count * new)
    yield from beside_limit(f"decode step {count}{suffix}", least_s, steps_s, count)


def _codes(machine: Machine) -> Iterator[Figure]:
    """A single stream on the 4-bit codes of the file."""
    parts = build_engine(codes=True)
    parts.engine.generate(_chats(parts, 1, 8, REPEATS))
    yield from _decode(parts, machine, 1, 128, codes=True)


def _engine(
    machine: Machine, decodes: Sequence[tuple[int, int]] = DECODES, kernels: Kernels = "exact"
) -> Iterator[Figure]:
    import tandem.run.parts  # noqa: F401  (before the clock, as a peer's imports are)

    start = time.perf_counter()
    parts = build_engine(kernels)
    parts.engine.generate(_chats(parts, 4, 8, 0))
    yield Figure("tandem", "start", time.perf_counter() - start, "s")
    for count, new in decodes:
        yield from _decode(parts, machine, count, new)
    rng = random.Random(0)

    def generated_s(prompts: int, length: int, samples: int, new: int) -> list[float]:
        return [
            timed(partial(parts.engine.generate, _groups(prompts, length, samples, new, rng))) for _ in range(REPEATS)
        ]

    count, length = PREFILL
    least_s = machine.least_s(roofline.prefill_cost(SMOLLM2, count, length))
    yield from beside_limit(f"prefill {count}x{length}", least_s, generated_s(count, length, 1, 1), count * length)
    count, length, samples, new = GROUPS
    step_s = machine.least_s(roofline.group_cost(SMOLLM2, count, length, samples, new / 2))
    least_s = machine.least_s(roofline.prefill_cost(SMOLLM2, count, length)) + (new - 1) * step_s
    yield from beside_limit(f"groups {count}x{length}x{samples}x{new}", least_s, generated_s(*GROUPS))


def _groups(count: int, length: int, samples: int, new: int, rng: random.Random) -> list[Request]:
    """Requests for samples of prompts of random tokens."""
    first = random_requests(count, length, SMOLLM2.vocab_size, new, rng)
    return [
        replace(request, id=f"{request.id}/{k}", seed=request.seed ^ k) for request in first for k in range(samples)
    ]


def _learner(machine: Machine) -> Iterator[Figure]:
    from tandem.algo.pack import count_prompts

    learner, samples = build_learner(*TRAIN)
    totals = count_prompts(samples)
    times_s = [timed(lambda: learner.step(samples, totals)) for _ in range(REPEATS + 1)]  # the best counts
    least_s = machine.least_s(roofline.train_cost(SMOLLM2, *TRAIN))
    yield from beside_limit(f"train {TRAIN[0]}x{TRAIN[1]}", least_s, times_s, TRAIN[0] * TRAIN[1])


def _fewer(eights: bool, _machine: Machine) -> Iterator[Figure]:
    """What decodes, prefills and learns, in 8 bits or, as the peer "bf16", without."""
    from tandem.algo.pack import count_prompts

    peer, parts = "tandem" if eights else "bf16", build_engine(weights="w8a8" if eights else "same")
    parts.engine.generate(_chats(parts, 4, 8, 0))
    (count, new), rng = DECODES[0], random.Random(0)
    for attempt in range(REPEATS):
        whole_s = answer(parts.engine, _chats(parts, count, new, attempt))[0]
        yield Figure(peer, f"decode {count}x{new}", count * new / whole_s)
    count, length = PREFILL
    for _ in range(REPEATS):
        whole_s = answer(parts.engine, random_requests(count, length, SMOLLM2.vocab_size, 1, rng))[0]
        yield Figure(peer, f"prefill {count}x{length}", count * length / whole_s)
    learner, samples = build_learner(*TRAIN, eights=eights)
    totals = count_prompts(samples)
    for _ in range(REPEATS):
        step_s = timed(lambda: learner.step(samples, totals))
        yield Figure(peer, f"train {TRAIN[0]}x{TRAIN[1]}", TRAIN[0] * TRAIN[1] / step_s)


def _quantised(_: Machine) -> Iterator[Figure]:
    from tandem.bench.quantise import quantise

    for row in quantise(1)["rows"]:
        yield Figure("tandem", row["work"], row["cpu_s"], "s")


def _tree(_: Machine) -> Iterator[Figure]:
    """A group whose context starts anew at each turn, as a tree and as copies."""
    from tandem.algo.pack import count_prompts

    learner, _samples = build_learner(1, 2)
    samples = folded_programs(*TURNS, SMOLLM2.vocab_size)
    totals, shared = count_prompts(samples), learner.config
    for peer, share in (("tandem", True), ("copies", False)):
        learner.config = replace(shared, share_prefix=share)
        step_s = min(timed(lambda: learner.step(samples, totals)) for _ in range(REPEATS))
        yield Figure(peer, f"train turns {'x'.join(map(str, TURNS))}", step_s, "s")


def _run(work: str, new: int, **parts: Any) -> Iterator[Figure]:
    """The time of each step of a run on sums, 16 prompts of 8 answers each; `parts` of its config."""
    from tandem.models.config import ModelConfig
    from tandem.program.config import TaskConfig
    from tandem.report.live import LiveTable
    from tandem.report.metrics import read_metrics
    from tandem.rollout.config import RolloutConfig
    from tandem.run.config import EvaluationConfig, RunConfig
    from tandem.run.local import train

    terms = (("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2))
    config = RunConfig(
        "bench",
        steps=parts.pop("steps"),
        model=ModelConfig(MODEL, kernels=parts.pop("kernels", "exact"), weights=parts.pop("weights", "same")),
        task=TaskConfig(parameters=terms, reward="last_number", **parts.pop("task")),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_new_tokens=new),
        evaluation=EvaluationConfig(prompts=0),
        **parts,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, out=Path(folder), resume=None, display=LiveTable(config.steps, sys.stderr))
        rows = read_metrics(folder)
    for row in rows:
        yield Figure("tandem", work, sum(row["seconds"].values()), "s")


def _step(_: Machine) -> Iterator[Figure]:
    from tandem.run.account import Account
    from tandem.run.ledger import Ledger
    from tandem.train.config import LearnerConfig

    task, work = {"template": "{question} Answer with just the number."}, "grpo step 16x8x64"
    with spent_in(Account, Ledger) as spent:
        steps = list(_run(work, 64, steps=6, task=task, learner=LearnerConfig(lr=5e-6)))
    yield from steps
    yield Figure("tandem", f"{work}: its ledger", max(spent.seconds / sum(step.value for step in steps), 1e-9), "share")


def demo_steps(kernels: Kernels = "exact", weights: str = "same", **settings: Any) -> Iterator[Figure]:
    """The recipe smollm2_arithmetic_cpu, short and without evaluation; `settings` of the learner."""
    from tandem.engine.config import EngineConfig
    from tandem.train.config import LearnerConfig

    task = {"system": "You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7"}
    learner = LearnerConfig(lr=2e-5, warmup_steps=4, beta2=0.99, **settings)
    engine = EngineConfig(kv_memory_bytes=256 << 20)
    work, steps = "grpo step 16x8x24", PARITY_STEPS
    return _run(work, 24, steps=steps, kernels=kernels, weights=weights, task=task, learner=learner, engine=engine)


def _parity(kernels: Kernels, machine: Machine) -> Iterator[Figure]:
    """What generates and a step of the demo, under the name of the kernels that ran."""
    for figure in (*_engine(machine, PARITY_DECODES, kernels), *demo_steps(kernels)):
        if figure.work != "start":
            yield replace(figure, peer=kernels) if (figure.peer, kernels) == ("tandem", "library") else figure


WORKS: dict[str, Sequence[Callable[[Machine], Iterator[Figure]]]] = {
    "engine": (_engine, _codes),
    "learner": (_learner,),
    "tree": (_tree,),
    "distil": (distil,),
    "step": (_step,),
    "agents": (agents,),
    "sft": (sft,),
    "sft/lora": (partial(sft, lora=True),),
    "dpo": (dpo,),
    "parity": (partial(_parity, "exact"),),
    "parity/library": (partial(_parity, "library"),),
    "gpu": (gpu,),
    "numerics": (partial(_fewer, True), _codes),
    "numerics/bf16": (partial(_fewer, False),),
    "quantise": (_quantised,),
    "speculate": (speculation,),
}


def _best(figures: Sequence[Figure]) -> dict[tuple[str, str], Figure]:
    """Of each peer and work: the best rate of a process, but the median time of steps, which differ in content."""
    grouped: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        grouped.setdefault((figure.peer, figure.work), []).append(figure)
    return {
        key: max(same, key=lambda f: f.speed)
        if same[0].unit in RATES
        else Figure(*key, statistics.median(f.value for f in same), same[0].unit)
        for key, same in grouped.items()
    }


def compare(rounds: Sequence[Sequence[Figure]]) -> list[dict[str, Any]]:
    """A row for each work of tandem's: medians over the rounds, ratios within a round, share of the limit.

    Beside the peer "library" also the price of exactness, the time of tandem's exact kernels over the library's. Of a
    work in AGAINST also "own": its rate over that of the other work.

    >>> a, b = Figure("tandem", "w", 30.0), Figure("hf", "w", 10.0)
    >>> compare([[a, b]])[0]["peers"]["hf"]["ratio"]
    3.0
    """
    best = [_best(figures) for figures in rounds]
    rows = []
    for peer, work in best[0]:
        if peer != "tandem":
            continue
        ours = [figures["tandem", work] for figures in best]
        unit, ceiling = ours[0].unit, [figures["limit", work] for figures in best if ("limit", work) in figures]
        row: dict[str, Any] = {"work": work, "unit": unit, "tandem": _median(ours), "peers": {}, "share_of_limit": None}
        if ceiling:
            over = row["tandem"] / _median(ceiling)
            row["share_of_limit"] = over if unit in RATES else 1.0 / over
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
    return statistics.median(f.value for f in figures)


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
    limits = {f.work: f.value for f in whole[0] if f.peer == "limit"}
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
    machine = measure_device() if work == "gpu" else measure()
    print(Figure("limit", "matrix FLOP/s", machine.flop_s).line())
    print(Figure("limit", "memory bytes/s", machine.bytes_s).line())
    for part in WORKS[work]:
        for figure in part(machine):
            print(figure.line(), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
