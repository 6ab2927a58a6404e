"""This machine's rates, each of a kernel or of memory, by name (bench/measured.py says what is made of them).

Shapes are none of a model's: tiles from matrices that lie in a cache, a softmax from heads of 16 channels, and so on. A
rate that has two parts (a tile's steps and its end; channels and scores of attention's backward pass) is found from two
sizes. Times are the least of several, less what a call takes that has nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.bench.measured import ROWS, Measured
from tandem.errors import ConfigError
from tandem.plan.roofline import machine_name

if TYPE_CHECKING:
    import torch

    from tandem.kernels.weight import Weight

TRIES = 7
LEAST_S = 2e-4  # of calls that are timed together
CACHES = Path("/sys/devices/system/cpu")
WIDE_BYTES = 400_000_000  # that memory is read and written by


def kept_or_measured(again: bool, note: Callable[[str], None]) -> Measured:
    """This machine's rates: of the cache folder, or measured now and kept there."""
    found = None if again else Measured.known(machine_name(), env.cache_dir())
    if found is not None:
        return found
    import torch

    note(f"measuring {machine_name()}: half a minute, in which nothing else should run")
    with torch.enable_grad():  # a backward pass among it, whoever asks
        found = measure()
    note(f"kept in {found.keep(env.cache_dir())}; --measure takes them anew")
    return found


def measure() -> Measured:
    """All of them. ConfigError where no compiled kernels run."""
    import torch

    from tandem.kernels.build.load import lacking

    if env.kernels() or lacking():
        why = lacking() or f"TANDEM_KERNELS is {env.kernels()}"
        raise ConfigError(f"this machine's rates are those of tandem's compiled kernels, and {why}. See tandem doctor.")
    threads = torch.get_num_threads()
    call_s = least_s(_nothing())
    second, third = cache_bytes(CACHES)
    cached = threads * second, third
    memory, caches = _bandwidths(cached)
    rounding_s = _rounding(call_s, threads)
    tiles, ends = _tiles(call_s, rounding_s, threads)
    return Measured(
        machine=machine_name(),
        taken=time.strftime("%Y-%m-%d %H:%M"),
        threads=threads,
        memory_bytes=float(env.memory_bytes()[1]),
        cache_bytes=cached,
        read_bytes_s=memory["read"],
        read_one_bytes_s=memory["read by one"],
        write_bytes_s=memory["write"],
        cached_bytes_s=caches,
        flop_s=_large_products(),
        tile_s=tiles,
        tile_end_s=ends,
        number_s=_numbers(call_s, threads, tiles["bf16"], ends["bf16"]) | {"rounding": rounding_s},
        call_s=call_s,
        wait_s=_wait_s(),
    )


def least_s(run: Callable[[], Any], tries: int = TRIES) -> float:
    """Seconds of a call, of the best of several runs of as many calls as take LEAST_S."""
    run()
    start = time.perf_counter()
    run()
    times = max(1, int(LEAST_S / max(1e-7, time.perf_counter() - start)))
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(times):
            run()
        found.append((time.perf_counter() - start) / times)
    return min(found)


