"""Every source of difference between engine and learner, switched back on: the checks of parity must then fail.

A mutation replaces a function by a version that other systems have and that is not invariant. The check that is to
catch it passes without it. Controls replace the same functions by other versions that are invariant: they must pass,
so what is caught is the loss of invariance and not the replacement. docs/parity.md has the table. The engine runs an
operation at a time here, since its one-call pass has no functions to replace; test_fused.py holds that the bits are the
same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.engine import queues, runner
from tandem.engine.driver import Driver
from tandem.engine.schedule import Scheduler
from tandem.kernels.build.toolchain import compiler
from tandem.kernels.linear import logits
from tandem.kernels.sample import SamplingBatch, log_sum_exp
from tandem.models.decoder import Decoder
from tandem.models.view import PackView, PagedView
from tandem.numerics import random as noise
from tandem.rollout.config import RolloutConfig
from tandem.rollout.rollout import Rollouts
from tandem.train import step as learner
from tandem.train.config import LearnerConfig
from tandem.train.optimiser import Optimiser
from tandem.types import Message, Prompt, Request, Sampling, WeightVersion
from tests.samples import ended

Patch = pytest.MonkeyPatch
Check = Callable[[Any, Callable[..., Decoder]], None]
Mutation = tuple[Check, Callable[[Patch], None]]
VOCAB = 97
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")

# What is checked, by the methods of Parity that test_parity.py draws arguments for.


def texts(count: int, length: int) -> list[list[int]]:
    """Contexts that begin alike."""
    rng = random.Random(0)
    stem = [rng.randrange(VOCAB) for _ in range(length)]
    return [stem[: length // (1 + i)] + [rng.randrange(VOCAB) for _ in range(9 * i)] for i in range(count)]


def chain(dtype: str = "float32") -> Check:
    return lambda parity, make: parity.check_chain(make(dtype), texts(3, 40), 4, 0)


def company(parity, make) -> None:
    """In a pool that is too small for all."""
    asked = parity.groups(texts(3, 30), 4, 1.0, 18)
    engine = parity.engine(make("float32"), 18, batch_tokens=20, lookahead_tokens=0)
    parity.check_company(make("float32"), asked, engine)
    assert engine.stats.preemptions and engine.stats.cached_tokens


def scored(dtype: str = "float32", temperature: float = 1.0) -> Check:
    def check(parity, make) -> None:
        decoder = make(dtype)
        asked = parity.groups(texts(3, 40), 4, temperature, 12)
        done = parity.engine(decoder, 200, batch_tokens=24).generate(asked)
        parity.check_learner(decoder, parity.samples(asked, done), temperature, 100)

    return check


def threads(parity, make) -> None:
    """One thread and two."""
    found = []
    for count in (1, 2):
        with parity.threads(count):
            found.append(parity.alone(make("float32"), texts(1, 40)[0]))
    parity.same_rows(found[1], found[0], "two threads")


def weights_in_turn(parity, make) -> None:
    tensors = [dict(make("float32", seed).export()) for seed in range(2)]
    parity.check_updates(make("float32", 0), tensors, parity.groups(texts(2, 33), 3, 1.0, 6))


def update_in_a_prompt(parity, make) -> None:
    """After an update in the midst of a prompt, requests with that prompt draw what a new engine draws."""
    decoder, fresh = make("float32", 0), make("float32", 1)
    engine = parity.engine(decoder, 200, batch_tokens=8, max_sequences=8)
    first, *others = parity.groups(texts(1, 33), 3, 1.0, 18)
    engine.submit(first)
    engine.step()
    decoder.load(fresh.export())
    engine.receive(WeightVersion(1, "digest 1"))
    while engine.has_work:
        engine.step()
    for request in others:
        wanted = parity.engine(fresh, 200).generate([request])[0]
        parity.same(engine.generate([request])[0], wanted, "after an update")
    assert engine.stats.cached_tokens


def trained(parity, make, order: Callable[[list[Any]], list[Any]] = list, updates: int = 1) -> Decoder:
    """A decoder after a step's updates on samples in the given order."""
    decoder = make("float32")
    asked = parity.groups(texts(3, 30), 4, 1.0, 12)
    samples = order(parity.samples(asked, parity.engine(decoder, 200).generate(asked)))
    algo = AlgoConfig(updates_per_step=updates)
    owner = learner.Learner(decoder, LearnerConfig(lr=1e-2, microbatch_tokens=100), PolicyGradient(algo, 1.0), updates)
    owner.step(samples, count_prompts(samples))
    return decoder


