"""An adapter of a decoder: low-rank additions to its matrices, in the places and under the names of PEFT.

An addition is of one linear layer as a checkpoint names it (`model.layers.0.self_attn.q_proj`); those that lie in one
matrix of the decoder are pieces of one `kernels.weight.Adapter`. A decoder wears one adapter, which the learner trains;
an engine serves several beside it, each with the rows that ask for it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandem.errors import ConfigError, ModelError
from tandem.kernels.forward import MATRICES, AdapterLayerArgs, AdapterMatrixArgs
from tandem.kernels.linear import product
from tandem.kernels.weight import Adapter, Piece, Strips, Weight
from tandem.models.config import PROJECTIONS, AdapterConfig
from tandem.models.parts import Slot
from tandem.numerics.random import Stream, uniform, word_rows

if TYPE_CHECKING:
    from tandem.models.decoder import Decoder


OUTSIDE = ("embed_tokens", "lm_head")  # PEFT adapts them too


class Base(NamedTuple):
    """The weights that an adapter is of."""

    source: str  # as ModelConfig's
    digest: str  # hash of the tensors, as the decoder has them


class Addition(NamedTuple):
    """To one linear layer: what a tensor of an adapter's file is of."""

    module: str  # the layer's full name
    matrix: str  # of the decoder, as its `weights` name it
    adapter: Adapter
    piece: Piece