def cache_bytes(root: Path) -> tuple[float, float]:
    """A core's second level and the third as Linux tells them; 1 and 16 MiB where it does not."""
    sizes = {"2": float(1 << 20), "3": float(16 << 20)}
    for index in root.glob("cpu0/cache/index*"):
        try:
            level, text = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "size"))
        except OSError:
            continue
        if level in sizes and text[:-1].isdecimal():
            sizes[level] = float(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return sizes["2"], sizes["3"]


def _random(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape).bfloat16()


def _weight(rows: int, columns: int, dtype: torch.dtype | None = None) -> Weight:
    import torch

    from tandem.kernels.weight import Weight

    return Weight(torch.randn(rows, columns).to(dtype or torch.bfloat16), matrix=True)


def _nothing() -> Callable[[], Any]:
    """A kernel's call on two rows of sixteen numbers."""
    from tandem.kernels.swiglu import swiglu

    return partial(swiglu, _random(2, 32))


def _bandwidths(cached: tuple[float, float]) -> tuple[dict[str, float], tuple[float, float]]:
    """Of memory, and of the two caches, each read at half its size."""
    import torch

    wide, threads = torch.zeros(WIDE_BYTES // 4), torch.get_num_threads()

    def read(tensor: torch.Tensor) -> float:
        return tensor.nbytes / least_s(tensor.sum)

    memory = {"read": read(wide), "write": wide.nbytes / least_s(partial(wide.fill_, 1.0))}
    torch.set_num_threads(1)
    memory["read by one"] = read(wide)
    torch.set_num_threads(threads)
    second, third = (torch.zeros(int(size / 2) // 4) for size in cached)
    return memory, (read(second), read(third))


def _large_products() -> dict[str, float]:
    """2048 cubed, in each arithmetic."""
    import torch

    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("int8", torch.bfloat16)):
        x, weight = torch.randn(2048, 2048).to(dtype), _weight(2048, 2048, dtype)
        found[name] = 2 * 2048.0**3 / least_s(_product(x, weight, name == "int8"), 4)
    return found


def _product(x: torch.Tensor, weight: Weight, eights: bool) -> Callable[[], Any]:
    from tandem.kernels.eights import Eights
    from tandem.kernels.linear import linear

    if eights:
        return partial(Eights(weight.value).product, x)
    return partial(linear, x, weight)


def _rounding(call_s: float, threads: int) -> float:
    """Of a number of a row that becomes int8: what products of one panel a thread and of two have alike."""
    rows, width = 32 * threads, 1024
    one, two = (
        least_s(_product(_random(rows, width), _weight(64 * panels * threads, width), True)) for panels in (1, 2)
    )
    return max(0.0, 2 * one - two - call_s) * threads / (rows * width)


def _tiles(call_s: float, rounding_s: float, threads: int) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """Steps of tiles of 1 to ROWS rows, and the end of one of ROWS: of products of two depths, two panels a thread."""
    import torch

    from tandem.bench.measured import PAIR

    steps, ends = {}, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("int8", torch.bfloat16)):
        deep, rows, panels = 1024, 64 * ROWS, 2
        beside = rounding_s / threads if name == "int8" else 0.0
        taken = []
        for depth in (deep // 4, deep):
            x, weight = torch.randn(rows, depth).to(dtype), _weight(64 * panels * threads, depth, dtype)
            whole_s = least_s(_product(x, weight, name == "int8")) - call_s - beside * rows * depth
            taken.append(whole_s / (panels * rows / ROWS))
        whole = (taken[1] - taken[0]) / (deep - deep // 4) * PAIR[name]
        ends[name] = max(0.0, taken[1] - whole * deep / PAIR[name])
        each = []
        for few in range(1, ROWS):
            x, weight = torch.randn(few, deep // 2).to(dtype), _weight(64 * 8 * threads, deep // 2, dtype)
            whole_s = least_s(_product(x, weight, name == "int8"), 3 * TRIES) - call_s - beside * few * deep / 2
            tile = whole_s / 8
            each.append(max(0.0, tile - ends[name] * few / ROWS) / (deep / 2 / PAIR[name]))
        steps[name] = (*each, whole)
    return steps, ends


def _numbers(call_s: float, threads: int, tile_s: tuple[float, ...], end_s: float) -> dict[str, float]:
    """Seconds of one number in one thread, where all compute and what they touch lies in the second level."""
    import torch

    from tandem.kernels.linear import linear
    from tandem.kernels.norm import rms_norm
    from tandem.kernels.swiglu import swiglu
    from tandem.kernels.weight import Weight

    def of(run: Callable[[], Any], numbers: float) -> float:
        return max(0.0, least_s(run) - call_s) * threads / numbers

    rows, width = 32 * threads, 1024
    x, ones = _random(rows, width), Weight(torch.ones(width).bfloat16(), matrix=False)
    both, table = _random(rows, 2 * width), _random(4 * rows, width)
    ids = torch.arange(rows)
    found = {
        "norm": of(partial(rms_norm, x, ones, 1e-6), x.numel()),
        "swiglu": of(partial(swiglu, both), x.numel()),
        "copy": of(lambda: table[ids], x.numel()),
        **_rotations(of, threads),
        **_backwards(of, x, both, ones),
        "turn": _turn(call_s, threads, tile_s[0]),
        **_optimiser(of, threads),
        **_gradients_in_8_bits(call_s, threads),
    }
    weight = _weight(512, width)
    found["packing"] = of(weight.repack, weight.value.numel())
    del linear
    found |= _heads(threads, tile_s[ROWS - 1], end_s, found["turn"])
    return found | _attentions(call_s, threads, tile_s)


def _rotations(of: Callable[..., float], threads: int) -> dict[str, float]:
    """Of heads of 64 channels; and with keys and values stored into pages."""
    import torch

    from tandem.kernels.page_pool import KvPool, rotate_store_
    from tandem.kernels.rotary import rotate_

    rows, heads = 32 * threads, 16
    x, places = _random(rows, heads, 64), torch.arange(rows)
    tables = torch.randn(rows, 32), torch.randn(rows, 32)
    qkv = _random(rows, heads * 64).view(rows, heads, 64)
    cut = qkv[:, : heads - 8], qkv[:, heads - 8 : heads - 4], qkv[:, heads - 4 :]
    pool = KvPool(-(-rows // 16), 16, 4, 64, torch.bfloat16)
    return {
        "rotation": of(partial(rotate_, x, places, *tables), x.numel()),
        "rotate and store": of(partial(rotate_store_, cut, places, tables, places, pool), qkv.numel()),
    }


def _backwards(of: Callable[..., float], x: torch.Tensor, both: torch.Tensor, ones: Weight) -> dict[str, float]:
    import torch

    from tandem.kernels.build.load import kernel

    rows, width = x.shape
    norm = kernel("layer", "norm_backward", torch.bfloat16, "ppppppii")
    feed = kernel("layer", "swiglu_backward", torch.bfloat16, "ppppii")
    assert norm is not None and feed is not None
    out, sums, rstd, act = torch.empty_like(x), torch.zeros(width), torch.ones(rows), torch.empty_like(both)
    found = {
        "norm backward": of(
            lambda: norm(
                x.data_ptr(), x.data_ptr(), ones.value.data_ptr(), rstd.data_ptr(), out.data_ptr(), sums.data_ptr(),
                rows, width,
            ),
            x.numel(),
        ),
        "swiglu backward": of(
            lambda: feed(x.data_ptr(), both.data_ptr(), act.data_ptr(), out.data_ptr(), rows, width), x.numel()
        ),
    }  # fmt: skip
    return found


def _turn(call_s: float, threads: int, step_s: float) -> float:
    """Of a matrix that becomes the depth of panels: an input's gradient of one row, less its product."""
    from tandem.kernels.gradient import input_gradient

    rows, width = 256 * threads, 512
    weight, dy = _weight(rows, width), _random(1, rows)
    product_s = width / 64 * rows / 2 * step_s / threads
    return max(0.0, least_s(partial(input_gradient, dy, weight)) - call_s - product_s) * threads / (rows * width)


def _optimiser(of: Callable[..., float], threads: int) -> dict[str, float]:
    import torch

    from tandem.kernels.adamw import Hyper, adamw, adamw_few, few_of, grad_norm

    numbers = threads << 16  # a chunk a thread
    master, first, second, grad = (torch.zeros(numbers) for _ in range(4))
    value = torch.zeros(numbers).bfloat16()
    hyper = Hyper(lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    few = {
        ", ".join(("AdamW", *["moments in 8 bits"] * eights, *["no masters"] * (not masters))): of(
            partial(adamw_few, few_of(value, eights=eights, masters=masters), grad, value, hyper, 1), numbers
        )
        for eights, masters in ((True, True), (False, False), (True, False))
    }
    return few | {
        "AdamW": of(partial(adamw, master, first, second, grad, value, hyper), numbers),
        "gradient norm": of(partial(grad_norm, [grad]), numbers),
    }


def _gradients_in_8_bits(call_s: float, threads: int) -> dict[str, float]:
    """Of a number of a matrix or of rows that is rounded by columns; and of a gradient's, up by chance: what products
    of one panel a thread and of two have alike."""
    from tandem.kernels.eights_gradient import input_gradient, turned

    rows, width = 32 * threads, 1024
    value = _random(width, 64 * threads)
    held, taken = turned(value), []
    column_s = max(0.0, least_s(partial(turned, value, held)) - call_s) * threads / value.numel()
    for panels in (1, 2):
        matrix = turned(_random(width, 64 * panels * threads))
        taken.append(least_s(partial(input_gradient, _random(rows, width), matrix)))
    drawn_s = max(0.0, 2 * taken[0] - taken[1] - call_s) * threads / (rows * width)
    return {"rounding of columns": column_s, "drawn rounding": drawn_s}


def _heads(threads: int, step_s: float, end_s: float, turn_s: float) -> dict[str, float]:
    """Of a logit of a draw, of a log-prob and of its gradients, less the products."""
    import torch

    from tandem.kernels.head import draw
    from tandem.kernels.logprob import token_logprobs
    from tandem.kernels.sample import SamplingBatch
    from tandem.types import Sampling

    rows, vocab, depth = 32 * ROWS, 1024 * threads, 256
    weight, hidden, targets = _weight(vocab, depth), _random(rows, depth), torch.zeros(rows, dtype=torch.int64)
    weight.grad = torch.zeros(vocab, depth)
    batch = SamplingBatch.stack([Sampling()] * rows, seeds=list(range(rows)), positions=[7] * rows)
    needs = hidden.clone().requires_grad_()

    def forward() -> torch.Tensor:
        return token_logprobs(needs, weight, targets, 1.0)[0].sum()

    scored = least_s(forward)
    taken = least_s(partial(draw, hidden, weight, batch)), scored, least_s(lambda: forward().backward()) - scored
    logits = float(rows * vocab)
    product_s = (depth / 2 * step_s + end_s) / (ROWS * 64)  # of a logit in one thread
    backward_s = 2 * product_s + turn_s * depth / rows
    own = (product_s, product_s, backward_s)
    names = ("draw", "log-prob", "log-prob backward")
    return {name: max(0.0, one * threads / logits - less) for name, one, less in zip(names, taken, own, strict=True)}


def _attentions(call_s: float, threads: int, tile_s: tuple[float, ...]) -> dict[str, float]:
    """Of six queries a key head at 512 positions, their keys in a cache; backward of two sizes of heads."""
    import torch

    from tandem.kernels.attention import paged_attention
    from tandem.kernels.page_pool import KvPool
    from tandem.kernels.paths import Paths

    positions, size, sequences = 512, 16, 16 * threads
    pool = KvPool(positions // 16, 16, 1, size, torch.bfloat16)
    for tensor in (pool.keys, pool.values):
        tensor.copy_(torch.randn(tensor.shape))
    pages = list(range(positions // 16))
    paths = Paths.build(list(range(sequences + 1)), [positions - 1] * sequences, [pages] * sequences, 16)
    taken = least_s(partial(paged_attention, _random(sequences, ROWS, size), pool, paths)) - call_s
    scores = sequences * ROWS * positions
    softmax = taken * threads / scores - tile_s[ROWS - 1] * size / (ROWS * 64)
    # A head of D channels: a D + b.
    of_size = {channels: _attention_backward(channels, threads) for channels in (32, 96)}
    channel = (of_size[96] - of_size[32]) / 64
    return {
        "softmax": max(0.0, softmax),
        "attention backward, a channel": max(0.0, channel),
        "attention backward, a score": max(0.0, of_size[32] - 32 * channel),
    }


def _attention_backward(channels: int, threads: int) -> float:
    """Seconds a score in one thread, of sequences of 256 tokens."""
    import torch

    from tandem.bench.operations import scores_of
    from tandem.kernels.attention import attention, attention_backward
    from tandem.models.view import PackView
    from tandem.types import Reach

    length, sequences, heads = 256, 2 * threads, 3
    rows = length * sequences
    paths = PackView([length * place for place in range(sequences + 1)]).paths
    qkv = _random(rows, heads, channels), _random(rows, 1, channels), _random(rows, 1, channels)
    lse = torch.empty(rows, heads)
    grads = torch.empty_like(qkv[0]), torch.empty_like(qkv[1]), torch.empty_like(qkv[2])
    out = attention(*qkv, paths, lse_TH=lse)
    taken = least_s(partial(attention_backward, _random(rows, heads, channels), out, lse, qkv, grads, paths))
    return taken * threads / (sequences * heads * scores_of(Reach(), 0, length))


def _wait_s() -> float:
    """Of an operation of an engine's pass that has next to nothing to do: decode steps of models of 8 and 72 layers."""
    import random

    from tandem.bench.gpu import LLAMA_1B, engine_on, random_decoder
    from tandem.bench.sweep import start_decoding, stop_decoding

    taken = []
    for layers in (8, 72):
        spec = _tiny(LLAMA_1B, layers)
        engine = engine_on(random_decoder(spec, "cpu"), 1024)
        start_decoding(engine, 1, 16, 200, random.Random(0))
        taken.append(least_s(engine.step, 3))
        stop_decoding(engine)
    return max(0.0, (taken[1] - taken[0]) / (64 * 8))


def _tiny(spec: Any, layers: int) -> Any:
    from dataclasses import replace

    return replace(spec, vocab_size=64, width=64, ff_width=64, layers=layers, heads=2, kv_heads=1, head_size=32)
