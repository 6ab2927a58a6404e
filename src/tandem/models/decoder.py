"""The one decoder: packed tokens against a view of keys and values, for engine and learner alike.

Pre-norm layers of grouped-query attention and SwiGLU. The q, k, v projections are one matrix, gate and up are one
matrix; `load` and `export` translate to and from the Hugging Face names and layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from tandem.errors import ConfigError, ModelError
from tandem.kernels.address import check_range
from tandem.kernels.choice import backend
from tandem.kernels.linear import linear, logits
from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu_down
from tandem.kernels.weight import Weight
from tandem.models.config import Kernels
from tandem.models.recompute import recompute
from tandem.models.rope import query_factors, rope_tables
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, View

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


class Layer:
    """Weights of one layer."""

    __slots__ = ("down", "feed_norm", "gate_up", "k_norm", "norm", "out", "q_norm", "qkv", "qkv_bias")

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        def matrix(rows: int, columns: int) -> Weight:
            return Weight(torch.zeros(rows, columns, dtype=dtype, device=device), matrix=True)

        def vector(size: int) -> Weight:
            return Weight(torch.zeros(size, dtype=dtype, device=device), matrix=False)

        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_size
        self.norm, self.feed_norm = vector(spec.width), vector(spec.width)
        self.qkv = matrix(rows, spec.width)
        self.qkv_bias = vector(rows) if spec.attention_bias else None
        self.q_norm = vector(spec.head_size) if spec.qk_norm else None
        self.k_norm = vector(spec.head_size) if spec.qk_norm else None
        self.out = matrix(spec.width, spec.heads * spec.head_size)
        self.gate_up = matrix(2 * spec.ff_width, spec.width)
        self.down = matrix(spec.width, spec.ff_width)


class Decoder:
    """A decoder-only transformer in one compute dtype.

    >>> # Decoder(spec, "bfloat16").load(checkpoint.tensors()).forward(tokens_T, view)
    """

    def __init__(self, spec: ModelSpec, dtype: str, device: str = "cpu", kernels: Kernels = "exact") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"model.device is 'cuda', and torch {torch.__version__} sees no CUDA device here. Set model.device to "
                "'cpu', or install a driver and a CUDA build of torch."
            )
        self.spec = spec
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        cos_PD, sin_PD = rope_tables(spec, spec.max_position)
        self.tables = (cos_PD.to(self.device), sin_PD.to(self.device))
        self.heads = self._heads()

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        self.embed = Weight(zeros(spec.vocab_size, spec.width), matrix=spec.tied_embeddings)
        self.layers = [Layer(spec, self.dtype, self.device) for _ in range(spec.layers)]
        self.norm = Weight(zeros(spec.width), matrix=False)
        self.head = self.embed
        if not spec.tied_embeddings:
            self.head = Weight(zeros(spec.vocab_size, spec.width), matrix=True)
        for _, weight in self.weights():
            weight.library = kernels == "library"

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
            )
            for layer in spec.layer_attention
        )

    @property
    def compiled(self) -> bool:
        """Whether its products run on compiled kernels; the reference ones are not batch-invariant."""
        weight = self.layers[0].qkv
        return weight.packed is not None or weight.codes is not None or backend(weight.value) == "triton"

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each weight once, by a name of the decoder's own."""
        yield "embed", self.embed
        for index, layer in enumerate(self.layers):
            for name in Layer.__slots__:
                weight = getattr(layer, name)
                if weight is not None:
                    yield f"layers.{index}.{name}", weight
        yield "norm", self.norm
        if self.head is not self.embed:
            yield "head", self.head

    def _names(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names with the views of `weights` that hold them."""
        spec = self.spec
        q_rows, kv_rows = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        cuts = {"q_proj": (0, q_rows), "k_proj": (q_rows, kv_rows), "v_proj": (q_rows + kv_rows, kv_rows)}
        yield "model.embed_tokens.weight", self.embed.value
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", layer.norm.value
            for name, (start, rows) in cuts.items():
                yield f"{prefix}.self_attn.{name}.weight", layer.qkv.value.narrow(0, start, rows)
                if layer.qkv_bias is not None:
                    yield f"{prefix}.self_attn.{name}.bias", layer.qkv_bias.value.narrow(0, start, rows)
            if layer.q_norm is not None and layer.k_norm is not None:
                yield f"{prefix}.self_attn.q_norm.weight", layer.q_norm.value
                yield f"{prefix}.self_attn.k_norm.weight", layer.k_norm.value
            yield f"{prefix}.self_attn.o_proj.weight", layer.out.value
            yield f"{prefix}.post_attention_layernorm.weight", layer.feed_norm.value
            yield f"{prefix}.mlp.gate_proj.weight", layer.gate_up.value.narrow(0, 0, spec.ff_width)
            yield f"{prefix}.mlp.up_proj.weight", layer.gate_up.value.narrow(0, spec.ff_width, spec.ff_width)
            yield f"{prefix}.mlp.down_proj.weight", layer.down.value
        yield "model.norm.weight", self.norm.value
        if self.head is not self.embed:
            yield "lm_head.weight", self.head.value

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Decoder:
        """Copy every tensor in, by Hugging Face name. ModelError for one that is missing, unknown or misshapen.

        Matrices whose values are held as codes alone (models/codes.py) are left as they are.
        """
        wanted = {name: tensor for name, tensor in self._names() if not tensor.is_meta}
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
        return self._names()

    def repack(self) -> None:
        """After the values changed: derive what the products read."""
        for _, weight in self.weights():
            weight.repack()

    def _qkv(self, layer: Layer, hidden_TM: torch.Tensor) -> torch.Tensor:
        qkv_TW = linear(rms_norm(hidden_TM, layer.norm, self.spec.norm_eps), layer.qkv, layer.qkv_bias)
        if layer.q_norm is None or layer.k_norm is None:
            return qkv_TW
        rows, size = qkv_TW.shape[0], self.spec.head_size
        query, key, value = self.heads[0].cut(qkv_TW)
        normed = [
            rms_norm(x.reshape(-1, size), weight, self.spec.norm_eps).view(rows, -1)
            for x, weight in ((query, layer.q_norm), (key, layer.k_norm))
        ]
        return torch.cat([*normed, value.reshape(rows, -1)], 1)

    def _layer(self, index: int, hidden_TM: torch.Tensor, view: View) -> torch.Tensor:
        layer = self.layers[index]
        attended_TW = view.attend(index, self._qkv(layer, hidden_TM), self.heads[index], self.tables)
        hidden_TM = linear(attended_TW, layer.out, None, hidden_TM)
        gate_up_TF = linear(rms_norm(hidden_TM, layer.feed_norm, self.spec.norm_eps), layer.gate_up)
        return swiglu_down(gate_up_TF, layer.down, hidden_TM)

    def forward(
        self, tokens_T: torch.Tensor, view: View, rows_N: torch.Tensor | None = None, *, checkpointing: bool = False
    ) -> torch.Tensor:
        """Final hidden states, normed: [T, M], or [N, M] of `rows_N`. Tokens and rows are int64.

        With gradients enabled the result is differentiable; `checkpointing` keeps one hidden state a layer and runs
        the layer again in the backward pass.
        """
        self.check_ids(tokens_T, view)
        if torch.is_grad_enabled():
            hidden_TM = _Embed.apply(torch.zeros((), requires_grad=True), self.embed, tokens_T)
        else:
            hidden_TM = self.embed.value[tokens_T]
        for index in range(len(self.layers)):
            if checkpointing and torch.is_grad_enabled():
                hidden_TM = recompute(partial(self._layer, index, view=view), hidden_TM)
            else:
                hidden_TM = self._layer(index, hidden_TM, view)
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
