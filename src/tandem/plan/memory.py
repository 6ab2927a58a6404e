"""How much memory a run takes: a plan by line, from shapes alone, before a weight is read.

A line is held in some phases of the run; the phase whose lines add up to most is the peak. tests/cpu/test_memory.py
holds a plan to within 10 % of what is then used. Where it does not fit, nothing is loaded, and the error says which
settings save most, each found by planning again with it.
On the host, a training run holds what only one side needs while that side works: pages while the engine generates,
gradients from the learner's first microbatch to its last update (kernels/large.py: release_memory). On a GPU all of it
is held: recorded graphs keep the addresses of pages, and what a tensor frees there stays this process's.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tandem import env
from tandem.corpus.lines import held_bytes
from tandem.errors import CapacityError
from tandem.models.parts import SIZES, expected_shapes, layer_slots
from tandem.plan.drafting import drafter_parts, for_pages, learning_parts
from tandem.plan.footprint import (
    ALL,
    CODES,
    HELDOUT_BYTES,
    LOADED,
    PROGRAM_BYTES,
    Asked,
    Phase,
    activation_bytes,
    adapter_counts,
    head_bytes,
    least_pool_bytes,
    microbatch_rows,
    num_pools,
    packed_bytes,
    page_bytes,
    projector_numbers,
    rollout_bytes,
    rounded_bytes,
    step_bytes,
    taught_bytes,
    teacher_bytes,
)
from tandem.rollout.config import AsyncConfig
from tandem.train.config import SHARD_BYTES, SLICE, Checkpointing

if TYPE_CHECKING:
    from tandem.run.config import RunConfig

LIBRARY_BYTES = 24 << 20  # compiled kernels, threads' stacks and what else is first touched after the plan: measured
ENGINE_BYTES = 400 << 20  # Python, torch and tokeniser of the engine's process, where it has one of its own
SHARED_WEIGHTS = 2  # times the weights: what sync/memory.py sets aside
CHILD_BYTES = 120 << 20  # a task's child: reasoning_gym's sums take 115 MiB
MARGIN = 0.9  # of what is available, for what the program may choose to fill
VALUE_BYTES = (
    16  # a critic's head, of a number of a hidden state in fp64 (16.5 measured); twice where it has a gradient
)
POOL_BYTES = 4 << 30  # most that the CPU's pool takes unasked
LEAST_POOL_BYTES = 256 << 20  # activations are kept only where this much is left for pages


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process ever held; a task's child process is not in it."""
    # ru_maxrss of a child begins at what its parent held when it was started.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def size(count_bytes: float) -> str:
    """
    >>> size(2_147_000_000), size(734_000_000)
    ('2.15 GB', '734 MB')
    """
    if count_bytes >= 1e12:
        return f"{count_bytes / 1e12:,.1f} TB"
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes >= 1e9 else f"{count_bytes / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True)
class Line:
    """One use of memory.

    >>> Line("gradients", 538_000_000, LOADED).place
    'host'
    """

    name: str
    size_bytes: int
    phases: tuple[Phase, ...] = ALL  # in which it is held
    place: Literal["host", "device"] = "host"
    mapped: bool = False  # of a file: seen as the process's memory, but the system takes it back where it is short
    own: bool = True  # of this process; else of a child


