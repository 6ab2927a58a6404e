"""The one decoder: packed tokens against a view of keys and values, for engine and learner alike.

Layers of two parts each (layer.py) between an embedding and a head. `load` and `export` translate to and from the
Hugging Face names and layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from tandem.errors import ConfigError, ModelError
from tandem.kernels import selfcheck  # noqa: F401  (registers what every kernel is checked by when it is loaded)
from tandem.kernels.address import check_range
from tandem.kernels.choice import backend
from tandem.kernels.linear import logits
from tandem.kernels.norm import rms_norm
from tandem.kernels.rounding import NOT_ROUNDED, Kept, Rounding, kept_of, rounding_of
from tandem.kernels.weight import Weight
from tandem.models.config import Kernels, ModelConfig
from tandem.models.layer import Layer, views
from tandem.models.parts import Slot, outer_slots
from tandem.models.recompute import recompute
from tandem.models.rope import query_factors, rope_tables
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, View

if TYPE_CHECKING:
    from tandem.models.adapter import AdapterSet

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, weight, tokens_T):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        ctx.save_for_backward(tokens_T)
        return weight.value[tokens_T]

    @staticmethod
    def backward(ctx, dh_TM):  # type: ignore[no-untyped-def]
        (tokens_T,) = ctx.saved_tensors
        if ctx.weight.grad is not None:
            if tokens_T.is_cuda:  # index_add_ would add in another order each time
                ctx.weight.grad.index_put_((tokens_T,), dh_TM.float(), accumulate=True)
            else:
                ctx.weight.grad.index_add_(0, tokens_T, dh_TM.float())
        return torch.zeros(()), None, None


def decoder_of(spec: ModelSpec, model: ModelConfig, dtype: str = "") -> Decoder:
    """The decoder that a config asks for, or in another dtype than it says; without weights. ConfigError where this
    machine has no such."""
    asked = rounding_of(model.weights), kept_of(model.kv)
    made = Decoder(spec, dtype or model.dtype, model.device, model.kernels, *asked)
    made.head.narrow = model.logits == "bfloat16"
    return made


class Decoder:
    """A decoder-only transformer in one compute dtype.

    >>> # Decoder(spec, "bfloat16").load(checkpoint.tensors()).forward(tokens_T, view)
    """

    adapter: AdapterSet | None = None  # added to all rows, and learned in place of the weights

    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        device: str = "cpu",
        kernels: Kernels = "exact",
        rounding: Rounding = NOT_ROUNDED,
        kept: Kept | None = None,
    ) -> None:
        """rounding: of the layers' matrices where they are multiplied, and of the rows; weights stay as they are. kept:
        what keys and values are rounded to."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"model.device is 'cuda', and torch {torch.__version__} sees no CUDA device here. Set model.device to "
                "'cpu', or install a driver and a CUDA build of torch."
            )
        self.spec, self.kept = spec, kept
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        cos_PD, sin_PD = rope_tables(spec, spec.max_position)
        self.tables = (cos_PD.to(self.device), sin_PD.to(self.device))

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        self._outer = embed, norm, head = outer_slots(spec)
        self.embed = Weight(zeros(*embed.shape), matrix=head is embed, zero=True)
        self.layers = [Layer(spec, index, heads, zeros) for index, heads in enumerate(self._heads())]
        self.norm = Weight(zeros(*norm.shape), matrix=False)
        self.head = self.embed if head is embed else Weight(zeros(*head.shape), matrix=True, zero=True)
        for _, weight in self.weights():
            weight.library = kernels == "library"
        if rounding:
            for layer in self.layers:
                for slot, weight in layer.weights():
                    if slot.columns is not None:
                        weight.multiply_rounded(rounding)

    def _heads(self) -> tuple[Heads, ...]:
        """Of each layer."""
        spec, factor_P = self.spec, None
        if spec.query_temperature is not None and not all(layer.rotary for layer in spec.attention):
            factor_P = query_factors(spec.query_temperature, spec.max_position).to(self.device)
        return tuple(
            Heads(
                spec.heads,
                spec.kv_heads,
                spec.head_size,
                layer.reach,
                layer.rotary,
                spec.norm_eps if spec.rotated_norm and layer.rotary else None,
                None if layer.rotary else factor_P,
                self.kept,
            )
            for layer in spec.layer_attention
        )

    @property
    def compiled(self) -> bool:
        """Whether its products run on compiled kernels; the reference ones are not batch-invariant."""
        weight = self.layers[0].mix.qkv
        return weight.packed is not None or weight.codes is not None or backend(weight.value) == "triton"

    @property
    def own_products(self) -> bool:
        """Whether its products are tandem's own kernels, and not a library's."""
        return self.compiled and not self.layers[0].mix.qkv.library

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each weight once, by a name of the decoder's own; gradient norms and weight hashes add in this order."""
        yield "embed", self.embed
        for layer in self.layers:
            named = {slot.name: weight for slot, weight in layer.weights()}
            for name in sorted(named):
                yield f"layers.{layer.index}.{name}", named[name]
        yield "norm", self.norm
        if self.head is not self.embed:
            yield "head", self.head

    def wear(self, adapter: AdapterSet | None) -> None:
        """Have an adapter's products added from now on, in place of another's; None: of none."""
        self.adapter = adapter
        for layer in self.layers:
            for slot, weight in layer.weights():
                name = f"layers.{layer.index}.{slot.name}"
                weight.adapter = None if adapter is None else adapter.matrices.get(name)

    @contextmanager
    def wearing(self, adapter: AdapterSet | None) -> Iterator[None]:
        """`wear` for the while."""
        worn = self.adapter
        self.wear(adapter)
        try:
            yield
        finally:
            self.wear(worn)

    def published(self) -> Iterator[tuple[str, Weight]]:
        """What training changes, as products read it: the weights, or what its adapter has."""
        return self.weights() if self.adapter is None else self.adapter.served()

    def freeze(self, *, head: bool = False) -> None:
        """Nothing but an adapter learns from now on: matrices keep the form that products read. The look-up of rows
        reads values, and so does the backward pass of the `head`, where there is one."""
        for _, weight in self.weights():
            if weight is not self.embed and not (head and weight is self.head):
                weight.serve()

    def slots(self) -> Iterator[tuple[Slot, Weight]]:
        """Each weight once with the names of its tensors, in the order of the forward pass."""
        embed, norm, head = self._outer
        yield embed, self.embed
        for layer in self.layers:
            yield from layer.weights()
        yield norm, self.norm
        if self.head is not self.embed:
            yield head, self.head

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Decoder:
        """Copy every tensor in, by Hugging Face name. ModelError for one that is missing, unknown or misshapen.

        Matrices whose values are held as codes alone (models/codes.py) are left as they are.
        """
        wanted = {name: tensor for name, tensor in self.export() if not tensor.is_meta}
        for name, tensor in tensors:
            target = wanted.pop(name, None)
            if target is None:
                if name == "lm_head.weight" and self.head is self.embed:
                    continue
                raise ModelError(f"tensor {name} is unknown to {self.spec.architecture}, or came twice.")
            if target.shape != tensor.shape:
                raise ModelError(
                    f"tensor {name} has shape {tuple(tensor.shape)}; the model needs {tuple(target.shape)}."
                )
            target.copy_(tensor)
        if wanted:
            raise ModelError(f"the checkpoint lacks {len(wanted)} tensors, {next(iter(wanted))} first.")
        self.repack()
        return self

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and tensors, sharing memory with the decoder."""
        for slot, weight in self.slots():
            yield from views(slot, weight)

    def repack(self) -> None:
        """After the values changed: derive what the products read."""
        for _, weight in self.weights():
            weight.repack()

    def forward(
        self,
        tokens_T: torch.Tensor,
        view: View,
        rows_N: torch.Tensor | None = None,
        *,
        checkpointing: bool = False,
        watch: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Final hidden states, normed: [T, M], or [N, M] of `rows_N`. Tokens and rows are int64.

        With gradients enabled the result is differentiable; `checkpointing` keeps one hidden state a layer and runs
        the layer again in the backward pass. `watch` is called with each layer's index and [T, M] behind it.
        """
        self.check_ids(tokens_T, view)
        if torch.is_grad_enabled():
            hidden_TM = _Embed.apply(torch.zeros((), requires_grad=True), self.embed, tokens_T)
        else:
            hidden_TM = self.embed.value[tokens_T]
        for layer in self.layers:
            forward = partial(layer.forward, view=view, tables=self.tables)
            if checkpointing and torch.is_grad_enabled():
                hidden_TM = recompute(forward, hidden_TM)
            else:
                hidden_TM = forward(hidden_TM)
            if watch is not None:
                watch(layer.index, hidden_TM)
        if rows_N is not None:
            hidden_TM = hidden_TM[rows_N]
        return rms_norm(hidden_TM, self.norm, self.spec.norm_eps)

    def check_ids(self, tokens_T: torch.Tensor, view: View) -> None:
        """AssertionError for a token without an embedding or a position without a rotation, beside the CPU."""
        check_range(tokens_T, self.spec.vocab_size, "tokens")
        check_range(view.positions_T, self.spec.max_position, "positions")

    def logits(self, hidden_NM: torch.Tensor) -> torch.Tensor:
        """[N, V] in fp32."""
        return logits(hidden_NM, self.head)
