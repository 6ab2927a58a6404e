"""AdamW state of a model: fp32 master weights and moments beside the compute weights, or away from them.

learner.optimiser_offload: "host" keeps the state beside the CPU and updates there; "disk" keeps it in a mapped file of
the cache folder, of which a slice is in memory at a time. The CPU's kernel gives the same bits either way.
learner.moments and learner.masters keep less of weights in bf16: 6 bytes of 12 a number, 8, or 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from tandem import env
from tandem.errors import CheckpointError
from tandem.kernels.adamw import Few, Hyper, adamw, adamw_few, few_of, grad_norm
from tandem.kernels.large import large, release_memory
from tandem.kernels.weight import Weight
from tandem.train.config import SLICE, LearnerConfig
from tandem.train.offload import FileTensors

PARTS = ("master", "first", "second")


class Trained(Protocol):
    """A decoder, or a critic."""

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each weight once, by name, always in this order."""
        ...

    def repack(self) -> None:
        """What is derived from the values follows their change."""
        ...


class Optimiser:
    """Owns the gradients too: it allocates `Weight.grad` for every weight of the model.

    On the host they take memory from what is first added to them until `zero_grad`.
    """

    def __init__(self, model: Trained, config: LearnerConfig) -> None:
        self.model = model
        self.config = config
        self.updates = 0
        self.state: dict[str, Few | tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._file: FileTensors | None = None
        if config.optimiser_offload == "disk":
            sizes = [weight.value.numel() for _, weight in model.weights()]
            self._file = FileTensors(env.cache_dir(), len(PARTS) * sum(sizes), len(PARTS) * len(sizes))
        for name, weight in model.weights():
            assert weight.codes is None or weight.rounding, f"{name} is served from codes"
            if config.keeps_less and weight.value.dtype == torch.bfloat16:
                eights, masters = config.moments == "float8", config.masters == "float32"
                self.state[name] = few_of(weight.value, eights=eights, masters=masters)
            else:
                master, first, second = (self._zeros(weight.value) for _ in PARTS)
                self.state[name] = (master.copy_(weight.value), first, second)
            weight.grad = large(*weight.value.shape, dtype=torch.float32, device=weight.value.device)
            self._release()
        self.zero_grad()

    def _zeros(self, value: torch.Tensor) -> torch.Tensor:
        if self._file is not None:
            return self._file.take(value.shape)
        place = "cpu" if self.config.optimiser_offload == "host" else value.device
        return torch.zeros(value.shape, dtype=torch.float32, device=place)

    def _release(self) -> None:
        if self._file is not None:
            self._file.release()

    def _weights(self) -> Iterator[tuple[str, Weight, torch.Tensor]]:
        for name, weight in self.model.weights():
            assert weight.grad is not None
            yield name, weight, weight.grad

    def zero_grad(self) -> None:
        release_memory(grad for _, _, grad in self._weights())

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients; not finite where one of them is not."""
        return grad_norm([grad for _, _, grad in self._weights()])

    def step(
        self, lr: float, norm: float, others: Mapping[str, float] = MappingProxyType({}), unit: float = 1.0
    ) -> None:
        """One AdamW update with gradients scaled to `grad_clip` where `norm` exceeds it; rounds into the model.

        `others`: rates of weights, by name, that `lr` is not for. The gradients are `unit` times what lies in the
        weights; `norm` is theirs.
        """
        config = self.config
        self.updates += 1
        scale = unit * min(1.0, config.grad_clip / norm) if norm > 0 else unit
        for number, (name, weight, grad) in enumerate(self._weights()):
            decay = config.weight_decay if weight.value.dim() == 2 else 0.0
            hyper = Hyper(others.get(name, lr), config.beta1, config.beta2, config.eps, decay, self.updates, scale)
            state = self.state[name]
            if isinstance(state, Few):
                adamw_few(state, grad, weight.value, hyper, number)
            else:
                self._update(state, grad, weight.value, hyper)
        self.model.repack()

    def _update(self, state: tuple[torch.Tensor, ...], grad: torch.Tensor, value: torch.Tensor, hyper: Hyper) -> None:
        """A weight, SLICE numbers at a time where its state does not lie beside it: AdamW knows no neighbours."""
        master, first, second = (tensor.view(-1) for tensor in state)
        grad, value = grad.view(-1), value.view(-1)
        if self.config.optimiser_offload == "none":
            adamw(master, first, second, grad, value, hyper)
            return
        for start in range(0, len(master), SLICE):
            part = slice(start, start + SLICE)
            rounded = torch.empty(len(master[part]), dtype=value.dtype)
            adamw(master[part], first[part], second[part], grad[part].to("cpu"), rounded, hyper)
            value[part] = rounded
            self._release()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State by name, "master/layers.0.qkv" and so on. On disk: in memory until the next one is asked for."""
        for name, parts in self.state.items():
            for part, tensor in zip(Few._fields if isinstance(parts, Few) else PARTS, parts, strict=True):
                if tensor is not None:
                    yield f"{part}/{name}", tensor
                    self._release()

    def load(self, tensors: Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]], updates: int) -> None:
        """Take over saved state, and round the master weights into the model."""
        wanted = dict(self.tensors())
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            target = wanted.pop(name, None)
            if target is None or target.shape != tensor.shape:
                raise CheckpointError(f"optimiser state {name} {tuple(tensor.shape)} does not belong to this model.")
            target.copy_(tensor)
            self._release()
        if wanted:
            raise CheckpointError(f"the optimiser state lacks {len(wanted)} tensors, {next(iter(wanted))} first.")
        self.updates = updates
        for name, weight in self.model.weights():
            weight.value.copy_(self.state[name][0])
            self._release()
        self.model.repack()