def serves_what_was_trained(parity, make) -> None:
    """After an update the engine draws what it draws on a new decoder that holds the exported weights."""
    decoder = trained(parity, make)
    fresh = Decoder(decoder.spec, "float32").load(decoder.export())
    asked = parity.groups(texts(2, 20), 2, 1.0, 8)
    for got, wanted in zip(*(parity.engine(d).generate(asked) for d in (decoder, fresh)), strict=True):
        parity.same(got, wanted, "after an update")


def order_of_samples(parity, make) -> None:
    """The samples of a batch, and so its prompts, in any order: the same weights."""
    for updates in (1, 2):
        wanted = dict(trained(parity, make, updates=updates).export())
        for seed in range(3):
            rng = random.Random(seed)
            shuffled = trained(parity, make, lambda samples, rng=rng: rng.sample(samples, len(samples)), updates)
            for name, tensor in shuffled.export():
                parity.same_rows(tensor, wanted[name], f"{name}, samples in another order, {updates} updates")


def filters(parity, make) -> None:
    """A filter that keeps the token which would be drawn without it does not change the draw."""
    drawn = {}
    for top_k in (0, 8):
        sampling = Sampling(top_k=top_k, max_new_tokens=1)
        asked = [Request(str(seed), "", tuple(texts(1, 20)[0]), sampling, seed) for seed in range(100)]
        done = parity.engine(make("float32", width=8), 200).generate(asked)
        drawn[top_k] = [completion.tokens[0] for completion in done]
    kept = set(drawn[8])
    assert any(token in kept for token in drawn[0]) and any(token not in kept for token in drawn[0])
    for free, filtered in zip(drawn[0], drawn[8], strict=True):
        if free in kept and free != filtered:
            raise parity.Differs(f"{free} without top-k, {filtered} with it")


class Plain:
    """Renders nothing and grades nothing: prompts are token lists. An environment and its episodes in one."""

    stop_token_ids = ()

    def prompt_tokens(self, messages: Sequence[Message], tools=(), /) -> tuple[int, ...]:
        return tuple(int(word) for word in messages[0].content.split())

    def message(self, *_: Any, **__: Any) -> Message:
        return Message("assistant", "")

    def episode(self, prompt, until_s, /):
        return SimpleNamespace(said=[], counts={}, score=lambda unheard: ended(0.0), teardown=lambda: None)


def siblings(parity, make) -> None:
    """The samples of a prompt are draws of their own."""
    config = RolloutConfig(samples_per_prompt=4, max_new_tokens=16)
    prompt = Prompt("p", (Message("user", " ".join(map(str, texts(1, 20)[0]))),))
    (group,) = Rollouts(Driver(parity.engine(make("float32"))), Plain(), Plain(), config, 0).collect(1, [prompt])
    if len({trajectory.columns["tokens"].tobytes() for trajectory in group.trajectories}) < 4:
        raise parity.Differs("siblings drew the same tokens")


# How the code is broken.


def named(target: str) -> tuple[Any, str, Any]:
    """Module, attribute and present value of "package.module.attribute"."""
    path, _, attribute = target.rpartition(".")
    module = __import__(path, fromlist=[attribute])
    return module, attribute, getattr(module, attribute)


def everywhere(target: str, broken: Callable[..., Any]) -> Callable[[Patch], None]:
    """`target` replaced; `broken` gets what was there as its first argument."""

    def apply(patch: Patch) -> None:
        module, attribute, true = named(target)
        patch.setattr(module, attribute, lambda *given, **by_name: broken(true, *given, **by_name))

    return apply


def on_learner(target: str, broken: Callable[..., Any]) -> Callable[[Patch], None]:
    """As `everywhere`, while the decoder runs on a pack; the engine keeps what was there."""

    def apply(patch: Patch) -> None:
        module, attribute, true = named(target)
        forward, on_pack = Decoder.forward, [False]

        def watched(self, tokens_T, view, *given, **by_name):
            on_pack[0] = isinstance(view, PackView)
            try:
                return forward(self, tokens_T, view, *given, **by_name)
            finally:
                on_pack[0] = False

        def chosen(*given, **by_name):
            return broken(true, *given, **by_name) if on_pack[0] else true(*given, **by_name)

        patch.setattr(Decoder, "forward", watched)
        patch.setattr(module, attribute, chosen)

    return apply


