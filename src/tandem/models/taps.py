"""Residual streams of a forward pass, kept for whoever drafts from them: of every row, behind each of some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.errors import ConfigError
from tandem.kernels.address import address, check_range
from tandem.models.spec import ModelSpec


class Taps:
    """Where one step's go. `slab` is [slots, L, M] in the decoder's dtype; a row's lie at its slot.

    `Decoder.forward(..., watch=taps.see)` and `FusedForward(..., taps=taps)` write the same bits.
    """

    def __init__(self, layers_L: torch.Tensor, slab: torch.Tensor, slots_T: torch.Tensor) -> None:
        """layers_L: int64, ascending, as `layers_of` gives them; slots_T: int64."""
        assert layers_L.shape == slab.shape[1:2], (layers_L.shape, slab.shape)
        self.layers_L, self.slab, self.slots_T = layers_L, slab, slots_T
        check_range(slots_T, len(slab), "slots")
        self._place = {layer: place for place, layer in enumerate(layers_L.tolist())}

    def see(self, layer: int, hidden_TM: torch.Tensor) -> None:
        """Keep the states behind a layer, where they are asked for."""
        place = self._place.get(layer)
        if place is not None:
            self.slab[self.slots_T, place] = hidden_TM.detach()

    def addresses(self, rows: int) -> tuple[int | None, ...]:
        """Of the layers, of the rows' slots, and of the slab."""
        slots, slab = address(self.slots_T, torch.int64, rows), address(self.slab, self.slab.dtype, *self.slab.shape)
        return address(self.layers_L, torch.int64, len(self.layers_L)), slots, slab


def layers_of(spec: ModelSpec, layers: Sequence[int]) -> torch.Tensor:
    """Layers whose states a pass can give, counted from 0. ConfigError for others: of the last one a step of an engine
    runs only the rows that draw."""
    last = spec.layers - 1
    if list(layers) != sorted(set(layers)) or not layers or layers[0] < 0 or layers[-1] >= last:
        raise ConfigError(
            f"states are asked for behind the layers {list(layers)} (counted from 0) of a model of {last + 1}: allowed "
            f"are 0 to {last - 1}, each once, in order. The drafter is of another model, or its config is wrong."
        )
    return torch.tensor(layers, dtype=torch.int64)