@dataclass(frozen=True, slots=True)
class Plan:
    """Lines of memory, what they may take, and what was chosen so that they fit."""

    lines: tuple[Line, ...]
    available_bytes: int  # on the host, beyond what the process holds already
    device_bytes: int  # free on the GPU; 0 where none is used
    base_bytes: int  # held by the process when the plan was made
    kv_memory_bytes: int  # of the engine's pages
    checkpointing: bool  # activations are computed again in the backward pass
    savings: tuple[tuple[str, int], ...] = ()  # settings with the bytes that each saves at the peak, largest first

    def held(self, phase: Phase, place: str = "host") -> list[Line]:
        """Lines of a phase, largest first."""
        found = (line for line in self.lines if phase in line.phases and line.place == place)
        return sorted(found, key=lambda line: -line.size_bytes)

    @property
    def place(self) -> Literal["host", "device"]:
        """Where the weights lie."""
        return "device" if self.device_bytes else "host"

    @property
    def free_bytes(self) -> int:
        """There, before anything is loaded."""
        return self.device_bytes or self.available_bytes

    def peak(self, place: str = "host") -> tuple[int, Phase]:
        """The most that this process is seen to hold at `place`, and when."""
        return self._most([line for line in self.lines if line.place == place and line.own])

    def needed(self, place: str = "host", phases: Sequence[Phase] = ALL) -> tuple[int, Phase]:
        """The most that must be free at `place` for all of it, children included, and when, of some phases."""
        most, phase = self._most([line for line in self.lines if line.place == place and not line.mapped], phases)
        return most - (self.base_bytes if place == "host" else 0), phase

    @staticmethod
    def _most(lines: Sequence[Line], phases: Sequence[Phase] = ALL) -> tuple[int, Phase]:
        totals = {phase: sum(line.size_bytes for line in lines if phase in line.phases) for phase in phases}
        return max((total, phase) for phase, total in totals.items())

    def short(self) -> str | None:
        """The place whose memory does not suffice."""
        if self.needed("device")[0] > self.device_bytes:
            return "device"
        return "host" if self.needed()[0] > self.available_bytes else None

    def check(self) -> None:
        """CapacityError, with the plan's lines and what to change, where it does not fit."""
        place = self.short()
        if place is not None:
            need, free = self.needed(place)[0], self.device_bytes if place == "device" else self.available_bytes
            where = "the GPU" if place == "device" else "this machine"
            raise CapacityError(
                f"this needs {size(need)} of memory and {where} has {size(free)} free; no weight was read. "
                + self.advice(place)
            )

    def advice(self, place: str = "host") -> str:
        """The lines of the peak, largest first, and the settings that save most."""
        phase = self.needed(place)[1]
        lines = ", ".join(f"{line.name} {size(line.size_bytes)}" for line in self.held(phase, place))
        text = f"Planned for {phase}: {lines}"
        saved = ", ".join(f"{setting} (saves {size(count)})" for setting, count in self.savings)
        return f"{text}. Set {saved}." if saved else f"{text}. Choose a smaller model or a larger machine."

    def record(self) -> dict[str, Any]:
        """For plan.json."""
        total, phase = self.peak(self.place)
        return {
            "peak_bytes": self.peak()[0],  # of this process, as peak_bytes() then finds it
            "peak": f"{size(total)}, in {phase}",
            "available": size(self.free_bytes),
            "lines": {line.name: size(line.size_bytes) for line in self.lines},
            "activation_checkpointing": self.checkpointing,
            "kv_memory_bytes": self.kv_memory_bytes,
        }

    def table(self) -> str:
        """For people: the peak's lines, largest first."""
        total, phase = self.peak(self.place)
        rows = [f"{size(total)} at the peak, in {phase}; {size(self.free_bytes)} free"]
        for line in self.held(phase, self.place):
            rows.append(f"{size(line.size_bytes):>9}  {line.name}{'' if line.own else ', beside this peak'}")
        how = "computed again" if self.checkpointing else "kept"
        return "\n".join([*rows, f"Activations are {how} for the backward pass."])

    @contextmanager
    def foreseen(self) -> Iterator[None]:
        """Memory that is refused inside becomes a CapacityError with the plan's lines and what to change."""
        try:
            yield
        except (MemoryError, OSError, RuntimeError) as error:
            text = f"{error}".lower()
            known = ("can't allocate memory", "cannot allocate memory", "out of memory")
            if not (isinstance(error, MemoryError) or any(part in text for part in known)):
                raise
            place = "device" if "cuda" in text else "host"
            raise CapacityError(
                f"memory ran out, with {size(peak_bytes())} held at most and {size(self.peak(place)[0])} planned. "
                + self.advice(place)
            ) from error


