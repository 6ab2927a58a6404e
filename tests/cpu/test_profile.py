"""Regression caught: a profile that leaves operations out, counts them wrongly, or is of another step than it says."""

from __future__ import annotations

import dataclasses
import random
import re
import types

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.bench import profile as profiles
from tandem.bench import sweep
from tandem.bench.profile import KERNELS, REST
from tandem.columns import Columns
from tandem.kernels.build import load
from tandem.kernels.forward import KINDS
from tandem.plan.roofline import Cost, Machine, kv_bytes
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Sample

MACHINE = Machine(1e12, 25e9)
LAYERS, QKV, OUT, WIDE, HEAD = 2, 32 * 128, 32 * 64, 32 * 48, 32 * 97  # of `make_decoder`'s model: elements of a matrix


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "STEPS", 2)
    monkeypatch.setattr(profiles, "SMALL", 0.0)


def by_operation(work: dict) -> dict[str, dict]:
    assert sum(row["seconds"] for row in work["rows"]) == pytest.approx(work["wall_s"])
    assert work["host_s"] <= work["wall_s"] and work["limit_s"] < work["seconds"]
    return {row["operation"]: row for row in work["rows"]}


@dataclasses.dataclass
class Span:
    """What is read of a torch.autograd.profiler_util.FunctionEvent; microseconds."""

    name: str
    cpu_parent: Span | None
    cpu_time_total: float
    self_cpu_time_total: float
    concrete_inputs: tuple = ()


def test_time_goes_to_the_innermost_row_and_the_rows_sum_to_the_work():
    """Seconds of a kernel counted again in its caller, or lost between them; spans from before the work counted in."""
    main = Span("elsewhere.py(1): <module>", None, 1000.0, 40.0)
    work = Span(profiles.WORK, main, 900.0, 100.0)
    run = Span("src/tandem/bench/profile.py(9): run", work, 800.0, 50.0)
    plan = Span("/x/tandem/src/tandem/engine/schedule.py(80): plan", run, 750.0, 200.0)
    torch_op = Span("aten::add", plan, 300.0, 300.0)
    kernel = Span("tandem::linear_bf16", plan, 250.0, 240.0, (8, 4, 6, 8))
    inside = Span("aten::empty", kernel, 10.0, 10.0)
    wall_s, rows = profiles.rows_of([main, work, run, plan, torch_op, kernel, inside], {(6, 8): "qkv"})
    assert wall_s == pytest.approx(900e-6) == sum(row.seconds for row in rows.values())
    assert {label: round(1e6 * row.seconds) for label, row in rows.items()} == {
        REST: 150, "engine/schedule": 500, "qkv": 250
    }  # fmt: skip
    assert rows["qkv"].calls == 1 and rows["qkv"].cost == Cost(2 * 4 * 6 * 8, 2 * (4 * 6 + 4 * 8 + 6 * 8))


def test_decode_step_is_split_by_operation(make_decoder, parity):
    """Rows that do not add up to the step; keys that a query sees left out; a prompt's step among those measured."""
    for _ in range(profiles.TRIES):
        engine = parity.engine(make_decoder("bfloat16"), num_pages=64, page_tokens=16)
        sweep.fill_pages(engine)
        ran = engine.stats.run_tokens
        starts, run = [], engine.runner.run
        engine.runner.run = lambda batch, starts=starts, run=run: (starts.append(batch.works[0].start), run(batch))[1]
        work = profiles.decode_work(engine, 3, 20, MACHINE)
        if len(starts) <= 5:  # else a profile could not be read, and was taken again
            break
    assert engine.stats.run_tokens - ran == 3 * 20 + 3 * (1 + 2 * 2)  # the stub's, then one that warms up and four
    rows = by_operation(work)
    assert {REST, "engine/schedule", "engine/runner", "models/fused"} <= rows.keys()
    assert rows["qkv"]["flop"] == 2 * 3 * LAYERS * QKV and rows["out"]["flop"] == 2 * 3 * LAYERS * OUT
    assert rows["gate, up, SwiGLU"]["flop"] == 2 * rows["down"]["flop"] == 4 * 3 * LAYERS * WIDE
    assert starts == [20, 21, 22, 23, 24]
    seen = (23 + 24) / 2  # keys of the two in the middle, which begin at 22 and 23
    assert rows["attention"]["flop"] == 4 * 3 * seen * LAYERS * 4 * 16
    assert rows["attention"]["bytes"] == 3 * seen * kv_bytes(engine.runner.decoder.spec) + 2 * 2 * 3 * LAYERS * 4 * 16
    assert rows["head, sampling"]["flop"] == 2 * 3 * HEAD and rows["head, sampling"]["calls"] == 1
    assert all(rows[kind]["seconds"] > 0 and rows[kind]["calls"] % LAYERS == 0 for kind in KINDS[2:])
    assert not engine.scheduler.live and engine.runner.forward.seconds is None


