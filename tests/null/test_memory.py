"""A plan's figures by hand, what it chooses, and what it says where memory is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.algo.config import AlgoConfig
from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.errors import CapacityError
from tandem.models.config import ModelConfig
from tandem.models.spec import ModelSpec
from tandem.plan import footprint, memory
from tandem.plan.footprint import PROGRAM_BYTES, PROMPT_BYTES, SAMPLED_BYTES, Asked
from tandem.plan.memory import LIBRARY_BYTES, Plan, check_counts, plan_memory
from tandem.program.config import TaskConfig
from tandem.run.config import RunConfig
from tandem.train.config import LearnerConfig

SPEC = ModelSpec(
    "llama", 96, 32, 64, layers=2, heads=4, kv_heads=2, head_size=16, tied_embeddings=True, max_position=256
)
MODEL = ModelConfig("somewhere")
# Embedding 96 x 32; layer: norms 2 x 32, q 64 x 32, k and v 32 x 32, out 32 x 64, gate and up 64 x 32, down 32 x 64.
COUNT = 96 * 32 + 2 * (2 * 32 + 64 * 32 + 2 * 32 * 32 + 32 * 64 + 2 * 64 * 32 + 32 * 64) + 32
# In panels of 64 rows: embedding 128 x 32; layer: q, k and v 128 x 32, out 64 x 64, gate and up 128 x 32, down 64 x 64.
PACKED = 128 * 32 + 2 * (128 * 32 + 64 * 64 + 128 * 32 + 64 * 64)
TOKEN = 2 * 2 * 2 * 16 * 2  # key and value, layers, heads, size, bytes
PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "lacking", lambda: "")


def asked(run: bool = True, engine: EngineConfig | None = None, algo: AlgoConfig | None = None, **learner) -> Asked:
    engine = engine or EngineConfig(kv_memory_bytes=1 << 20)
    config = RunConfig(
        "sums",
        1,
        MODEL,
        engine=engine,
        algo=algo or AlgoConfig(),
        task=TaskConfig("jsonl", path="sums.jsonl"),
        learner=LearnerConfig(**learner),
    )
    return Asked(SPEC, MODEL, engine, 0, config if run else None)


def sizes(plan: Plan) -> dict[str, int]:
    return {line.name: line.size_bytes for line in plan.lines}


def test_figures_by_hand() -> None:
    """A dtype's size, a moment, the fused matrices' padding or the tied head forgotten."""
    found = sizes(plan_memory(asked(), PLENTY, base_bytes=1000))
    assert found["Python, torch and tokeniser"] == 1000 + LIBRARY_BYTES
    assert found["weights"] == 2 * COUNT and found["packed weights"] == 2 * PACKED
    assert found["gradients"] == 4 * COUNT
    assert found["optimiser (weights in fp32, two moments)"] == 12 * COUNT
    assert found["pages of keys and values"] == 1 << 20
    assert found["rotary tables"] == 2 * 256 * 8 * 4
    assert "the task's child" not in found and "engine's own weights" not in found


def test_each_engine_that_samples_has_pages() -> None:
    """Pages of the second engine left out, or planned where nothing is trained; a way to save that is not told."""
    two = EngineConfig(kv_memory_bytes=1 << 20, replicas=2)
    plan = plan_memory(asked(engine=two), PLENTY, base_bytes=0)
    assert sizes(plan)["pages of keys and values"] == 2 << 20
    ahead = replace(asked(engine=two), lag=1, model=replace(MODEL, device="cuda"))
    assert sizes(plan_memory(ahead, PLENTY, PLENTY, base_bytes=0))["pages of keys and values"] == 3 << 20
    assert sizes(plan_memory(asked(run=False, engine=two), PLENTY, base_bytes=0))["pages of keys and values"] == 1 << 20
    assert ("engine.replicas=1", 1 << 20) in plan_memory(asked(engine=two), 1000, base_bytes=0).savings


def test_what_lives_in_other_processes() -> None:
    """Weights of the second engine left out, what the learner's process holds planned as this one's, or memory that is
    shared where nothing is."""

    def placed(**changes: str) -> Asked:
        plain = asked(engine=EngineConfig(kv_memory_bytes=1 << 20, replicas=2))
        run = override(plain.run, {"workers.backend": "local", **{f"workers.{name}": v for name, v in changes.items()}})
        return replace(plain, run=run, apart=True)

    plan = plan_memory(placed(), PLENTY, base_bytes=1000)
    assert sizes(plan)["engine's own weights"] == 2 * (2 * COUNT + 2 * PACKED)
    assert sizes(plan)["weights in shared memory"] == 2 * 2 * COUNT
    assert {line.name for line in plan.lines if not line.own} == {
        "engine's own weights",
        "the engine's process",
        "pages of keys and values",
        "a step's activations",
    }
    sent = sizes(plan_memory(placed(transport="broadcast"), PLENTY, base_bytes=1000))
    assert "weights in shared memory" not in sent and sent["weights last sent"] == 2 * COUNT
    both = plan_memory(placed(learner="apart"), PLENTY, base_bytes=1000)
    assert both.peak()[0] == 1000 + LIBRARY_BYTES and both.needed()[0] > plan.needed()[0]
    rounded = replace(placed(learner="apart"), engine=EngineConfig(kv_memory_bytes=1 << 20, dtype="float32"))
    assert sizes(plan_memory(rounded, PLENTY, base_bytes=0))["engine's own weights"] == 2 * (4 * COUNT + 4 * PACKED)


def test_what_departs_has_weights_of_its_own() -> None:
    """Stale or rounded weights are whole decoders, and what waits to be served is kept: none of it is in the plan."""
    plain = asked()
    stale = sizes(plan_memory(replace(plain, lag=3), PLENTY, base_bytes=0))
    assert stale["engine's own weights"] == 2 * COUNT + 2 * PACKED
    assert stale["weights held back"] == 4 * 2 * COUNT
    assert stale["pages of keys and values"] == 1 << 20  # evaluation's own engine takes turns with the other one
    there = replace(plain, lag=3, model=replace(MODEL, device="cuda"))
    assert sizes(plan_memory(there, PLENTY, PLENTY, base_bytes=0))["pages of keys and values"] == 2 << 20
    wide = replace(plain, lag=1, engine=replace(plain.engine, dtype="float32"))
    both = sizes(plan_memory(wide, PLENTY, base_bytes=0))
    assert both["engine's own weights"] == 4 * COUNT + 4 * PACKED
    assert both["weights before rounding"] == 2 * COUNT + 2 * PACKED
    scored = asked(algo=AlgoConfig(kl="k3", kl_weight=0.1))
    assert sizes(plan_memory(scored, PLENTY, base_bytes=0))["reference model"] == 2 * COUNT + 2 * PACKED


def test_what_only_serves_has_one_form() -> None:
    """Matrices of a decoder that nobody trains are planned twice, or those of one that is rounded or trained once."""
    alone = replace(asked(run=False), serves=True)
    lines = {line.name: line for line in plan_memory(alone, PLENTY, base_bytes=0).lines}
    rows, rest = lines["rows of the embedding"], lines["weights, until they are packed"]
    assert rows.size_bytes == 2 * 96 * 32 and rest.size_bytes == 2 * COUNT - rows.size_bytes
    assert rest.phases == ("load",) and "generate" in rows.phases and lines["packed weights"].size_bytes == 2 * PACKED
    library = replace(alone, model=replace(MODEL, kernels="library"))
    for other in (library, replace(alone, engine=EngineConfig(dtype="float32")), replace(alone, serves=False)):
        assert sizes(plan_memory(other, PLENTY, base_bytes=0))["weights"] == 2 * COUNT


def test_a_critic_is_planned() -> None:
    """A critic's optimiser is held where the run keeps its own on disk, its values are free, or it is never let go."""
    config = RunConfig(
        "sums", 1, MODEL, algo=AlgoConfig(advantage="gae"), task=TaskConfig("jsonl", path="x"), learner=LearnerConfig()
    )
    head = replace(asked(), run=config)
    alone, found = (sizes(plan_memory(a, PLENTY, base_bytes=0)) for a in (head, replace(head, critic=SPEC)))
    assert alone["values of a microbatch"] == 16 * 1024 * 32 and found["values of a microbatch"] == 32 * 1024 * 32
    assert {name for name in found if "critic" in name} == {
        "critic", "critic's gradients", "critic's optimiser (weights in fp32, two moments)",
        "critic's activations of a microbatch",
    }  # fmt: skip
    assert found["critic"] == 2 * COUNT + 2 * PACKED and found["critic's gradients"] == found["gradients"]
    assert found["critic's optimiser (weights in fp32, two moments)"] == 12 * COUNT
    away = replace(config, learner=LearnerConfig(optimiser_offload="disk"))
    plan = plan_memory(replace(head, run=away, critic=SPEC), PLENTY, base_bytes=0)
    held = {line.name: (line.phases, line.mapped) for line in plan.lines if "optimiser" in line.name}
    assert len(held) == 2 and set(held.values()) == {(("update",), True)}
    assert "critic.model= (a head on the policy)" in dict(plan.savings)
    assert "critic's gradients" not in {line.name for line in plan.lines if "generate" in line.phases}