def check_counts(run: RunConfig) -> None:
    """CapacityError for counts that no machine of this size can hold, whatever the model: asked before torch is loaded.

    A plan, which knows the model, refuses what is less and yet too much.
    """
    available, rollout = env.memory_bytes()[1], run.rollout
    for name, count, others, each in (
        ("rollout.samples_per_prompt", rollout.samples_per_prompt, rollout.prompts_per_step, PROGRAM_BYTES),
        ("rollout.prompts_per_step", rollout.prompts_per_step, rollout.samples_per_prompt, PROGRAM_BYTES),
        ("rollout.extra_prompts", rollout.extra_prompts, rollout.samples_per_prompt, PROGRAM_BYTES),
        (
            "asynchrony.lag",
            run.asynchrony.most_lag,
            rollout.prompts_per_step * rollout.samples_per_prompt,
            PROGRAM_BYTES,
        ),
        ("evaluation.prompts", run.evaluation.prompts, run.evaluation.samples, PROGRAM_BYTES),
        ("task.heldout_size", run.task.heldout_size, 1, HELDOUT_BYTES),
    ):
        if count >= others and count * others * each > available:
            times = f", times {others}" if others > 1 else ""
            raise CapacityError(
                f"{name} is {count}{times}: it takes {size(count * others * each)} of memory at least and this machine "
                f"has {size(available)} free; no weight was read. "
                f"Set {name}={max(1, available // (2 * others * each))} or less."
            )


def plan_memory(asked: Asked, available_bytes: int, device_bytes: int = 0, base_bytes: int | None = None) -> Plan:
    """The plan of what is asked. `device_bytes`: free on the GPU, where model.device is one.

    Activations are kept, and pages get up to half of what is left (POOL_BYTES at most; MARGIN of it on a GPU), where
    the config leaves that open. CapacityError where engine.kv_memory_bytes cannot hold the config's requests.
    """
    _check_pool(asked)
    base = resident_bytes() if base_bytes is None else base_bytes
    plan = _fill(asked, available_bytes, device_bytes, base)
    place, savings = plan.short() or plan.place, []
    for setting, changed in _variants(_settled(asked, plan), plan):
        other = _fill(changed, available_bytes, device_bytes, base)
        saved = plan.needed(place)[0] - other.needed(place)[0]
        if saved > plan.needed(place)[0] // 100:
            savings.append((setting, saved))
    return replace(plan, savings=tuple(sorted(savings, key=lambda pair: -pair[1])[:4]))


def _settled(asked: Asked, plan: Plan) -> Asked:
    """What is asked, with what was left open as the plan has it."""
    run = asked.run
    if run is not None:
        how: Checkpointing = "on" if plan.checkpointing else "off"
        run = replace(run, learner=replace(run.learner, activation_checkpointing=how))
    return replace(asked, engine=replace(asked.engine, kv_memory_bytes=plan.kv_memory_bytes), run=run)


def _check_pool(asked: Asked) -> None:
    """CapacityError, with the figure to set, where engine.kv_memory_bytes is given and too small."""
    given, least, run = asked.engine.kv_memory_bytes, least_pool_bytes(asked), asked.run
    if not 0 < given < least:
        return
    why, wanted = f"one page of {asked.engine.page_tokens} tokens takes {least} bytes for this model", least
    if run is not None:
        why = (
            f"rollout.max_new_tokens {run.rollout.max_new_tokens} after a prompt, of {asked.prompt_tokens} tokens or "
            f"more, take {least} bytes at once"
        )
        groups = run.rollout.prompts_per_step + run.rollout.extra_prompts
        wanted *= min(groups * run.rollout.samples_per_prompt, asked.engine.max_sequences)
    raise CapacityError(
        f"engine.kv_memory_bytes is {given}, but {why}; no weight was read. Set engine.kv_memory_bytes={wanted}"
        f"{', where all rollouts of a step run at once' if wanted > least else ''}, or to 0 to leave it to the plan."
    )


