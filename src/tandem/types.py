"""The nouns: one frozen class per arrow of the loop.

    prompt -> program -> request -> tokens -> trajectory -> batch -> loss -> weights -> engine

A noun holds plain values, and values of tokens as Columns; tensors are made where they are used, by the named function
that crosses into them. Shape letters are the product's: see docs/map.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from tandem.columns import Array, Columns


class StopReason(str, Enum):
    """Why a generation ended."""

    STOP_TOKEN = "stop_token"  # one of Sampling.stop_token_ids; the token is the last one kept
    STOP_STRING = "stop_string"  # one of Sampling.stop_strings appeared in the decoded text
    LENGTH = "length"  # Sampling.max_new_tokens reached
    ABORTED = "aborted"  # the caller withdrew the request
    FAILED = "failed"  # no token could be drawn; Completion.failure says why


@dataclass(frozen=True, slots=True)
class Reach:
    """Which positions up to its own a layer's query sees. At most one of window and chunk; neither: all of them.

    >>> Reach(window=4).first_seen(9), Reach(chunk=4).first_seen(9), Reach().first_seen(9)
    (6, 8, 0)
    """

    window: int | None = None  # tokens: itself and the window - 1 before it
    chunk: int | None = None  # tokens: those of its own run of `chunk` positions, counted from position 0

    def first_seen(self, position: int) -> int:
        """The first position that a query at `position` sees. Never decreases with `position`."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return 0 if self.chunk is None else position // self.chunk * self.chunk


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that a message calls.

    >>> ToolCall("add", {"a": 1, "b": 2}).name
    'add'
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""  # that the answer names


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message.

    >>> Message("user", "What is 1 + 2?").row()
    {'role': 'user', 'content': 'What is 1 + 2?'}
    """

    role: str  # "system", "user", "assistant" or "tool"; "developer", where a template knows one
    content: str
    calls: tuple[ToolCall, ...] = ()  # of tools, by an assistant
    call_id: str = ""  # of the call that a tool's message answers
    more: Mapping[str, Any] = field(default_factory=dict)  # further keys for the chat template: name, reasoning_content
    faults: tuple[str, ...] = ()  # why calls that an assistant meant to make cannot be read; never rendered
    sampled: bool = False  # a turn of the program's model: an "assistant" that a task quotes is none; never rendered

    def row(self) -> dict[str, Any]:
        """As chat templates and files have it; keys without a value are left out."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            row["tool_calls"] = [
                ({"id": call.id} if call.id else {})
                | {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.calls
            ]
        if self.call_id:
            row["tool_call_id"] = self.call_id
        return row | dict(self.more)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a task asks.

    >>> Prompt("sum-0", (Message("user", "What is 1 + 2?"),), {"answer": "3"}).record["answer"]
    '3'
    """

    id: str  # unique within a task
    messages: tuple[Message, ...]  # rendered by the model's chat template
    record: Mapping[str, Any] = field(default_factory=dict)  # the task's own fields, for grading
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of functions that may be called, for the chat template
    constraint: Constraint | None = None  # of the first turn; a Step names that of the turn behind it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The behaviour policy is the distribution after all of these.

    >>> Sampling(temperature=0.0).greedy
    True
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose mass reaches top_p
    min_p: float = 0.0  # keep tokens with p >= min_p * max p
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a generated text has to be, as engine/constraint.py reads it.

    >>> Constraint("regex", "[0-9]+").kind
    'regex'
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""  # the schema, the expression, a JSON list of texts, a grammar; json_object has none


@dataclass(frozen=True, slots=True)
class Hints:
    """What whoever asks knows of what follows a request. Guesses get better by it; no token depends on it.

    >>> Hints(tools=("bash",), turns_left=3).tool_s is None
    True
    """

    tools: tuple[str, ...] = ()  # that may run behind it
    turns_left: int | None = None  # requests of its program behind it; 0: it is the last
    tool_s: float | None = None  # what the tools will take
    arguments: str = ""  # a hash of what the tools before it were called with: a record has it (engine/record.py)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation asked of an engine.

    >>> Request("sum-0/3/0", "sum-0/3", (1, 2, 3), Sampling(), seed=7).tokens
    (1, 2, 3)
    """

    id: str  # unique among the engine's live requests
    program_id: str  # whose turn this is
    tokens: tuple[int, ...]  # T: the whole context, prompt and earlier turns, token for token
    sampling: Sampling
    seed: int  # 64 bits; with the absolute position and token id it fixes the noise
    tenant: str = ""  # finds no prefix of another's in the cache, and so learns nothing of it by time
    priority: int = 0  # the higher starts first
    adapter: str = ""  # by the name that its engine serves it under; "": the weights themselves
    group: str = ""  # siblings, whose lengths tell each other's; "" has none
    carried: int = 0  # of its last tokens: drawn by an earlier request, which this one goes on with
    ran: int = 0  # of its tokens, the first so many: that earlier requests of its program had run
    constraint: Constraint | None = None  # of what is generated, the carried tokens too
    hints: Hints | None = None
    likely: int = 0  # so many of the most likely tokens are told beside each that is drawn (`likely_tokens`)
    scored: bool = False  # and log-probs of its own tokens; all of it is run then, and nobody finds it in the cache


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """Which weights: the update count and what they hash to.

    >>> WeightVersion(3, "9f2c").step
    3
    """

    step: int  # optimiser updates applied
    digest: str  # hexadecimal content hash of the published tensors
    adapter: str = ""  # name of a LoRA adapter on top, or empty


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for a request.

    >>> c = Completion("r", Columns.of(tokens=(5, 2), logprobs=(-0.1, -0.7), versions=(0, 0)), StopReason.STOP_TOKEN)
    >>> c.tokens, c.logprobs
    ((5, 2), (-0.1, -0.7))
    """

    request_id: str
    columns: Columns  # N generated tokens, the stop token included: tokens, logprobs, versions; kept sets under filters
    stop_reason: StopReason
    submitted_s: float = 0.0  # engine clock
    started_s: float = 0.0  # first time any of its tokens ran
    finished_s: float = 0.0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    recomputed_tokens: int = 0  # tokens run again after a preemption
    failure: str = ""  # why, where FAILED
    first_s: float = 0.0  # its first token was drawn; its end where none was
    prompt: Columns | None = (
        None  # of a scored request: its tokens, the model's own logprobs (the first has NaN), likely
    )

    @property
    def tokens(self) -> tuple[int, ...]:
        """The generated ids as plain values."""
        return tuple(self.columns["tokens"].tolist())

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Nats, of the distribution really sampled from, as plain values."""
        return tuple(self.columns["logprobs"].tolist())


