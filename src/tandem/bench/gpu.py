"""Speed on one CUDA device: random Llamas of 1 B and 8 B parameters in bf16, beside the device's own limits.

No checkpoint is read: weights are drawn on the device. The limits are measured there too, in the same process: a
product of 8192 cubed for the matrix rate, a copy of 4 GiB (bytes read and written) for the bandwidth. Times end with
what was drawn, or the loss, beside the CPU. Rows of fewer bits are the same work under `model.weights`: their least
times take the bytes of the codes, and in 8 bits twice the matrix rate of bf16, which is not measured. `python -m
tandem.bench.beside gpu` prints the figures and needs torch, Triton and NumPy alone. Written where there is no such
device: it has run on none yet.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tandem.bench.peers import Figure, beside_limit
from tandem.bench.work import answer, learner_on, random_requests, random_samples
from tandem.errors import ConfigError
from tandem.models.spec import ModelSpec
from tandem.plan import roofline
from tandem.plan.roofline import Machine, timed

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.models.decoder import Decoder

LLAMA_1B = ModelSpec(
    "llama",
    vocab_size=128256,
    width=2048,
    ff_width=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    head_size=64,
    rope_theta=500000.0,
    tied_embeddings=True,
    max_position=4096,
)
LLAMA_8B = replace(LLAMA_1B, width=4096, ff_width=14336, layers=32, head_size=128, tied_embeddings=False)
MODELS = {"1b": LLAMA_1B, "8b": LLAMA_8B}
DECODE = (64, 256)  # sequences, new tokens each
PROMPT_TOKENS = 128  # of a sequence that decodes
PREFILL = TRAIN = (8, 2048)
WEIGHTS = ("same", "w8a8", "fp8_row+fp8_row", "mxfp4", "nvfp4")  # model.weights
LEARNED = ("same", "w8a8")  # of them, in training
REPEATS = 3  # after a warm-up, which compiles and captures


def check_device() -> None:
    """ConfigError where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"`bench gpu` needs a CUDA device, and torch {torch.__version__} sees none here. Run it on a machine with "
            "one and a CUDA build of torch, or choose engine, learner, step, profile or sweep."
        )


def measure() -> Machine:
    """The best of ten of a bf16 product of random matrices, 8192 cubed, and of a copy of 4 GiB."""
    import torch

    check_device()

    def best_s(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times[2:])

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop_s = 2 * 8192**3 / best_s(partial(torch.matmul, left, right))
    source, target = (torch.empty(1 << 32, dtype=torch.uint8, device="cuda") for _ in range(2))
    return Machine(flop_s, 2 * source.nbytes / best_s(partial(target.copy_, source)))


def random_decoder(spec: ModelSpec, device: str = "cuda", weights: str = "same") -> Decoder:
    """Normal weights of deviation 0.02, norms of one; `weights` as in model.weights."""
    import torch

    from tandem.kernels.rounding import rounding_of
    from tandem.models.decoder import Decoder

    decoder = Decoder(spec, "bfloat16", device, rounding=rounding_of(weights))
    generator = torch.Generator(device).manual_seed(0)
    for _, weight in decoder.weights():
        if weight.value.dim() == 1:
            weight.value.fill_(1.0)
        else:
            weight.value.normal_(0.0, 0.02, generator=generator)
    decoder.repack()
    return decoder