def test_prefill_multiplies_the_last_layer_by_the_rows_that_are_asked_for(make_decoder, parity):
    """Operations that the forward pass leaves out, counted as done: a rate above the machine's."""
    engine = parity.engine(make_decoder("bfloat16"), num_pages=64, page_tokens=16, batch_tokens=200)
    rows = by_operation(profiles.prefill_work(engine, 3, 40, MACHINE))
    assert rows["qkv"]["flop"] == 2 * 120 * LAYERS * QKV
    assert rows["down"]["flop"] == 2 * (120 + 3) * WIDE
    assert rows["attention"]["flop"] == 4 * 3 * (40 * 41 / 2 + 40) * 4 * 16
    assert rows["head, sampling"]["flop"] == 2 * 3 * HEAD


def test_learner_step_is_split_by_operation(make_decoder):
    """A backward product without a row, or one that is counted as its twin; the step changed by being measured."""
    rng = random.Random(0)
    mask, count, length = (False, *(True,) * 9), 4, 10
    known = Columns.of(loss_mask=mask, advantages=(1.0,) * length, logprobs=(-4.0,) * length)
    samples = [Sample(f"s{i}", f"p{i}", known.having(tokens=[rng.randrange(97) for _ in mask])) for i in range(count)]
    weights = []
    for probed in (True, False):
        decoder = make_decoder("bfloat16")
        learner = Learner(decoder, LearnerConfig(lr=1e-3), PolicyGradient(AlgoConfig(), 1.0), 10)
        if probed:
            rows = by_operation(profiles.learner_work(learner, samples, MACHINE))
        else:
            for _ in range(3):
                learner.step(samples, count_prompts(samples))
        weights.append([weight.value for _, weight in decoder.weights()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    rows_run = count * (length - 1)  # nothing is predicted from a last token, and no other query sees it
    for name, size in (("qkv", QKV), ("out", OUT), ("gate_up", 2 * WIDE), ("down", WIDE)):
        for label in (name, f"weight gradient: {name}", f"input gradient: {name}"):
            assert rows[label]["flop"] == 2 * rows_run * LAYERS * size, label
            assert rows[label]["kind"] == "kernel" and rows[label]["calls"] == LAYERS, label
    met = count * (length - 1) * length / 2
    assert rows["attention"]["flop"] == 4 * met * LAYERS * 4 * 16
    assert rows["attention backward"]["flop"] == 2.5 * rows["attention"]["flop"]
    assert (
        2 * rows["head: log-probs, entropy"]["flop"] == rows["head: log-probs backward"]["flop"] == 4 * rows_run * HEAD
    )
    assert rows["AdamW"]["bytes"] == 30 * sum(weight.numel() for weight in weights[0])
    assert {"rotation", "norm", "norm backward", "swiglu", "swiglu backward", "packing of weights"} <= rows.keys()
    assert {"kernels/linear", "models/decoder", "train/optimiser"} <= rows.keys()


def test_every_kernel_of_the_table_is_one_that_there_is():
    """A kernel that was renamed loses its operations and bytes in the profile, in silence."""
    sources = "".join(path.read_text() for path in load.SOURCES.glob("*.cpp"))
    for name in KERNELS:
        assert re.search(rf"\b{name}_?(##|bf16|\()", sources), name


def test_no_span_is_left_behind():
    """A kernel call that pays for a profiler that no longer runs."""
    profiles.profiled(lambda: None, types.SimpleNamespace(slots=list))
    plain = load.kernel("layer", "swiglu", torch.bfloat16, "ppii")
    assert plain is load.function("layer", "swiglu_bf16", "ppii")


def test_sweep_measures_the_context_that_it_names(make_decoder, parity):
    """Points of a shorter context under a longer one's name; a limit without the keys and values."""
    engine = parity.engine(make_decoder("bfloat16"), num_pages=64, page_tokens=16)
    sweep.fill_pages(engine)
    starts = []
    run = engine.runner.run
    engine.runner.run = lambda batch: (starts.append([work.start for work in batch.works]), run(batch))[1]
    point = sweep._point(engine, MACHINE, 2, 100, "context")
    assert starts == [[100 + step] * 2 for step in range(sweep.WARM_UP + sweep.STEPS)]
    assert point["tok_s"] == 2 / point["step_s"] and not engine.scheduler.live
    moved = (
        2 * LAYERS * (QKV + OUT + 3 * WIDE) + 2 * HEAD + 2 * (100 + 3 + 8 + 1) * kv_bytes(engine.runner.decoder.spec)
    )
    assert point["limit_tok_s"] == pytest.approx(2 * 25e9 / moved)