def _fill(asked: Asked, available_bytes: int, device_bytes: int, base_bytes: int) -> Plan:
    """A plan with what the config leaves open chosen."""
    gpu = asked.model.device == "cuda"
    place: Literal["host", "device"] = "device" if gpu else "host"
    room = int(MARGIN * (device_bytes if gpu else available_bytes))
    page, layout = page_bytes(asked), asked.layout
    longest = layout.most_pages(asked.spec.max_position, asked.engine.batch_tokens, asked.engine.page_tokens)
    least, most = least_pool_bytes(asked), asked.engine.max_sequences * longest * page
    pool = asked.engine.kv_memory_bytes or min(most, LEAST_POOL_BYTES)
    wish = asked.run.learner.activation_checkpointing if asked.run is not None else "off"

    def plan(pool: int, checkpointing: bool) -> Plan:
        lines = list(_lines(asked, base_bytes, pool, checkpointing))
        if asked.learns_apart:  # this process has what it had, and no weights
            lines[1:] = [replace(line, own=False) for line in lines[1:]]
        return Plan(tuple(lines), available_bytes, device_bytes, base_bytes, pool, checkpointing)

    made = plan(pool, wish == "on")
    if wish == "auto" and made.needed(place)[0] > room:
        made = plan(pool, True)
    if asked.engine.kv_memory_bytes:
        return made
    left = for_pages(asked, room - made.needed(place, asked.page_phases)[0]) // num_pools(asked)
    pool += left if gpu or left < 0 else left // 2
    return plan(max(least, min(pool, most, most if gpu else POOL_BYTES)), made.checkpointing)