def test_activations_are_kept_while_they_fit() -> None:
    """A run pays for recomputing with memory to spare, or is refused though recomputing would fit."""
    wide = asked(microbatch_tokens=100_000)
    assert not plan_memory(wide, PLENTY, base_bytes=0).checkpointing
    kept = plan_memory(wide, PLENTY, base_bytes=0).needed()[0]
    again = plan_memory(asked(microbatch_tokens=100_000, activation_checkpointing="on"), PLENTY, base_bytes=0).needed()[
        0
    ]
    assert again < kept
    assert plan_memory(wide, kept, base_bytes=0).checkpointing  # it would fit, with nothing to spare
    assert plan_memory(wide, again + 1, base_bytes=0).short() is None
    refused = asked(microbatch_tokens=100_000, activation_checkpointing="off")
    short = plan_memory(refused, again + 1, base_bytes=0)
    assert short.short() == "host" and short.savings[0][0] == "learner.microbatch_tokens=50000"
    assert "learner.activation_checkpointing=on" in dict(short.savings)


def test_a_refusal_names_the_lines_and_what_saves_most() -> None:
    """Out of memory is found by the system's killer, or the advice is a setting that saves nothing."""
    plan = plan_memory(
        asked(algo=AlgoConfig(kl="k3", kl_weight=0.1), microbatch_tokens=8192), 3 << 20, base_bytes=50 << 20
    )
    with pytest.raises(CapacityError, match=r"of memory and this machine has 3 MB free; no weight was read") as caught:
        plan.check()
    text = str(caught.value)
    assert "head of a microbatch" in text and "Set learner.microbatch_tokens=4096 (saves" in text
    saved = [count for _, count in plan.savings]
    assert saved == sorted(saved, reverse=True) and min(saved) > 0
    assert "50 MB" not in text.split("free")[0]  # what is held already need not be free
    plan_memory(asked(), plan_memory(asked(), PLENTY, base_bytes=0).needed()[0], base_bytes=0).check()


