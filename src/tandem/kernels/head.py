"""The next token of final hidden states, their logits never written: output head, log-sum-exp and sampler in one pass.

Rows without top-k, top-p and min-p need only the best noisy score and the log-sum-exp, both of which blocks of the
vocabulary give in any order (sample.h). So a block of 256 logits lives in the cache and nowhere else. Same bits as
`sample` on the logits.

64 rows x 49,152 tokens of 576 channels in bf16, two Zen 5 cores: 5.4 ms; the logits, then `sample`: 7.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.finite import raise_if_bad
from tandem.kernels.linear import logits
from tandem.kernels.sample import SamplingBatch, sample
from tandem.kernels.weight import Weight, matrix_addresses
from tandem.numerics.random import Stream


def draw(hidden_SM: Tensor, weight: Weight, batch: SamplingBatch, stream: int = Stream.TARGET) -> tuple[Tensor, Tensor]:
    """`sample(logits(hidden, weight), batch)`: tokens [S] (int64), log-probs [S] (fp32, nats). Raises as it.

    A batch with a row that filters or has a mask (`SamplingBatch.plain`) is drawn by `sample`, which needs that row
    whole. To draw the others here would read the head's weights twice, which costs what it saves.
    """
    if backend(hidden_SM) == "triton":
        return sample(logits(hidden_SM, weight), batch, stream)
    run = kernel("head", "draw", hidden_SM.dtype, "pippiiipppippp" + "i")
    ready = weight.packed is not None or weight.codes is not None
    if run is None or not ready or hidden_SM.shape[1] % 2 or not batch.plain:
        return sample(logits(hidden_SM, weight), batch, stream)
    rows, (vocab, depth) = len(batch), weight.value.shape
    tokens_S, logprobs_S = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    bad = torch.empty(1, dtype=torch.int64)
    keys = (batch.temperature_S.ctypes.data, batch.seeds_S.ctypes.data, batch.positions_S.ctypes.data, int(stream))
    out = (tokens_S.data_ptr(), logprobs_S.data_ptr(), bad.data_ptr(), int(weight.narrow))
    hidden = rows_address(hidden_SM, weight.value.dtype, rows, depth)
    run(hidden, hidden_SM.stride(0), *matrix_addresses(weight), rows, vocab, depth, *keys, *out)
    if int(bad) >= 0:
        raise_if_bad(logits(hidden_SM, weight), int(bad))
    return tokens_S, logprobs_S