def _variants(asked: Asked, plan: Plan) -> Iterator[tuple[str, Asked]]:
    """Settings that take less, each with what is then asked."""
    engine, run, model = asked.engine, asked.run, asked.model
    pool = plan.kv_memory_bytes // 4
    if pool >= least_pool_bytes(asked):
        yield f"engine.kv_memory_bytes={pool}", replace(asked, engine=replace(engine, kv_memory_bytes=pool))
    if engine.replicas > 1 and run is not None:
        yield "engine.replicas=1", replace(asked, engine=replace(engine, replicas=1))
    if engine.batch_tokens >= 2 * engine.max_sequences:
        half = engine.batch_tokens // 2
        yield f"engine.batch_tokens={half}", replace(asked, engine=replace(engine, batch_tokens=half))
    if model.dtype == "float32":
        yield "model.dtype=bfloat16", replace(asked, model=replace(model, dtype="bfloat16"))
    if asked.rounded:
        same = replace(engine, weights="same", dtype="same")
        yield "engine.weights=same and engine.dtype=same", replace(asked, engine=same)
    if asked.lag:
        yield "sync.lag=0", replace(asked, lag=0)
    if asked.beside:
        yield "asynchrony.mode=sync", replace(asked, run=replace(run, asynchrony=AsyncConfig()))  # type: ignore[type-var]
    if run is None:
        return

    def learning(**changes: Any) -> Asked:
        return replace(asked, run=replace(run, learner=replace(run.learner, **changes)))

    fits, used, ahead = plan.available_bytes // 4, rollout_bytes(asked), run.asynchrony
    if ahead.mode == "full" and ahead.lag > 1 and used > fits:
        fewer = ahead.lag * fits // used
        yield f"asynchrony.lag={fewer}", replace(asked, run=replace(run, asynchrony=replace(ahead, lag=fewer)))
    for name in ("samples_per_prompt", "prompts_per_step", "max_new_tokens") if used > fits else ():
        fewer = max(2, getattr(run.rollout, name) * fits // used)
        rollout = replace(run.rollout, **{name: fewer})
        yield f"rollout.{name}={fewer}", replace(asked, run=replace(run, rollout=rollout))
    if run.learner.microbatch_tokens > 1:
        half = run.learner.microbatch_tokens // 2
        yield f"learner.microbatch_tokens={half}", learning(microbatch_tokens=half)
    if not plan.checkpointing:
        yield "learner.activation_checkpointing=on", learning(activation_checkpointing="on")
    away = "host" if model.device == "cuda" else "disk"
    if run.learner.optimiser_offload == "none" and not run.learner.keeps_less:
        yield f"learner.optimiser_offload={away}", learning(optimiser_offload=away)
    if asked.critic is not None:
        head = replace(run, critic=replace(run.critic, model="", model_lr=None))
        yield "critic.model= (a head on the policy)", replace(asked, critic=None, run=head)
    if run.needs_reference and run.objective == "policy_gradient":
        algo = replace(run.algo, kl="none", kl_weight=0.0, kl_in_reward=False)
        reward = " and algo.kl_in_reward=false" if run.algo.kl_in_reward else ""
        yield f"algo.kl=none and algo.kl_weight=0{reward}", replace(asked, run=replace(run, algo=algo))


def _lines(asked: Asked, base_bytes: int, pool_bytes: int, checkpointing: bool) -> Iterator[Line]:
    """What is held, and when."""
    spec, model, run = asked.spec, asked.model, asked.run
    place: Literal["host", "device"] = "device" if model.device == "cuda" else "host"
    sizes = [prod(shape) for shape in expected_shapes(spec).values()]
    count, largest = sum(sizes), max(sizes)
    compute, served = SIZES[model.dtype], SIZES[asked.dtype]

    yield Line("Python, torch and tokeniser", base_bytes + LIBRARY_BYTES)
    if run is not None and run.asks_task and run.task.environment != "jsonl":
        yield Line("the task's child", CHILD_BYTES, own=False)
    if asked.file_bytes:
        yield Line("file of the weights", asked.file_bytes, ("load",), mapped=not asked.addresses)
    else:
        yield Line("a tensor unpacked", 2 * 4 * largest, ("load",))
    whole, packed = count * compute, packed_bytes(spec, model)
    embedding = spec.vocab_size * spec.width * compute
    if asked.form == "codes":
        yield Line("weights as codes", asked.coded_bytes, LOADED, place=place)
        until = packed if place == "host" else whole - embedding
        yield Line("packed weights, until they are codes", until, ("load",), place=place)
    else:
        yield Line("packed weights", packed, place=place)
    if asked.form == "both":
        yield Line("weights", whole, place=place)
    else:
        yield Line("rows of the embedding", embedding, place=place)
    if asked.form == "packed":
        yield Line("weights, until they are packed", whole - embedding, ("load",))
    if (asked.frozen or place == "device") and asked.form != "both" and not spec.tied_embeddings:
        yield Line("values of the head", embedding, place=place)
    yield Line("rotary tables", 2 * 4 * spec.max_position * (spec.head_size // 2), place=place)
    formed = asked.engine.weights not in ("same", *CODES)
    own = packed_bytes(spec, replace(model, weights=asked.engine.weights) if formed else model, asked.dtype)
    each = asked.engine.replicas if asked.apart and run is not None else 1
    each += int(asked.learns_apart and asked.two_engines)
    if asked.engine.weights in CODES and asked.holds_codes:
        until = each * (own if place == "host" else count * served)
        yield Line("engine's packed weights, until they are codes", until, ("load",), place=place)
        yield Line("engine's own weights", each * rounded_bytes(asked), LOADED, place=place, own=not asked.apart)
    elif not asked.shares:
        yield Line("engine's own weights", each * (count * served + own), place=place, own=not asked.apart)
    if asked.rounded and (asked.lag or asked.apart):
        unrounded = each * (whole + (packed if asked.lag else 0))
        yield Line("weights before rounding", unrounded, place=place, own=not asked.apart)
    if asked.apart:
        yield Line("the engine's process", each * ENGINE_BYTES, own=False)
        if asked.learns_apart:
            yield Line("the learner's process", ENGINE_BYTES, own=False)
        shares = run is None or run.workers.transport == "memory"
        kept = ("weights in shared memory", SHARED_WEIGHTS * whole) if shares else ("weights last sent", whole)
        yield Line(*kept, LOADED)
    if asked.lag:
        yield Line("weights held back", (asked.lag + 1) * whole, LOADED, place)
    yield Line("pages of keys and values", pool_bytes * num_pools(asked), asked.page_phases, place, own=not asked.apart)
    when: tuple[Phase, ...] = LOADED if asked.beside else ("generate",)
    yield Line("a step's activations", each * step_bytes(asked), when, place, own=not asked.apart)
    yield from (Line(*one, place=place, own=not asked.apart) for one in drafter_parts(asked, pool_bytes, when))
    yield Line("weights compared", (count if asked.lag else largest) * compute, ("load", "publish"), place)
    if run is not None:
        yield from _learner_lines(asked, checkpointing, place)


def _optimiser_lines(asked: Asked, whose: str, count: int, place: Literal["host", "device"]) -> Iterator[Line]:
    """Of a model of `count` weights that learns."""
    assert asked.run is not None
    offload, each = asked.run.learner.optimiser_offload, asked.run.learner.state_bytes
    yield Line(f"{whose}gradients", 4 * count, ("learn", "update") if asked.takes_turns else LOADED, place)
    sliced = offload == "disk" and not asked.addresses
    yield Line(
        f"{whose}optimiser ({'weights in fp32, ' if asked.run.learner.masters == 'float32' else ''}two moments)",
        int(each * min(count, SLICE if sliced else count)),
        ("update",) if sliced else LOADED,
        "host" if offload == "host" else place,
        mapped=sliced,
    )


def _learner_lines(asked: Asked, checkpointing: bool, place: Literal["host", "device"]) -> Iterator[Line]:
    """What training adds."""
    spec, model, run = asked.spec, asked.model, asked.run
    assert run is not None
    count, compute = sum(map(prod, expected_shapes(spec).values())), SIZES[model.dtype]
    if asked.frozen:
        largest = compute * max(spec.ff_width, spec.width) * spec.width * 2  # gate and up
        count, ranks = adapter_counts(asked)
        yield Line("adapter", 3 * count * compute, place=place)
        yield Line("a matrix as its gradients read it", largest * (1 if asked.form == "both" else 2), ("learn",), place)
        yield Line("adapter's products of a microbatch", run.learner.microbatch_tokens * ranks * compute, ("learn",))
        if run.adapter.dora:
            yield Line("a matrix whose rows are measured", 4 * largest, ("load", "update"))
    if run.objective == "drafter":
        count, own = learning_parts(asked)
        yield from (Line(*one, place=place) for one in own)
    if run.learner.gradients == "int8":
        matrices = sum(slot.rows * slot.columns for slot in layer_slots(spec) if slot.columns is not None)
        yield Line("matrices as the backward pass multiplies them", matrices, place=place)
    elif run.learner.gradients != "same":
        widest = max(2 * spec.ff_width, spec.width)
        rounded = compute * widest * (spec.width + 2 * run.learner.microbatch_tokens)
        yield Line("what gradients are made of, turned and rounded", 2 * rounded, ("learn",), place)
    yield from _optimiser_lines(asked, "", count, place)
    if run.needs_reference and not asked.frozen:
        yield Line("reference model", count * compute + packed_bytes(spec, model), LOADED, place)
    yield Line("texts of a step" if run.corpus.on else "rollouts of a step", rollout_bytes(asked), LOADED)
    if run.corpus.on and (held := held_bytes(run.corpus)):
        yield Line("where the corpus's rows lie, and tables", held, LOADED)
    rows = microbatch_rows(asked)
    if asked.critic is not None:
        critic = sum(map(prod, expected_shapes(asked.critic).values()))
        yield Line("critic", critic * compute + packed_bytes(asked.critic, model), LOADED, place)
        yield from _optimiser_lines(asked, "critic's ", critic, place)
        kept = activation_bytes(asked.critic, rows, compute, checkpointing)
        yield Line("critic's activations of a microbatch", kept, ("learn",), place)
    if run.algo.needs_critic:
        each = VALUE_BYTES * (2 if asked.critic or run.critic.trunk_gradient else 1)
        yield Line("values of a microbatch", each * rows * (asked.critic or spec).width, ("learn",), place)
    if asked.teacher is not None:
        yield Line("teacher", teacher_bytes(asked), LOADED, place)
        yield Line("teacher's states of a microbatch, and logits of both", taught_bytes(asked), ("learn",), place)
        if projectors := projector_numbers(asked):
            yield Line("projectors", projectors * 2 * compute, LOADED, place)
            yield from _optimiser_lines(asked, "projectors' ", projectors, place)
    kept = activation_bytes(spec, rows, compute, checkpointing)
    yield Line("activations of a microbatch", kept, ("learn",), place)
    yield Line("head of a microbatch", head_bytes(spec, rows, compute, place), ("learn",), place)
    yield Line("a checkpoint's shard", min(SHARD_BYTES, 12 * count), ("save",), mapped=True)
    if place == "device":
        yield Line("weights on their way to and from the GPU", (4 + compute) * min(count, SLICE), ("update",))
        yield Line("weights on their way to a checkpoint", count * compute, ("save",))