def test_the_pool_takes_of_what_is_left() -> None:
    """Pages beyond what sequences can fill, beyond the machine, or too few for a model that would fit."""
    page = 16 * TOKEN
    few = EngineConfig(max_sequences=2, batch_tokens=64)
    assert plan_memory(asked(engine=few), PLENTY, base_bytes=0).kv_memory_bytes == 2 * 256 * TOKEN
    many = EngineConfig(max_sequences=1_000_000, batch_tokens=1_000_000)
    alone = Asked(SPEC, MODEL, many)
    assert plan_memory(alone, PLENTY, base_bytes=0).kv_memory_bytes == memory.POOL_BYTES
    least = plan_memory(alone, 0, base_bytes=0)
    assert least.kv_memory_bytes == page and least.short() == "host"
    needed = least.needed()[0]
    tight = plan_memory(alone, int(needed / memory.MARGIN) + (100 << 20), base_bytes=0)
    assert tight.short() is None and 60 << 20 < tight.kv_memory_bytes < 100 << 20


def test_a_mapped_file_needs_no_room() -> None:
    """A model is refused for the size of its file, whose pages the system takes back, or the peak misses them."""
    plan = plan_memory(replace(asked(run=False), file_bytes=1 << 30), PLENTY, base_bytes=0)
    assert plan.peak()[1] == "load" and plan.peak()[0] > 1 << 30 > plan.needed()[0]
    away = plan_memory(asked(optimiser_offload="disk"), PLENTY, base_bytes=0)
    assert away.needed()[0] < plan_memory(asked(), PLENTY, base_bytes=0).needed()[0]


