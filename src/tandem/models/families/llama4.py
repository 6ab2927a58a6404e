"""Llama 4's dense text model: chunks, layers without rotation, a norm after rotation and a query temperature.

Its feed-forward is called `feed_forward`; published with images, its text model lies under `language_model`. It rotates
neighbouring dimensions of a head, the decoder those D/2 apart: the rows of q and k are put in another order. Their norm
after rotation has no weights, so no order either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tandem.errors import ModelError
from tandem.models.families.family import Family, Renaming, layers_of, rotated
from tandem.models.fields import Fields, flag, listed, number, optional, whole
from tandem.models.spec import ModelSpec, QueryTemperature
from tandem.types import Reach

if TYPE_CHECKING:
    import torch

_CHUNK = 8192  # tokens: Transformers'
_IMAGES = ("vision_model.", "multi_modal_projector.")


def _decoder_name(name: str) -> str | None:
    """The decoder's name for a tensor of a checkpoint; None where it belongs to the images' side."""
    if name.startswith(_IMAGES):
        return None
    return name.removeprefix("language_model.").replace(".feed_forward.", ".mlp.")


def _checkpoint_name(name: str) -> str:
    """The name in a checkpoint of the text model alone."""
    return name.replace(".mlp.", ".feed_forward.")


def _to_halves(spec: ModelSpec, name: str, weight_NM: torch.Tensor) -> torch.Tensor:
    """Rows of a checkpoint's q and k in the decoder's order; other tensors as they are."""
    return _turned(name, weight_NM, (-1, spec.head_size // 2, 2))


def _to_pairs(spec: ModelSpec, name: str, weight_NM: torch.Tensor) -> torch.Tensor:
    """The reverse of `_to_halves`."""
    return _turned(name, weight_NM, (-1, 2, spec.head_size // 2))


def _turned(name: str, weight_NM: torch.Tensor, heads: tuple[int, int, int]) -> torch.Tensor:
    if not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return weight_NM
    return weight_NM.unflatten(0, heads).transpose(1, 2).reshape(weight_NM.shape)


def _refuse_experts(fields: Fields, layers: int) -> None:
    experts = fields.take("moe_layers", optional(listed(whole())), None)
    step = fields.take("interleave_moe_layer_step", whole(1), 1)
    if experts is None:
        experts = tuple(range(step - 1, layers, step))
    if experts:
        raise ModelError(
            f"{fields.where} has mixture-of-experts layers ({len(experts)} of {layers}, layer {experts[0]} first), "
            "which the decoder does not have. Choose a model whose layers are all dense (an empty moe_layers)."
        )


def _read(fields: Fields, layers: int) -> dict[str, Any]:
    _refuse_experts(fields, layers)
    rotary = rotated(fields, layers)
    reach = Reach(chunk=fields.take("attention_chunk_size", optional(whole()), None))
    kinds = ["chunked_attention" if turned else "full_attention" for turned in rotary[:layers]]
    temperature = QueryTemperature(fields.take("attn_scale", number(), 0.1), fields.take("floor_scale", whole(), 8192))
    return {
        "attention": layers_of(fields, kinds, reach, rotary, special="chunked_attention"),
        "query_temperature": temperature if fields.take("attn_temperature_tuning", flag, True) else None,
        "rotated_norm": fields.take("use_qk_norm", flag, True),
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    temperature = spec.query_temperature or QueryTemperature()
    return {
        "attention_bias": False,
        "intermediate_size_mlp": spec.ff_width,
        "moe_layers": [],
        "no_rope_layers": [int(layer.rotary) for layer in spec.layer_attention],
        "layer_types": ["full_attention" if r.chunk is None else "chunked_attention" for r in spec.reaches],
        "attention_chunk_size": next((r.chunk for r in spec.reaches if r.chunk is not None), _CHUNK),
        "attn_temperature_tuning": spec.query_temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
        "use_qk_norm": spec.rotated_norm,
    }


LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    _read,
    _write,
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_chunk_size": _CHUNK,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    own=("use_qk_norm", "num_local_experts"),
    ff_width="intermediate_size_mlp",
    within=("Llama4ForConditionalGeneration", "llama4"),
    renaming=Renaming(_decoder_name, _checkpoint_name, _to_halves, _to_pairs),
)