def likely_of(ids: np.ndarray, logprobs: np.ndarray) -> bytes:
    """The most likely tokens of a place, the likeliest first, and their log-probs in fp32, as `likely_tokens` reads."""
    return ids.astype(np.uint32).tobytes() + logprobs.astype(np.float32).tobytes()


def likely_tokens(likely: bytes) -> list[tuple[int, float]]:
    """Ids and log-probs (nats), the likeliest first.

    >>> likely_tokens(likely_of(np.array([5, 2]), np.array([-0.5, -1.0])))
    [(5, -0.5), (2, -1.0)]
    """
    half = len(likely) // 2
    ids, logprobs = np.frombuffer(likely[:half], np.uint32), np.frombuffer(likely[half:], np.float32)
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))


def kept_ids(kept: bytes) -> memoryview:
    """The token ids that a sampler chose among: unsigned 32-bit, ascending, in the machine's byte order.

    >>> from array import array
    >>> list(kept_ids(array("I", [3, 5, 80]).tobytes()))
    [3, 5, 80]
    """
    if not is_mask(kept):
        return memoryview(kept).cast("I")
    bits_V = np.unpackbits(np.frombuffer(kept, np.uint8, len(kept) - 1), bitorder="little")
    return memoryview(np.flatnonzero(bits_V).astype(np.uint32).tobytes()).cast("I")


def is_mask(kept: bytes) -> bool:
    """Whether a kept set is a bit a token of the vocabulary, in words of 32 from the lowest on, and a byte behind.

    >>> is_mask(bytes([5, 0, 0, 0, 1])), list(kept_ids(bytes([5, 0, 0, 0, 1])))
    (True, [0, 2])
    """
    return len(kept) % 4 == 1


def kept_of(words_W: Array) -> bytes:
    """The set of a mask, as ids or as the mask, whichever is shorter: at most a bit a token, where ids take 32.

    >>> kept_of(np.array([5, 0], np.uint32)) == np.array([0, 2], np.uint32).tobytes()
    True
    """
    if int(np.bitwise_count(words_W).sum()) > len(words_W):
        return words_W.tobytes() + b"\1"
    return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).astype(np.uint32).tobytes()