@given(
    available=st.integers(0, 1 << 32),
    microbatch=st.sampled_from([1, 512, 8192, 100_000]),
    pool=st.sampled_from([0, 1 << 20, 1 << 30]),
    lag=st.integers(0, 2),
    dtype=st.sampled_from(["same", "float32"]),
    offload=st.sampled_from(["none", "disk"]),
)
def test_a_plan_chooses_what_fits_if_anything_does(available, microbatch, pool, lag, dtype, offload) -> None:
    """What is left open is chosen so that it does not fit, where another choice would."""
    given_ = asked(
        engine=EngineConfig(kv_memory_bytes=pool, dtype=dtype), microbatch_tokens=microbatch, optimiser_offload=offload
    )
    LEAST = 4 * 16 * TOKEN * (2 if dtype == "float32" else 1)  # 64 tokens, of which the last is never run, and a prompt
    plan = plan_memory(replace(given_, lag=lag), available, base_bytes=7)
    smallest = asked(
        engine=EngineConfig(kv_memory_bytes=pool or LEAST, dtype=dtype),
        microbatch_tokens=microbatch,
        optimiser_offload=offload,
        activation_checkpointing="on",
    )
    fits = plan_memory(replace(smallest, lag=lag), available, base_bytes=7).short() is None
    assert (plan.short() is None) == fits
    assert plan.needed()[0] <= plan.peak()[0]


HUGE = 10**8
COUNTS = [
    ("rollout.samples_per_prompt", HUGE, f"rollout.samples_per_prompt is {HUGE}, times 16: it takes 3.3 TB"),
    ("rollout.prompts_per_step", HUGE, f"rollout.prompts_per_step is {HUGE}, times 8: it takes 1.6 TB"),
    ("asynchrony.lag", HUGE, f"asynchrony.lag is {HUGE}, times 128: it takes 26.2 TB"),
    ("task.heldout_size", 10**9, "task.heldout_size is 1000000000: it takes 4.1 TB"),
    ("evaluation.prompts", 10**8, "evaluation.prompts is 100000000: it takes 204.80 GB"),
]


@pytest.mark.parametrize(("name", "value", "says"), COUNTS)
def test_counts_that_no_machine_holds(monkeypatch: pytest.MonkeyPatch, name: str, value: int, says: str) -> None:
    """A number with some zeros too many fills the machine until the system ends the process."""
    run = asked().run
    assert run is not None
    config = {name: str(value)} | ({"task.heldout_size": str(value)} if name.startswith("eval") else {})
    config |= {"asynchrony.mode": "full"} if name.startswith("async") else {}
    monkeypatch.setattr(memory.env, "memory_bytes", lambda: (32 << 30, 32 << 30))
    if name.startswith("eval"):
        monkeypatch.setattr(memory, "HELDOUT_BYTES", 1)
    changed = override(run, config)
    with pytest.raises(CapacityError, match=f"{says} of memory at least.*no weight was read. Set {name}=") as caught:
        check_counts(changed)
    advised = str(caught.value).split("Set ")[1].split(" or less")[0]
    check_counts(override(changed, dict([advised.split("=")])))
    check_counts(run)


