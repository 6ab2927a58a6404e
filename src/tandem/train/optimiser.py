"""AdamW state of a decoder: fp32 master weights and moments beside the compute weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tandem.errors import CheckpointError
from tandem.kernels.adamw import Hyper, adamw, grad_norm
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.train.config import LearnerConfig

PARTS = ("master", "first", "second")


class Optimiser:
    """Owns the gradients too: it allocates `Weight.grad` for every weight of the decoder."""

    def __init__(self, decoder: Decoder, config: LearnerConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.updates = 0
        self.state: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for name, weight in decoder.weights():
            master = weight.value.to(torch.float32, copy=True)
            self.state[name] = (master, torch.zeros_like(master), torch.zeros_like(master))
            weight.grad = torch.zeros_like(master)

    def _weights(self) -> Iterator[tuple[str, Weight, torch.Tensor]]:
        for name, weight in self.decoder.weights():
            assert weight.grad is not None
            yield name, weight, weight.grad

    def zero_grad(self) -> None:
        for _, _, grad in self._weights():
            grad.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients; not finite where one of them is not."""
        return grad_norm([grad for _, _, grad in self._weights()])

    def step(self, lr: float, norm: float) -> None:
        """One AdamW update with gradients scaled to `grad_clip` where `norm` exceeds it; rounds into the decoder."""
        config = self.config
        self.updates += 1
        scale = min(1.0, config.grad_clip / norm) if norm > 0 else 1.0
        for name, weight, grad in self._weights():
            decay = config.weight_decay if weight.value.dim() == 2 else 0.0
            hyper = Hyper(lr, config.beta1, config.beta2, config.eps, decay, self.updates, scale)
            master, first, second = self.state[name]
            adamw(master, first, second, grad, weight.value, hyper)
        self.decoder.repack()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State by name, "master/layers.0.qkv" and so on."""
        for name, parts in self.state.items():
            for part, tensor in zip(PARTS, parts, strict=True):
                yield f"{part}/{name}", tensor

    def load(self, tensors: Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]], updates: int) -> None:
        """Take over saved state, and round the master weights into the decoder."""
        wanted = dict(self.tensors())
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            target = wanted.pop(name, None)
            if target is None or target.shape != tensor.shape:
                raise CheckpointError(f"optimiser state {name} {tuple(tensor.shape)} does not belong to this model.")
            target.copy_(tensor)
        if wanted:
            raise CheckpointError(f"the optimiser state lacks {len(wanted)} tensors, {next(iter(wanted))} first.")
        self.updates = updates
        for name, weight in self.decoder.weights():
            weight.value.copy_(self.state[name][0])
        self.decoder.repack()