class AdapterSet:
    """Of one decoder, in its dtype: zeros until `load` or `draw`. ConfigError where the decoder's products take none.

    >>> # decoder.wear(AdapterSet(decoder, AdapterConfig(rank=16)).draw(seed=0))
    """

    def __init__(self, decoder: Decoder, config: AdapterConfig, name: str = "") -> None:
        self.name, self.config = name, config
        self.base = Base("", "")
        self.matrices: dict[str, Adapter] = {}
        self.layers = len(decoder.layers)
        self._layer_args: ctypes.Array[AdapterLayerArgs] | None = None
        self.additions: list[Addition] = []
        self._bases: dict[str, Weight] = {}
        self._check(decoder)
        for layer in decoder.layers:
            for slot, weight in layer.weights():
                if slot.columns is not None:
                    self._take(slot, f"layers.{layer.index}.{slot.name}", weight, decoder.dtype)

    def _check(self, decoder: Decoder) -> None:
        if decoder.device.type != "cpu" or decoder.head.library or decoder.dtype == torch.float16:
            raise ConfigError(
                f"adapters are computed on the CPU, by tandem's own kernels, in bfloat16 or float32; this model is on "
                f"{decoder.device.type} in {str(decoder.dtype).removeprefix('torch.')}"
                f"{' with model.kernels=library' if decoder.head.library else ''}. Change that, or leave the adapter "
                "out."
            )

    def _take(self, slot: Slot, matrix: str, weight: Weight, dtype: torch.dtype) -> None:
        """The additions to the tensors of a slot, where they are targets."""
        assert slot.columns is not None
        found, first, start = list[tuple[str, Piece]](), 0, 0
        for stored in slot.stored:
            module = stored.name.removesuffix(".weight")
            size = self.config.size(module)
            if size is not None:
                rank, alpha = size
                up = Weight(torch.zeros(stored.rows, rank, dtype=dtype), matrix=True)
                magnitude = Weight(torch.ones(stored.rows), matrix=False) if self.config.dora else None
                found.append((module, Piece(first, start, self.config.scale(rank, alpha), up, magnitude)))
                start += rank + rank % 2
            first += stored.rows
        if not found:
            return
        down = Strips(torch.zeros(start, slot.columns, dtype=dtype))
        factor = Weight(torch.ones(slot.rows), matrix=False) if self.config.dora else None
        adapter = Adapter(down, tuple(piece for _, piece in found), factor)
        self.matrices[matrix], self._bases[matrix] = adapter, weight
        self.additions += [Addition(module, matrix, adapter, piece) for module, piece in found]

    def draw(self, seed: int) -> AdapterSet:
        """A uniform in +- 1 / sqrt(inputs), as PEFT has it (Kaiming's with a = sqrt 5); B is zero, so nothing is added.

        ConfigError where a target is no linear layer of the decoder.
        """
        for target in self._unmatched():
            raise ConfigError(
                f"adapter.targets names {target}, and no linear layer of this model ends in it. Allowed: "
                f"{', '.join(PROJECTIONS)}, and longer ends of a layer's name."
            )
        for number, one in enumerate(self.additions):
            value = one.adapter.down.value[one.piece.ranks]
            drawn = uniform(word_rows([seed], [number], value.numel(), Stream.ADAPTER)[0]) * 2 - 1
            value.copy_(torch.from_numpy(drawn / math.sqrt(value.shape[1])).view(value.shape))
            if one.piece.magnitude is not None:
                one.piece.magnitude.value.copy_(self._norm(one.matrix, one.adapter)[one.piece.rows])
        self.repack()
        return self

    def _unmatched(self) -> list[str]:
        """Targets of which no layer is called."""
        names = [f".{one.module}" for one in self.additions]
        return [one for one in self.config.targets if not any(name.endswith(f".{one}") for name in names)]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """What is trained, by name."""
        for matrix, adapter in self.matrices.items():
            yield f"{matrix}.down", adapter.down
            for one in self._of(matrix):
                yield f"{matrix}.{_last(one.module)}.up", one.piece.up
                if one.piece.magnitude is not None:
                    yield f"{matrix}.{_last(one.module)}.magnitude", one.piece.magnitude

    def served(self) -> Iterator[tuple[str, Weight]]:
        """What products read, by name: it is this that travels to engines."""
        for matrix, adapter in self.matrices.items():
            yield f"{matrix}.down", adapter.down
            for one in self._of(matrix):
                yield f"{matrix}.{_last(one.module)}.up", one.piece.up
            if adapter.factor is not None:
                yield f"{matrix}.factor", adapter.factor

    def layer_args(self) -> ctypes.Array[AdapterLayerArgs]:
        """For forward.cpp, of each layer; held as long as the adapter."""
        if self._layer_args is None:
            self._layer_args = (AdapterLayerArgs * self.layers)()
            for number, args in enumerate(self._layer_args):
                for name in MATRICES:
                    matrix = self.matrices.get(f"layers.{number}.{name}")
                    if matrix is not None:
                        setattr(args, name, AdapterMatrixArgs(*matrix.words.tolist()))
        return self._layer_args

    def _of(self, matrix: str) -> Iterator[Addition]:
        return (one for one in self.additions if one.matrix == matrix)

    def repack(self) -> None:
        """After the values changed: derive what the products read, DoRA's factors too."""
        for _, weight in self.weights():
            weight.repack()
        for matrix, adapter in self.matrices.items():
            if adapter.factor is None:
                continue
            norm = self._norm(matrix, adapter)
            for piece in adapter.pieces:
                assert piece.magnitude is not None
                adapter.factor.value[piece.rows] = piece.magnitude.value / norm[piece.rows]

    def _norm(self, matrix: str, adapter: Adapter) -> Tensor:
        """Of each row of W + s B A, [N] in fp32; by products that do not hang on the number of threads."""
        weight = self._bases[matrix]
        whole_NK = weight.served_value().to(torch.float32, copy=True)
        for piece in adapter.pieces:
            whole_NK[piece.rows] += delta(adapter, piece)
        return whole_NK.square().sum(1).sqrt()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in PEFT's names."""
        return {name: tuple(tensor.shape) for name, tensor in self.export()}

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's names and tensors, sharing memory with the adapter."""
        for one in self.additions:
            prefix = f"base_model.model.{one.module}"
            yield f"{prefix}.lora_A.weight", one.adapter.down.value[one.piece.ranks]
            yield f"{prefix}.lora_B.weight", one.piece.up.value
            if one.piece.magnitude is not None:
                yield f"{prefix}.lora_magnitude_vector", one.piece.magnitude.value

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> AdapterSet:
        """Copy every tensor in, by PEFT's name. ModelError, with its name, for one that is lacking, unknown or odd."""
        wanted = dict(self.export())
        outside = [target for target in self.config.targets if _last(target) in OUTSIDE]
        unmatched = self._unmatched()
        if unmatched:
            raise ModelError(
                f"{origin} is of {', '.join(outside or unmatched)} (target_modules), "
                f"{'where adapters are not computed' if outside else 'which no linear layer of this model is called'}. "
                f"Those of this model are {', '.join(PROJECTIONS)}. Merge the adapter with PEFT (merge_and_unload) and "
                "give the merged model, or take the model that it is of."
            )
        lacking, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        if lacking or unknown:
            raise ModelError(
                f"{origin} lacks {len(lacking)} of the {len(wanted)} tensors of its adapter_config.json"
                f"{f' ({lacking[0]} first)' if lacking else ''} and has {len(unknown)} beyond them"
                f"{f' ({unknown[0]} first)' if unknown else ''}. It is incomplete, or the config is another's."
            )
        for name, target in wanted.items():
            if not tensors[name].isfinite().all():
                raise ModelError(f"{origin}: tensor {name} has numbers that are not finite. Save the adapter again.")
            if target.shape != tensors[name].shape:
                raise ModelError(
                    f"{origin}: tensor {name} has shape {tuple(tensors[name].shape)}; its adapter_config.json and this "
                    f"model want {tuple(target.shape)}."
                )
            target.copy_(tensors[name])
        self.repack()
        return self


def delta(adapter: Adapter, piece: Piece) -> Tensor:
    """s B A of a piece: [N, K] in fp32."""
    down_RK = adapter.down.value[piece.ranks]
    turned = Weight(down_RK.T.contiguous(), matrix=True)
    if turned.packed is None:
        return piece.scale * (piece.up.value.float() @ down_RK.float())
    kind = None if down_RK.dtype == torch.float32 else torch.float32
    return piece.scale * product(piece.up.value, turned.packed, down_RK.shape[1], out_dtype=kind)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
