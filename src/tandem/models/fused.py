"""A decoder's forward pass of an engine step in one call: one parallel region, nothing allocated between layers.

A decode step of SmolLM2-135M takes 6.0 ms for one sequence, where it took 9.2 an operation at a time, on two Zen 5
cores. The bits are those of `Decoder.forward`, which the learner runs: the operations are the same C++.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kernels.address import address, check_range
from tandem.kernels.build.load import kernel
from tandem.kernels.codes import UNIT
from tandem.kernels.eights import Eights
from tandem.kernels.forward import FEW, AdapterArgs, ForwardArgs, GroupArgs, LayerArgs, MatrixArgs
from tandem.kernels.fours import Fours
from tandem.kernels.page_pool import KvPool
from tandem.kernels.weight import Weight, matrix_addresses
from tandem.models.adapter import AdapterSet
from tandem.models.decoder import Decoder
from tandem.models.taps import Taps
from tandem.models.view import PagedView
from tandem.types import Reach


class RowAdapters(NamedTuple):
    """Which adapter serves each of T rows."""

    sets: Sequence[AdapterSet]
    set_T: Tensor  # int64: its place among them; -1: none


class FusedForward:
    """`Decoder.forward` of one decoder over one set of pages, without gradients.

    seconds: [len(KINDS)] in fp64, of kernels.forward.KINDS, added to by every call where it is not None.
    """

    def __init__(self, decoder: Decoder, pools: list[KvPool]) -> None:
        assert fits(decoder, pools), decoder.spec
        run = kernel("forward", f"forward{pools[0].suffix}", decoder.dtype, "p")
        assert run is not None
        self.decoder = decoder
        self.pools = pools
        self.seconds: Tensor | None = None
        self._run = run
        self._scratch = torch.empty(0, dtype=decoder.dtype)
        self._code_rows = torch.empty(0, 0, dtype=torch.uint8)
        self._deepest = 0  # inputs of products of integers, to whole units; 0: nothing is multiplied so
        self._forms: list[
            object
        ] = []  # what the matrices were when `_layers` was made; held, so that no id comes again
        self._layers = (LayerArgs * len(pools))()
        self._matrices = [w for layer in decoder.layers for slot, w in layer.weights() if slot.columns is not None]

    def _fill(self, forms: list[object]) -> None:
        self._forms, spec = forms, self.decoder.spec
        integers = any(isinstance(form, Eights | Fours) for form in forms)
        deepest = max(spec.width, spec.ff_width, spec.heads * spec.head_size) if integers else 0
        self._deepest = -(-deepest // UNIT) * UNIT
        for args, layer, pool in zip(self._layers, self.decoder.layers, self.pools, strict=True):
            for slot, weight in layer.weights():
                if slot.columns is not None:
                    setattr(args, slot.name, MatrixArgs(*matrix_addresses(weight), *_integers(weight)))
                elif slot.name != "qkv_bias":
                    setattr(args, slot.name, weight.value.data_ptr())
            args.keys, args.values = pool.keys.data_ptr(), pool.values.data_ptr()
            args.scales = None if pool.scales is None else pool.scales.data_ptr()
            args.rotary = layer.mix.heads.rotary

    def _bias(self) -> list[Tensor]:
        """The biases in fp32, set in the layers' arguments; to be held during the call."""
        found = []
        for args, layer in zip(self._layers, self.decoder.layers, strict=True):
            if layer.mix.qkv_bias is not None:
                found.append(layer.mix.qkv_bias.value.float())
                args.qkv_bias = found[-1].data_ptr()
        return found

    def _room(self, rows: int, ranks: int) -> list[int]:
        """Addresses of hidden, normed, qkv, attended, both, act, lowered in scratch that only grows."""
        spec = self.decoder.spec
        few = max(rows, FEW * torch.get_num_threads())
        qkv, attended = self.decoder.layers[0].mix.heads.width, spec.heads * spec.head_size
        sizes = (
            rows * spec.width,
            few * spec.width,
            rows * qkv,
            rows * attended,
            2 * rows * spec.ff_width,
            rows * spec.ff_width,
            rows * ranks,
        )
        if sum(sizes) > len(self._scratch):
            self._scratch = torch.empty(sum(sizes), dtype=self.decoder.dtype)
        start, addresses = self._scratch.data_ptr(), []
        for size in sizes:
            addresses.append(start)
            start += size * self.decoder.dtype.itemsize
        return addresses

    def _codes(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scratch for the rows of products of integers as codes, their scales, and what sums of groups begin at; it
        only grows."""
        few = max(rows, FEW * torch.get_num_threads()) if self._deepest else 0
        if few > len(self._code_rows) or self._code_rows.shape[1] != self._deepest:
            self._code_rows = torch.empty(few, self._deepest, dtype=torch.uint8)
        starts = torch.empty(few * self._deepest // UNIT * 2, dtype=torch.int32)
        return self._code_rows, torch.empty(few), starts

    def __call__(
        self,
        tokens_T: Tensor,
        view: PagedView,
        rows_N: Tensor,
        adapters: RowAdapters | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Final hidden states [N, M], normed, of `rows_N` (ascending); writes the keys and values of all rows, and the
        states that `taps` asks for.

        `adapters`: of the rows; by default all have the one that the decoder wears.
        """
        decoder, spec = self.decoder, self.decoder.spec
        forms: list[object] = [w.packed if w.codes is None else w.codes for w in self._matrices]
        if len(forms) != len(self._forms) or any(now is not then for now, then in zip(forms, self._forms, strict=True)):
            self._fill(forms)
        biases = self._bias()
        rows, last = len(tokens_T), len(rows_N)
        decoder.check_ids(tokens_T, view)
        check_range(rows_N, rows, "rows asked for")
        assert view.paths.num_rows == rows, (view.paths.num_rows, rows)
        out_NM = torch.empty(last, spec.width, dtype=decoder.dtype)
        segment_N = None  # a decode: every row is asked for, and is its own segment
        last_start, last_positions = view.paths.row_start_S, view.paths.first_position_S
        if not last == rows == len(last_positions):
            segment_N = torch.searchsorted(view.paths.row_start_S, rows_N, right=True, out_int32=False) - 1
            last_start = torch.arange(last + 1, dtype=torch.int32)
            last_positions = view.positions_T[rows_N].to(torch.int32)
        groups, held = self._groups(view, segment_N)
        served, ranks = self._adapters(rows, rows_N, adapters)
        *scratch, lowered = self._room(rows, ranks)
        codes_TK, scales_T, starts = self._codes(rows)
        args = ForwardArgs(
            ctypes.addressof(self._layers),
            ctypes.addressof(groups),
            *(address(w.value, decoder.dtype, *w.value.shape) for w in (decoder.embed, decoder.norm)),
            *(address(t, torch.int64, n) for t, n in ((tokens_T, rows), (view.positions_T, rows), (rows_N, last))),
            *(t.data_ptr() for t in (view.paths.row_start_S, view.paths.first_position_S, last_start, last_positions)),
            *(table.data_ptr() for table in decoder.tables),
            *scratch,
            out_NM.data_ptr(),
            *served.addresses,
            lowered,
            codes_TK.data_ptr(),
            scales_T.data_ptr(),
            starts.data_ptr(),
            None if self.seconds is None else self.seconds.data_ptr(),
            *((None, None, None) if taps is None else taps.addresses(rows)),
            *(len(self.pools), len(groups), rows, len(view.paths.first_position_S), last, spec.width, spec.ff_width),
            *(spec.heads, spec.kv_heads, spec.head_size, view.paths.page_tokens),
            *(len(served.args), ranks, codes_TK.shape[1], 0 if taps is None else len(taps.layers_L)),
            spec.norm_eps,
        )
        self._run(ctypes.addressof(args))
        del biases, held, served, codes_TK, scales_T, starts
        return out_NM

    def _adapters(self, rows: int, rows_N: Tensor, adapters: RowAdapters | None) -> tuple[_Served, int]:
        """Rows by adapter, and the ranks of the widest matrix."""
        if adapters is None:
            worn = self.decoder.adapter
            adapters = RowAdapters([] if worn is None else [worn], torch.zeros(0 if worn is None else rows).long())
        if not adapters.sets:
            return _Served(), 1
        assert adapters.set_T.shape == (rows,), (adapters.set_T.shape, rows)
        served = _Served(adapters, rows_N)
        ranks = max(matrix.down.value.shape[0] for one in adapters.sets for matrix in one.matrices.values())
        return served, ranks

    def _groups(self, view: PagedView, segment_N: Tensor | None) -> tuple[ctypes.Array[GroupArgs], list[Tensor]]:
        """Page tables and reaches; the tensors are to be held during the call."""
        for paths, slots_T in zip(view.paths_G, view.slots_G, strict=True):
            check_range(slots_T, self.pools[0].num_slots, "slots")
            check_range(paths.table_SP, self.pools[0].num_slots // paths.page_tokens, "pages")
        held = [paths.table_SP if segment_N is None else paths.table_SP[segment_N] for paths in view.paths_G]
        groups = (GroupArgs * len(held))()
        for args, layer in zip(self._layers, self.decoder.layers, strict=True):
            args.group = index = view.group_L[layer.index]
            reach = Reach(window=view.window) if view.window else layer.mix.heads.reach
            if groups[index].table is None:
                groups[index] = GroupArgs(
                    *(t.data_ptr() for t in (view.paths_G[index].table_SP, held[index])),
                    address(view.slots_G[index], torch.int64, len(view.positions_T)),
                    *(held[index].shape[1], reach.window or 0, reach.chunk or 0, view.sinks if view.window else 0),
                )
        return groups, held


class _Served:
    """Arguments of a step's adapters; to be held during the call."""

    def __init__(self, adapters: RowAdapters | None = None, rows_N: Tensor | None = None) -> None:
        self.args = (AdapterArgs * (0 if adapters is None else len(adapters.sets)))()
        self.addresses: tuple[int | None, ...] = (None, None, None)
        if adapters is None or rows_N is None:
            return
        self._sets = adapters.sets
        bounds = torch.arange(-1, len(adapters.sets))
        orders, ends = [], []
        for set_T in (adapters.set_T, adapters.set_T[rows_N]):
            sorted_T, order_T = set_T.sort(stable=True)
            orders.append(order_T)
            ends.append(torch.searchsorted(sorted_T, bounds, right=True).tolist())
        self._orders = orders
        for number, (args, one) in enumerate(zip(self.args, adapters.sets, strict=True)):
            runs = (end for each in ends for end in each[number : number + 2])
            args.layers = ctypes.addressof(one.layer_args())
            args.begin, args.end, args.last_begin, args.last_end = runs
        self.addresses = (ctypes.addressof(self.args), *(order_T.data_ptr() for order_T in orders))


def _integers(weight: Weight) -> tuple[int | None, int | None]:
    """Of codes of 8 bits and of 4 whose rows are rounded: one of them null, or both."""
    if not isinstance(weight.codes, Eights | Fours):
        return None, None
    words = weight.codes.words.data_ptr()
    return (words, None) if isinstance(weight.codes, Eights) else (None, words)


def fits(decoder: Decoder, pools: list[KvPool]) -> bool:
    """Whether the C++ has everything this decoder does: exact products, packed pages, plain rotation or none."""
    spec = decoder.spec
    even = spec.width % 2 == 0 and spec.ff_width % 2 == 0
    plain = all(layer.mix.heads.norm_eps is None and layer.mix.heads.factor_P is None for layer in decoder.layers)
    weights = [weight for layer in decoder.layers for slot, weight in layer.weights() if slot.columns is not None]
    exact = all(
        (w.packed is not None or w.codes is not None) and not w.library and w.rounding.rows is None for w in weights
    )
    held = all(pool.packed and pool.holds(decoder.kept) for pool in pools)
    return even and plain and exact and held