def product_in_parts(parts: Callable[[int], int]) -> Callable[..., Tensor]:
    """Row by row; the depth is cut into parts(rows) parts, each summed alone, and their sums are added."""

    def broken(_true, x_TK, weight, bias=None, residual_TN=None) -> Tensor:
        count = parts(x_TK.shape[0])
        rows = []
        for x_K in x_TK.float():
            pieces = zip(x_K.tensor_split(count), weight.value.float().tensor_split(count, 1), strict=True)
            rows.append(sum(block_NK @ piece_K for piece_K, block_NK in pieces))
        out_TN = torch.stack(rows)
        out_TN = out_TN if bias is None else out_TN + bias.value.float()
        return (out_TN if residual_TN is None else out_TN + residual_TN.float()).to(x_TK.dtype)

    return broken


def library_product(_true, x_TK, weight, bias=None, residual_TN=None) -> Tensor:
    """The library's: matrix times vector where there are few rows, matrix times matrix else."""
    if x_TK.shape[0] < 4:
        out_TN = torch.stack([torch.mv(weight.value, x_K) for x_K in x_TK])
    else:
        out_TN = functional.linear(x_TK, weight.value)
    out_TN = out_TN if bias is None else out_TN + bias.value
    return out_TN if residual_TN is None else out_TN + residual_TN


def library_vectors(_true, x_TK, weight, *given) -> Tensor:
    """The library's matrix times vector for every row: invariant, but not the engine's order."""
    bias, residual_TN = (*given, None, None)[:2]
    out_TN = torch.cat([library_product(None, row_1K, weight, bias) for row_1K in x_TK.split(1)])
    return out_TN if residual_TN is None else out_TN + residual_TN