@dataclass(frozen=True, slots=True)
class Turn:
    """A completion and the observation that followed it.

    >>> Turn(Completion("r", Columns.of(tokens=(5,)), StopReason.LENGTH), observation_tokens=(9, 9)).observation_tokens
    (9, 9)
    """

    completion: Completion
    observation_tokens: tuple[int, ...] = ()  # appended verbatim; never trained on
    reward: float = 0.0  # that its environment gave for it (Step)
    state: str = ""  # that it was taken in, by its environment


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trajectory cannot be trained on.

    >>> Failure("reward", "returned nan").where
    'reward'
    """

    where: str  # "environment", "reward", "deadline", "engine", "prompt"
    reason: str  # one line for the user


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Turns flattened exactly as sampled: a program's, or those of one segment where its context started anew.

    >>> seen = Columns.of(tokens=(1, 2, 7), loss_mask=(False, False, True), logprobs=(0.0, 0.0, -0.3))
    >>> Trajectory("p/0", "p", seen, reward=1.0).num_sampled
    1
    """

    program_id: str
    prompt_id: str
    columns: Columns  # T tokens: prompt, completions and observations in order
    reward: float = 0.0  # total; meaningless where failure is set
    stop_reason: StopReason | None = None  # of the last turn
    failure: Failure | None = None
    seconds: float = 0.0  # from the submission of each turn's request to its end, summed over the turns
    counts: Mapping[str, int] = field(default_factory=dict)  # of its program, with its first segment: tool_calls, ...
    segment: int = 0  # of its program, in order; all have the program's reward and failure
    cause: str = ""  # why a segment after the first began: "fold", or what a rendered history changed
    said: tuple[Message, ...] = ()  # by the model and the environment since the segment's start, as its tokens have it

    @property
    def id(self) -> str:
        """Unique among a step's trajectories, and that of the sample made of it."""
        return f"{self.program_id}/{self.segment}"

    @property
    def num_sampled(self) -> int:
        return int(self.columns["loss_mask"].sum())

    @property
    def num_turns(self) -> int:
        """Completions: runs of sampled tokens."""
        mask = self.columns["loss_mask"]
        return int(mask[:1].sum() + (mask[1:] & ~mask[:-1]).sum())


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one prompt.

    >>> Group(Prompt("p", ()), ()).programs
    []
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]  # of G programs, a program's segments side by side
    stopped: bool = False  # before all of its programs began: the rest would hardly have differed

    @property
    def programs(self) -> list[tuple[Trajectory, ...]]:
        """The segments of each of its G programs."""
        return [tuple(segments) for _, segments in groupby(self.trajectories, attrgetter("program_id"))]


@dataclass(frozen=True, slots=True)
class Sample:
    """What the learner takes: one trajectory with its credit.

    >>> seen = Columns.of(tokens=(1, 2, 7), loss_mask=(False, False, True), advantages=(0.0, 0.0, 1.5))
    >>> Sample("p/0", "p", seen).columns["advantages"][2]
    np.float64(1.5)
    """

    id: str  # trajectory id: program/segment
    prompt_id: str
    columns: Columns  # T tokens


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """Packed samples. A sample is a path of rows; samples that begin with the same tokens may share rows.

    T rows run through the decoder. S segments partition them, each a run of consecutive positions that attends to
    itself and, where it has a parent, to all rows before it on the parent's path. N predictions (row -> target token)
    carry the loss; those of a sample are contiguous, in order of position. A plain pack has one segment a sample and
    no parents.
    `denominators` are global: of the whole batch, whatever the number of microbatches. All arrays are int32.
    """

    tokens_T: Array
    segments_S: Array  # S+1 boundaries: segment s owns rows [segments_S[s], segments_S[s+1])
    first_S: Array  # absolute position of each segment's first row, and so how many rows of its parent's path it sees
    parent_S: Array  # the segment that it continues, before it; -1: none
    rows_N: Array  # the row whose output predicts the target
    predictions: Columns  # N: "tokens" are the targets, the others what the samples know of them
    row_columns: Columns  # T: what the forward pass is told of each row; a shared row's is its first sample's
    members: Array  # of each sample: its index in what was packed
    sample_ids: tuple[str, ...]
    sample_tokens: Array  # predictions of each sample, in sample_ids order
    prompt_tokens: Array  # of each sample: predictions of its prompt's samples in the whole batch
    denominators: Denominators


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts over the whole batch that normalise the loss.

    >>> Denominators(tokens=100, samples=8, prompts=2).tokens
    100
    """

    tokens: int  # predictions with loss_mask
    samples: int
    prompts: int
