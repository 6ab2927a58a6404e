"""Llama 4's checkpoints in the decoder's names and rotary layout, and back.

Its feed-forward is called `feed_forward`; published with images, its text model lies under `language_model`. It rotates
neighbouring dimensions of a head, the decoder those D/2 apart: the rows of q and k are put in another order. Their norm
after rotation has no weights, so no order either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

_IMAGES = ("vision_model.", "multi_modal_projector.")


def decoder_name(name: str) -> str | None:
    """The decoder's name for a tensor of a checkpoint; None where it belongs to the images' side."""
    if name.startswith(_IMAGES):
        return None
    return name.removeprefix("language_model.").replace(".feed_forward.", ".mlp.")


def checkpoint_name(name: str) -> str:
    """The name in a checkpoint of the text model alone."""
    return name.replace(".mlp.", ".feed_forward.")


def to_halves(spec: ModelSpec, name: str, weight_NM: torch.Tensor) -> torch.Tensor:
    """Rows of a checkpoint's q and k in the decoder's order; other tensors as they are."""
    return _turned(name, weight_NM, (-1, spec.head_size // 2, 2))


def to_pairs(spec: ModelSpec, name: str, weight_NM: torch.Tensor) -> torch.Tensor:
    """The reverse of `to_halves`."""
    return _turned(name, weight_NM, (-1, 2, spec.head_size // 2))


def _turned(name: str, weight_NM: torch.Tensor, heads: tuple[int, int, int]) -> torch.Tensor:
    if not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return weight_NM
    return weight_NM.unflatten(0, heads).transpose(1, 2).reshape(weight_NM.shape)