def blocked_attention(cuts: Callable[[int, int, int], list[int]]) -> Callable[[Patch], None]:
    """Query by query; keys are reduced in blocks that begin at cuts(first position, end of the segment, page size)."""

    def broken(query_THD, key_CKD, value_CKD, paths, *_given) -> Tensor:
        outs = []
        for s in range(len(paths.first_position_S)):
            start, stop = int(paths.row_start_S[s]), int(paths.row_start_S[s + 1])
            first = int(paths.first_position_S[s])
            end = first + stop - start
            position = torch.arange(end)
            slots = paths.table_SP[s].long()[position // paths.page_tokens] * paths.page_tokens
            slots += position % paths.page_tokens
            begins = cuts(first, end, paths.page_tokens)
            for t in range(first, end):
                blocks = [(low, min(high, t + 1)) for low, high in zip(begins, [*begins[1:], end], strict=True)]
                rows = [slots[low:high] for low, high in blocks if low < high]
                outs.append(one_query(query_THD[start + t - first], key_CKD, value_CKD, rows))
        return torch.stack(outs)

    def apply(patch: Patch) -> None:
        def in_pages(query_THD, pool, *given) -> Tensor:
            return broken(query_THD, *pool.rows(torch.arange(pool.num_slots)), *given)

        patch.setattr("tandem.models.view.attention", broken)
        patch.setattr("tandem.models.view.paged_attention", in_pages)

    return apply


def one_query(query_HD: Tensor, key_CKD: Tensor, value_CKD: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Softmax over the blocks one after the other, relative to the running maximum."""
    heads, size = query_HD.shape
    group = heads // key_CKD.shape[1]
    top_H, total_H, out_HD = torch.full((heads,), -torch.inf), torch.zeros(heads), torch.zeros(heads, size)
    for slots in blocks:
        key, value = (x[slots].float().repeat_interleave(group, 1) for x in (key_CKD, value_CKD))
        score_HN = (query_HD.float() * key).sum(-1).T / size**0.5
        higher_H = torch.maximum(top_H, score_HN.amax(1))
        weight_HN, factor_H = (score_HN - higher_H[:, None]).exp(), (top_H - higher_H).exp()
        total_H = total_H * factor_H + weight_HN.sum(1)
        out_HD = out_HD * factor_H[:, None] + (weight_HN.T[:, :, None] * value).sum(0)
        top_H = higher_H
    return (out_HD / total_H[:, None]).to(query_HD.dtype)


CUTS: dict[str, Callable[[int, int, int], list[int]]] = {
    "absolute": lambda first, end, page: list(range(0, end, 8)),
    "chunk": lambda first, end, page: sorted({0, *range(first % 8, end, 8)}),
    "four": lambda first, end, page: list(range(0, end, -(-end // 4))),
    "page": lambda first, end, page: list(range(0, end, page)),
}


def norm_summed(flips: Callable[[int], bool]) -> Callable[..., Tensor]:
    """The squares are added one after the other, from the front or, where `flips` says so of the rows, from the end."""

    def broken(_true, x_TM, weight, eps) -> Tensor:
        x = x_TM.float()
        square = x.square().flip(-1) if flips(x.shape[0]) else x.square()
        total_T = sum(square.unbind(-1))
        return (x * torch.rsqrt(total_T[:, None] / x.shape[1] + eps) * weight.value.float()).to(x_TM.dtype)

    return broken


def norm_in_compute_dtype(_true, x_TM, weight, eps) -> Tensor:
    return x_TM * torch.rsqrt(x_TM.square().mean(-1, keepdim=True) + eps) * weight.value


def positions_of_the_chunk(patch: Patch) -> None:
    """Rotation starts from 0 in every chunk."""
    attend = PagedView.attend

    def broken(self, *given):
        absolute, paths = self.positions_T, self.paths
        rows = paths.row_start_S.diff().long()
        self.positions_T = absolute - paths.first_position_S.long().repeat_interleave(rows)
        try:
            return attend(self, *given)
        finally:
            self.positions_T = absolute

    patch.setattr(PagedView, "attend", broken)


def narrow_tables(patch: Patch) -> None:
    attend = PackView.attend
    patch.setattr(
        PackView,
        "attend",
        lambda self, layer, qkv, heads, tables: attend(
            self, layer, qkv, heads, tuple(table.bfloat16().float() for table in tables)
        ),
    )


def stacked(change: Callable[[list[int], list[int]], tuple[list[int], list[int]]]) -> Callable[[Patch], None]:
    """Other seeds or positions for the rows of a batch."""

    def apply(patch: Patch) -> None:
        true = SamplingBatch.stack

        def broken(samplings, seeds, positions, *masks, **more):
            return true(samplings, *change(list(seeds), list(positions)), *masks, **more)

        patch.setattr(SamplingBatch, "stack", broken)

    return apply


def counted() -> Callable[[list[int], list[int]], tuple[list[int], list[int]]]:
    """Positions are the number of the engine's step: a generator that moves on with every call."""
    calls = iter(range(10**6))
    return lambda seeds, positions: (seeds, [next(calls)] * len(positions))


def noise_by_rank(true, logits_SV, batch, *given):
    """The noise of the i-th token that is left, not of the token that it is."""
    tokens_S, logprobs_S = true(logits_SV, batch, *given)
    for s in range(len(batch)):
        ids = torch.arange(logits_SV.shape[1])
        if batch.top_k_S[s]:
            ids = logits_SV[s].topk(int(batch.top_k_S[s])).indices.sort().values
        words = noise.words(int(batch.seeds_S[s]), int(batch.positions_S[s]), range(len(ids)))
        score = logits_SV[s, ids].double() / float(batch.temperature_S[s]) + torch.from_numpy(noise.gumbel(words))
        tokens_S[s] = ids[score.argmax()]
    return tokens_S, logprobs_S


def resumed_too_far(patch: Patch) -> None:
    """A preempted sequence believes that a token more than was found is still there."""
    start = Scheduler._start

    def broken(self, sequence, *given):
        start(self, sequence, *given)
        if sequence.reached:
            sequence.computed = min(sequence.computed + 1, len(sequence.tokens) - 1)

    patch.setattr(Scheduler, "_start", broken)


def named_after_an_update(patch: Patch) -> None:
    """What a running sequence computed of two weights gets a name under the new ones."""
    receive = Scheduler.receive

    def broken(self, version):
        receive(self, version)
        for sequence in self.running:
            sequence.root = self.root(sequence.request)

    patch.setattr(Scheduler, "receive", broken)


def no_repack(patch: Patch) -> None:
    """The optimiser changes the weights and not what the products read."""
    true = Optimiser.step

    def broken(self, *given, **named):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Decoder, "repack", lambda self: None)
            true(self, *given, **named)

    patch.setattr(Optimiser, "step", broken)


def scores_of(change: Callable[[Tensor], Tensor], lse: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The learner's log-probs of changed logits, by another log-sum-exp."""

    def broken(true, hidden_NM, weight, targets_N, temperature, *given):
        by_N, x_NV = torch.full((len(hidden_NM),), temperature), change(logits(hidden_NM, weight))
        lse_N = lse(x_NV, by_N)
        logprobs_N = x_NV.gather(1, targets_N[:, None])[:, 0] / by_N - lse_N
        scores = true(hidden_NM, weight, targets_N, temperature, *given)
        return scores._replace(logprobs_N=logprobs_N, lse_N=lse_N)

    return broken


def as_they_came(patch: Patch) -> None:
    """The samples of a batch in the order in which they happened to finish."""
    patch.setattr(learner, "canonical", lambda samples, prompts: (samples, prompts))


LINEAR, NORM = "tandem.models.layer.linear", "tandem.models.layer.rms_norm"
STORE, SCORES = "tandem.models.view.rotate_store_", "tandem.train.score.token_logprobs"
HEAD = "tandem.kernels.logprob._score"

MUTATIONS: dict[str, Mutation] = {
    "product: depth split below 16 rows": (
        chain(),
        everywhere(LINEAR, product_in_parts(lambda rows: 2 if rows < 16 else 1)),
    ),
    "product: depth split over the threads": (
        threads,
        everywhere(LINEAR, product_in_parts(lambda rows: torch.get_num_threads())),
    ),
    "product: the library's": (chain(), everywhere(LINEAR, library_product)),
    "product: the library's in the learner": (scored(), on_learner(LINEAR, library_vectors)),
    "attention: key blocks begin where the chunk does": (chain(), blocked_attention(CUTS["chunk"])),
    "attention: four splits of any length": (chain(), blocked_attention(CUTS["four"])),
    "attention: a key block is a page": (scored(), blocked_attention(CUTS["page"])),
    "pages: narrower than the compute dtype": (
        scored(),
        everywhere(STORE, lambda true, qkv, *given: (qkv[2].copy_(qkv[2].bfloat16()), true(qkv, *given))),
    ),
    "rotary: positions of the chunk": (chain(), positions_of_the_chunk),
    "rotary: tables in bf16": (scored(), narrow_tables),
    "norm: in the compute dtype": (scored("bfloat16"), on_learner(NORM, norm_in_compute_dtype)),
    "norm: order depends on the rows": (chain(), everywhere(NORM, norm_summed(lambda rows: rows < 4))),
    "head: in bf16": (
        scored("bfloat16"),
        everywhere(HEAD, scores_of(lambda logits_NV: logits_NV.bfloat16().float(), log_sum_exp)),
    ),
    "log-sum-exp: another order": (
        scored(),
        everywhere(HEAD, scores_of(lambda x: x, lambda x_NV, by_N: torch.logsumexp(x_NV / by_N[:, None], -1))),
    ),
    "learner: no temperature": (
        scored(temperature=0.7),
        everywhere(SCORES, lambda true, x, head, ids, _by, **sets: true(x, head, ids, 1.0, **sets)),
    ),
    "learner: targets one off": (
        scored(),
        everywhere(SCORES, lambda true, x, head, ids, by, **sets: true(x, head, ids.roll(1), by, **sets)),
    ),
    "learner: order of samples": (order_of_samples, as_they_came),
    "noise: of the batch row": (company, stacked(lambda seeds, positions: (list(range(len(seeds))), positions))),
    "noise: of the engine's step": (company, stacked(counted())),
    "noise: of the rank": (filters, everywhere("tandem.engine.runner.sample", noise_by_rank)),
    "seeds: one for all siblings": (
        siblings,
        everywhere("tandem.rollout.turns.derive_seed", lambda true, run, step, prompt, _: true(run, step, prompt, 0)),
    ),
    "prefix: found under other weights": (
        weights_in_turn,
        lambda patch: patch.setattr(queues, "root_key", lambda *named: b"any weights"),
    ),
    "prefix: blocks of two weights": (update_in_a_prompt, named_after_an_update),
    "weights: changed and not packed": (serves_what_was_trained, no_repack),
    "preemption: resumes too far": (company, resumed_too_far),
}
CONTROLS: dict[str, Mutation] = {
    "product: depth always split": (chain(), everywhere(LINEAR, product_in_parts(lambda rows: 2))),
    "product: depth always split, threads": (threads, everywhere(LINEAR, product_in_parts(lambda rows: 2))),
    "attention: blocks of 8 positions": (chain(), blocked_attention(CUTS["absolute"])),
    "attention: blocks of 8 positions, learner": (scored(), blocked_attention(CUTS["absolute"])),
    "norm: always from the front": (chain(), everywhere(NORM, norm_summed(lambda rows: False))),
}


@pytest.fixture(autouse=True)
def an_operation_at_a_time(monkeypatch: Patch) -> None:
    monkeypatch.setattr(runner, "fits", lambda decoder, pools: False)
    monkeypatch.setattr(runner, "draw", lambda hidden, weight, batch: runner.sample(logits(hidden, weight), batch))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_source_of_difference_is_caught(name: str, parity, make_decoder):
    """Parity tests that pass whatever the code does."""
    check, broken = MUTATIONS[name]
    check(parity, make_decoder)
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        with pytest.raises(parity.Differs):
            check(parity, make_decoder)


@pytest.mark.parametrize("name", CONTROLS)
def test_an_invariant_replacement_passes(name: str, parity, make_decoder):
    """A mutation caught for another reason than the one that it stands for."""
    check, other = CONTROLS[name]
    with pytest.MonkeyPatch.context() as patch:
        other(patch)
        check(parity, make_decoder)