def engine_on(decoder: Decoder, tokens: int) -> Engine:
    """An engine whose pages hold that many tokens, and whose step runs a whole prefill."""
    from tandem.engine.config import EngineConfig
    from tandem.engine.engine import Engine
    from tandem.engine.runner import DecoderRunner

    config = EngineConfig(batch_tokens=max(tokens, 256))
    num_pages = -(-tokens // config.page_tokens)
    runner = DecoderRunner(decoder, num_pages, config.page_tokens, config)
    return Engine(runner, config, num_pages, max_context=decoder.spec.max_position)


def generate(engine: Engine, count: int, length: int, new: int, seed: int) -> tuple[float, float]:
    """`answer` for prompts of random tokens."""
    return answer(engine, random_requests(count, length, 100, new, random.Random(seed)))


def train_step(decoder: Decoder, count: int, length: int) -> Callable[[], Any]:
    """Forward, backward and AdamW on one microbatch of random samples, all but the first token of each trained."""
    from tandem.algo.pack import count_prompts
    from tandem.train.config import LearnerConfig

    samples = random_samples(count, length, 100)
    config = LearnerConfig(lr=1e-6, microbatch_tokens=count * length, activation_checkpointing="off")
    learner = learner_on(decoder, config)
    return lambda: learner.step(samples, count_prompts(samples))


def reduced(machine: Machine, spec: ModelSpec, weights: str) -> tuple[Machine, float]:
    """The rates that products of a format may have, and the bytes of all matrices.

    >>> reduced(Machine(10.0, 5.0), LLAMA_8B, "w8a8")[0]
    Machine(flop_s=20.0, bytes_s=5.0)
    """
    from tandem.kernels.rounding import rounding_of

    rounding = rounding_of(weights)
    in_8_bits = rounding.products or (rounding.form is not None and rounding.rows is not None)
    bits = 16.0 if not rounding else float(rounding.bits) if rounding.form is None else rounding.form.bits
    whole = roofline.BYTES * spec.vocab_size * spec.width
    return (
        replace(machine, flop_s=(2 if in_8_bits else 1) * machine.flop_s),
        roofline.layer_parameters(spec) * bits / 8 + whole,
    )


def gpu(machine: Machine) -> Iterator[Figure]:
    """Rates in tokens a second, and for each the limit: of bytes in decoding, of products elsewhere."""
    import torch

    for name, spec in MODELS.items():
        for weights in WEIGHTS:
            decoder = random_decoder(spec, weights=weights)
            work = name if weights == "same" else f"{name} {weights}"
            yield from _served(machine, work, decoder, weights)
            torch.cuda.empty_cache()
            if spec is LLAMA_1B and weights in LEARNED:
                step = train_step(decoder, *TRAIN)
                times_s = [timed(step) for _ in range(REPEATS + 1)]
                least_s = machine.least_s(roofline.train_cost(spec, *TRAIN))
                rows = f"{work} train {TRAIN[0]}x{TRAIN[1]}"
                yield from beside_limit(rows, least_s, times_s[1:], TRAIN[0] * TRAIN[1])
                del step
            del decoder
            torch.cuda.empty_cache()


def _served(machine: Machine, work: str, decoder: Decoder, weights: str) -> Iterator[Figure]:
    """Decoding, its steps, and prompts."""
    spec, (count, new) = decoder.spec, DECODE
    machine, weight_bytes = reduced(machine, spec, weights)
    engine = engine_on(decoder, max(count * (PROMPT_TOKENS + new + 64), PREFILL[0] * (PREFILL[1] + 64)))
    whole, steps = zip(*(generate(engine, count, PROMPT_TOKENS, new, i) for i in range(REPEATS + 1)), strict=True)
    step_s = machine.least_s(roofline.decode_cost(spec, count, PROMPT_TOKENS + new / 2, weight_bytes))
    yield from beside_limit(f"{work} decode {count}x{new}", new * step_s, whole[1:], count * new)
    yield from beside_limit(f"{work} decode step {count}", step_s, steps[1:], count)
    times_s = [generate(engine, *PREFILL, 1, i)[0] for i in range(REPEATS + 1)]
    least_s = machine.least_s(roofline.prefill_cost(spec, *PREFILL))
    rows = f"{work} prefill {PREFILL[0]}x{PREFILL[1]}"
    yield from beside_limit(rows, least_s, times_s[1:], PREFILL[0] * PREFILL[1])