@pytest.mark.parametrize("name", ["samples_per_prompt", "prompts_per_step", "max_new_tokens"])
def test_rollouts_are_planned(name: str) -> None:
    """Trajectories have no line, so that long ones fill a machine said to suffice; or the advice does not fit."""
    plain = sizes(plan_memory(asked(), PLENTY, base_bytes=0))
    assert plain["rollouts of a step"] == 16 * 8 * (PROGRAM_BYTES + PROMPT_BYTES + SAMPLED_BYTES * 64)
    long = replace(asked(), run=override(asked().run, {"rollout.max_new_tokens": "9999", "rollout.max_turns": "99"}))
    bounded = sizes(plan_memory(long, PLENTY, base_bytes=0))["rollouts of a step"]
    assert bounded == 16 * 8 * (PROGRAM_BYTES + PROMPT_BYTES + SAMPLED_BYTES * 255)  # the model's positions
    ahead = {
        "asynchrony.mode": "full",
        "asynchrony.lag": "2",
        "asynchrony.replay_uses": "2",
        "asynchrony.replay_lag": "3",
    }
    held = sizes(plan_memory(replace(asked(), run=override(asked().run, ahead)), PLENTY, base_bytes=0))
    assert held["rollouts of a step"] == (3 + 4) * plain["rollouts of a step"]
    many = replace(asked(), run=override(asked().run, {"rollout.samples_per_prompt": "11000"}))
    plan = plan_memory(many, 1 << 30, base_bytes=0)
    with pytest.raises(CapacityError, match=r"rollouts of a step 1.63 GB"):
        plan.check()
    settings = dict(setting.split("=") for setting, _ in plan.savings if f".{name}=" in setting)
    fewer = replace(many, run=override(many.run, settings))
    assert settings and plan_memory(fewer, 1 << 30, base_bytes=0).short() is None


def test_on_a_gpu_the_weights_are_there() -> None:
    """The GPU's memory is counted against the machine's, or state kept on the host against the GPU's."""
    cuda = replace(MODEL, device="cuda")
    here = replace(asked(), model=cuda)
    plan = plan_memory(here, PLENTY, device_bytes=PLENTY, base_bytes=0)
    assert {line.place for line in plan.lines if line.name in ("weights", "gradients")} == {"device"}
    assert sizes(plan)["packed weights"] == 0
    away = replace(here, run=replace(here.run, learner=LearnerConfig(optimiser_offload="host")))  # type: ignore[type-var]
    moved = plan_memory(away, PLENTY, device_bytes=PLENTY, base_bytes=0)
    assert plan.needed("device")[0] - moved.needed("device")[0] == 12 * COUNT
    short = plan_memory(here, PLENTY, device_bytes=1 << 20, base_bytes=0)
    assert short.short() == "device"
    with pytest.raises(CapacityError, match="the GPU has 1 MB free"):
        short.check()


def test_engine_and_learner_take_turns() -> None:
    """What one side needs is held while the other works, or planned as given back where nothing is."""
    pool = 1 << 30

    def held(phase: str, **changes) -> int:
        run = asked(engine=EngineConfig(kv_memory_bytes=pool))
        lines = plan_memory(replace(run, **changes), PLENTY, PLENTY, base_bytes=0).lines
        found = {line.name: line for line in lines if phase in line.phases}
        return sum(found[name].size_bytes for name in ("gradients", "pages of keys and values") if name in found)

    assert held("generate") == pool and held("learn") == held("update") == 4 * COUNT
    assert held("publish") == held("save") == 0
    for changes in ({"model": replace(MODEL, device="cuda")}, {"addresses": True}):
        assert held("generate", **changes) == held("learn", **changes) == held("save", **changes) == pool + 4 * COUNT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint.sys, "platform", "darwin")
        assert held("learn") == pool + 4 * COUNT
    auto = asked(engine=EngineConfig(), microbatch_tokens=100_000, activation_checkpointing="on")
    least = plan_memory(auto, 0, base_bytes=0).needed()[0]  # in "learn": pages take of what the engine's phase leaves
    plan = plan_memory(auto, least, base_bytes=0)
    assert plan.short() is None and plan.kv_memory_bytes > 10 << 20


