"""An objective over whole distributions, as a teacher's, that the learner cannot drive or gives another gradient."""

from __future__ import annotations

from typing import Any

import torch

from tandem.algo.loss import LossResult
from tandem.algo.objective import Outputs
from tandem.algo.pack import count_prompts, pack
from tandem.algo.supervised import NextToken
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.columns import Columns
from tandem.train.config import LearnerConfig
from tandem.train.score import forward
from tandem.train.step import Learner
from tandem.types import Sample


class Taught(NextToken):
    """KL(teacher || student) of each trained token, over the vocabulary: sum_v q log(q / p)."""

    def __init__(self, teacher_NV: torch.Tensor) -> None:
        self.teacher_NV = teacher_NV

    def begin(self) -> Taught:
        return self

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        student_NV = outputs.logits().log_softmax(-1)
        loss = (self.teacher_NV * (self.teacher_NV.log() - student_NV)).sum().double() / batch.denominators.tokens
        sums: dict[str, Any] = {"loss": loss.detach(), "tokens": torch.tensor(float(len(student_NV)))}
        return LossResult(loss, sums, {}, None)


def test_gradient_of_a_teachers_distribution(make_decoder) -> None:
    """The head's gradient is not sum over tokens of (p - q) x hidden, or nothing of it reaches the layers below."""
    decoder = make_decoder()
    tokens = (5, 9, 2, 7, 3, 11)
    columns = Columns.of(tokens=tokens, loss_mask=[False] * 2 + [True] * 4)
    samples = [Sample("p/0", "p", columns)]
    (microbatch,) = pack(samples, count_prompts(samples), 64)
    vocab = decoder.spec.vocab_size
    teacher_NV = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1)).softmax(-1)
    learner = Learner(decoder, LearnerConfig(), Taught(teacher_NV), 1)
    learner.backward(microbatch)
    with torch.no_grad():
        outputs = forward(decoder, microbatch, to_tensors(microbatch), 1.0)
        off_NV = (outputs.hidden_NM.double() @ decoder.head.value.double().T).softmax(-1) - teacher_NV
        wanted = off_NV.T @ outputs.hidden_NM.double() / 4
    assert decoder.head is not decoder.embed and decoder.head.grad is not None
    torch.testing.assert_close(decoder.head.grad.double(), wanted, rtol=1e-4, atol=1e-6)
    below = [weight.grad for name, weight in decoder.weights() if name.startswith("layers.0")]
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in below)
