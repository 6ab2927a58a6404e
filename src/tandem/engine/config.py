"""What an engine is given: how much memory, and how much work a step may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt

from tandem.config import AboveZero, Amount, Count, Positive, Share, section
from tandem.errors import ConfigError
from tandem.numerics.names import check_kv_name, check_weights_name

Dtype = Literal["same", "bfloat16", "float32", "float16"]
Rule = Literal["arrival", "longest", "fair", "shares"]
Policy = Literal["fcfs", "plas", "ttl", "continuum", "thunder", "oracle"]
By = Literal["none", "lookup", "suffix", "synthetic", "model", "eagle3", "dflash", "mixed"]
Verify = Literal["match", "reject"]
Mode = Literal["off", "shadow", "advisory", "enforce"]


@dataclass(frozen=True, slots=True)
@section("engine.programs")
class ProgramsConfig:
    """How an engine treats the turns of one program (docs/programs.md).

    >>> ProgramsConfig(mode="enforce", policy="ttl").ttl_s
    2.0
    """

    mode: Mode = "off"  # shadow: decides and records; advisory: the cache forgets by it; enforce: it is done
    policy: Policy = "thunder"  # who starts, whose pages are kept, who pauses (engine/policies.py)
    ttl_s: Amount = 2.0  # what `ttl` keeps the pages of an acting program for
    half_life_s: AboveZero = 1.0  # in which an acting program counts half as much under `thunder`
    tick_s: AboveZero = 0.25  # between two looks at whether memory suffices, beside those that events cause
    patience_s: AboveZero = 1800.0  # a paused program that has asked for so long goes first
    done_s: AboveZero = 600.0  # a program that acts for longer is taken for done
    share: Share = 1.0  # of programs, by a hash of their names, that decisions are carried out for
    tenants: tuple[tuple[str, float], ...] = ()  # the same for a tenant of its own, name=share,...
    guard_first_s: Amount = 0.0  # p99 of seconds to the first token above which the mode falls to shadow; 0: none
    guard_cached: Share = 0.0  # share of what programs had run that is found again, below which it does; 0: none
    record: str = ""  # a file to which steps and decisions are appended, as JSON lines
    park: str = ""  # a folder to which pages of paused programs go where that is cheaper than to compute them again
    park_bytes: Count = 1 << 30  # most that lies there

    def __post_init__(self) -> None:
        for name, share in self.tenants:
            if not 0 <= share <= 1:
                raise ConfigError(f"engine.programs.tenants gives {name} {share}. Allowed: 0 to 1.")
        if self.park and self.mode == "off":
            raise ConfigError('engine.programs.park is set, but engine.programs.mode is "off": set a mode too.')

    def share_of(self, tenant: str) -> float:
        return dict(self.tenants).get(tenant, self.share)


@dataclass(frozen=True, slots=True)
@section("engine.draft")
class DraftConfig:
    """What a step tries beyond a sequence's next token; what is drawn is the same (docs/speculation.md).

    >>> DraftConfig().most, DraftConfig("lookup", 4).most
    (0, 4)
    """

    by: By = "none"  # who drafts (engine/draft.py)
    tokens: Positive = 8  # most that a step tries of a sequence
    lengths: Literal["measured", "fixed"] = "measured"  # as many as raise the speed here (engine/lengths.py), or most
    history: Positive = 1 << 20  # by suffix and synthetic: tokens of ended answers that are kept; vocabulary: counted
    acceptance: Share = 0.6  # by synthetic: of drafts, those that stand
    model: str = ""  # by model: what model.source takes, of the same vocabulary; else a drafter, or its run
    vocabulary: Count = 0  # by model, dflash: tokens that are drafted at all, the most frequent; 0: all
    vocabulary_of: str = ""  # texts, a run or a token map that says which; empty: the answers, once there are some
    verify: Verify = "match"  # a draft stands if it is what is drawn; reject: by its probability
    branches: Positive = 1  # most drafts of a sequence that a step tries side by side

    def __post_init__(self) -> None:
        if (self.by in ("model", "eagle3", "dflash", "mixed")) != bool(self.model):
            raise ConfigError(
                f"engine.draft.by is {self.by!r} and engine.draft.model {self.model!r}. Give both, by=model and a "
                "small model of the same vocabulary, or by=eagle3 (dflash, mixed) and a drafter that was trained for "
                "this model; or neither."
            )
        if self.vocabulary and self.by not in ("model", "dflash"):
            raise ConfigError(
                f"engine.draft.vocabulary is {self.vocabulary}, and engine.draft.by {self.by!r}, which has no whole "
                "head to choose of. Leave it out."
            )
        if self.vocabulary_of and not self.vocabulary:
            raise ConfigError("engine.draft.vocabulary_of is given: say how many tokens, with engine.draft.vocabulary.")
        if self.branches > 1 and self.verify == "reject":
            raise ConfigError(
                f"engine.draft.branches is {self.branches} and engine.draft.verify is reject: of drafts side by side "
                "one at most is what the model draws, and none is drawn where drafts are accepted by probability. Set "
                "engine.draft.verify to match, or engine.draft.branches to 1."
            )

    @classmethod
    def of(cls, name: str) -> DraftConfig:
        """By a name of `By`, by a model, or by a drafter of one of its kinds.

        >>> DraftConfig.of("suffix").by, DraftConfig.of("small").model, DraftConfig.of("eagle3:run").model
        ('suffix', 'small', 'run')
        """
        kind, _, folder = name.partition(":")
        by = next((one for one in get_args(By) if one == kind and one != "model"), None)
        return cls("model", model=name) if by is None else cls(by, model=folder)

    @property
    def most(self) -> int:
        """Tokens that a step may try of a sequence."""
        return self.tokens if self.by != "none" else 0


@dataclass(frozen=True, slots=True)
@section("engine")
class EngineConfig:
    """Limits of one engine, and what its policy departs in from the learner's. Scheduling follows from these and the
    requests.

    >>> EngineConfig(page_tokens=8).page_tokens
    8
    """

    page_tokens: int = 16  # tokens a page of keys and values holds; also the unit of prefix sharing
    batch_tokens: Positive = 2048  # most tokens one forward pass runs, decodes and prefill chunks together
    max_sequences: Positive = 256  # most sequences running at once
    kv_memory_bytes: Count = 0  # memory for pages; 0: of what the rest leaves, see plan/memory.py
    lookahead_tokens: Count = 64  # what admission expects a sequence to grow by, until requests have ended to tell
    order: Rule = "arrival"  # who starts first: who came first, has most to generate, whose program had least; shares
    shares: str = ""  # of order shares: a file with the tree of tenants, or the tree itself as JSON; empty: all alike
    draft: DraftConfig = field(default_factory=DraftConfig)
    replicas: Positive = 1  # engines that sample in training, on the same weights; each has its own pages
    answer_s: Annotated[float, Gt(0)] = 600.0  # what a replica has not answered by then is asked of another too
    share_prefixes: bool = True  # off: every prompt is computed from its first token
    programs: ProgramsConfig = field(default_factory=ProgramsConfig)
    # Departures: each makes the policy that samples another one than the learner's. Default: none.
    dtype: Dtype = "same"  # compute in another dtype than model.dtype
    weights: str = "same"  # of the layers' products: int8, int4, w8a8, w4a8, or a format, + one of rows
    weight_group: Annotated[int, Ge(2)] = 64  # inputs that share a scale under int8 and int4
    kv_dtype: str = "same"  # keys and values: float8_e4m3; int8, a scale a token and head; kivi4, in codes; a format
    logits: Literal["same", "bfloat16"] = "same"  # rounded to it before a token is drawn
    kv_window: Count = 0  # a query sees only this many latest positions and the sinks; 0 sees all
    kv_sinks: Count = 4  # leading positions that a kv_window always sees
    noise: Amount = 0.0  # for studies: normal noise on the final hidden state, relative to its root mean square

    @property
    def most_draws(self) -> int:
        """Of one step."""
        return min(self.batch_tokens, self.max_sequences * (1 + self.draft.most) * self.draft.branches)

    def __post_init__(self) -> None:
        check_weights_name("engine.weights", self.weights)
        check_kv_name("engine.kv_dtype", self.kv_dtype)
        if self.page_tokens < 2 or self.page_tokens & (self.page_tokens - 1):
            raise ConfigError(
                f"engine.page_tokens is {self.page_tokens}; it must be a power of two, 2 or more. "
                f"Set it to {1 << max(1, self.page_tokens.bit_length() - 1)}; 16 and more are read as they lie."
            )
        if self.shares and self.order != "shares":
            raise ConfigError(
                f"engine.shares is {self.shares!r}, and engine.order is {self.order!r}, which has no tenants. Set "
                "engine.order to shares, or leave engine.shares out."
            )
        if self.draft.branches > 1 and self.order == "shares":
            raise ConfigError(
                f"engine.draft.branches is {self.draft.branches} and engine.order is shares: rows of a second draft "
                "would be charged to nobody. Set engine.draft.branches to 1, or another engine.order."
            )
        if self.draft.verify == "reject" and self.replicas > 1:
            raise ConfigError(
                f"engine.draft.verify is reject and engine.replicas is {self.replicas}: what one replica is late with "
                "is asked of another, which has other drafts and so draws another text. Set engine.draft.verify to "
                "match, or engine.replicas to 1."
            )
        if self.batch_tokens < self.max_sequences:
            raise ConfigError(
                f"engine.batch_tokens is {self.batch_tokens}, less than engine.max_sequences {self.max_sequences}: "
                "a step could not hold one token of each running sequence, and prompts would starve. "
                "Raise engine.batch_tokens or lower engine.max_sequences."
            )