def test_limited_addresses_count_what_is_mapped() -> None:
    """Advice to move the optimiser to a mapped file, which takes as many addresses and is refused as well."""
    limited = replace(asked(), addresses=True, file_bytes=1 << 30)
    plan = plan_memory(limited, 1 << 20, base_bytes=0)
    assert plan.needed()[0] > 1 << 30 and not [line for line in plan.lines if line.mapped and "weights" in line.name]
    plan = plan_memory(replace(limited, file_bytes=0), 1 << 20, base_bytes=0)
    assert plan.short() and not any("optimiser_offload" in setting for setting, _ in plan.savings)
    assert any("optimiser_offload" in setting for setting, _ in plan_memory(asked(), 1 << 20, base_bytes=0).savings)


@pytest.mark.parametrize(
    ("changes", "lag", "times"),
    [({}, 0, 1), ({"dtype": "float32"}, 0, 2), ({}, 1, 1), ({"kv_dtype": "float8_e4m3"}, 0, 1)],
    ids=["plain", "wide", "stale", "narrow"],  # evaluation's own engine keeps whole keys and values
)
def test_a_pool_too_small_for_a_request_is_refused(changes, lag, times) -> None:
    """Pages for none, or for less than one request: the run fails after the weights were loaded."""
    run = replace(asked().run, task=TaskConfig("reasoning_gym", name="chain_sum"))  # type: ignore[type-var]
    tokens = 100 + 64 - 1
    least = -(-tokens // 16) * 16 * TOKEN * times

    def planned(pool: int) -> Plan:
        engine = EngineConfig(kv_memory_bytes=pool, **changes)
        return plan_memory(Asked(SPEC, MODEL, engine, lag, run, prompt_tokens=100), PLENTY, base_bytes=0)

    with pytest.raises(CapacityError, match=rf"is {least - 1}, but .* take {least} bytes.*bytes={128 * least}, where"):
        planned(least - 1)
    assert planned(least).kv_memory_bytes == least and planned(0).kv_memory_bytes > least
    with pytest.raises(CapacityError, match=rf"is 1, but one page of 16 tokens takes {16 * TOKEN} bytes"):
        plan_memory(Asked(SPEC, MODEL, EngineConfig(kv_memory_bytes=1)), PLENTY, base_bytes=0)
    tight = plan_memory(Asked(SPEC, MODEL, EngineConfig(**changes), lag, run, prompt_tokens=100), 0, base_bytes=0)
    assert tight.kv_memory_bytes == least and tight.short() == "host"  # chosen, it is as much as a request needs
    assert not any("kv_memory_bytes" in setting for setting, _ in tight.savings)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_explained(error: Exception) -> None:
    """A traceback of the allocator, without a word on what to change."""
    for free in (3 << 20, PLENTY):  # it may fit on paper alone
        plan = plan_memory(asked(microbatch_tokens=8192), free, base_bytes=0)
        with (
            pytest.raises(CapacityError, match=r"memory ran out, .* planned\. Planned for .*Set learner\."),
            plan.foreseen(),
        ):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), plan.foreseen():
        raise RuntimeError("shapes differ")


def test_the_table_adds_up_to_its_peak() -> None:
    """A line of another process among those of the peak, which then add up to more than their sum."""
    task = TaskConfig("sums.py:Sums")
    beside = replace(asked(), run=replace(asked().run, task=task))
    plan = plan_memory(beside, PLENTY, base_bytes=10**9)
    head, *lines, _ = plan.table().splitlines()
    named = [line.split(maxsplit=2) for line in lines]
    assert [line for line in lines if "beside this peak" in line] == ["   126 MB  the task's child, beside this peak"]
    unit = {"MB": 1e6, "GB": 1e9}
    total = sum(float(number) * unit[kind] for number, kind, name in named if "beside" not in name)
    assert total == pytest.approx(plan.peak()[0], rel=0.01) and head.startswith(f"{memory.size(plan.peak()[0])} at the")
