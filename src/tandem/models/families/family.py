"""What a file of this folder says of its families, and how layers are listed in a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.errors import ModelError
from tandem.models.fields import Fields, listed, optional, shown, text, whole
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.types import Reach

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Renaming:
    """Between the tensors of a checkpoint and those of models/parts.py."""

    read_name: Callable[[str], str | None]  # None for a tensor that is no part of the text model
    write_name: Callable[[str], str]
    read: Callable[[ModelSpec, str, torch.Tensor], torch.Tensor]  # by the decoder's name
    write: Callable[[ModelSpec, str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """What one class of Transformers has and others have not."""

    architecture: str  # model_type
    class_name: str
    read: Callable[[Fields, int], dict[str, Any]]  # config.json and its layers -> fields of ModelSpec
    write: Callable[[ModelSpec], dict[str, Any]]  # the reverse; what the class lacks is found by reading it again
    # What Transformers assumes where config.json is silent. Of all: rms_norm_eps 1e-6, rope_theta 1e4, untied.
    defaults: Mapping[str, Any]
    own: tuple[str, ...] = ()  # of hf_config's variants, those that `read` takes or whose class fixes them
    ff_width: str = "intermediate_size"
    attention_bias: bool = False
    qk_norm: bool = False
    within: tuple[str, ...] = ()  # class and model_type of configs that hold this one as text_config
    renaming: Renaming | None = None
    gguf_pairs: bool | None = None  # whether GGUF files of this name have llama.cpp's order of q and k; None: no files


def windowed(fields: Fields, on: bool) -> Reach:
    """The sliding window of a config.json, where it is `on`."""
    window = fields.take("sliding_window", optional(whole()), 4096 if on else None)
    return Reach(window=window if on else None)


def layers_of(
    fields: Fields,
    kinds: Sequence[str],
    reach: Reach,
    rotary: Sequence[int] = (),
    *,
    special: str = "sliding_attention",
    fixed: bool = False,
) -> tuple[LayerAttention, ...]:
    """Of each layer: `reach` where layer_types, else `kinds`, says `special`, and everything where full_attention.

    `rotary`: of each layer, 0 where nothing is rotated. `fixed`: the class knows its kinds, whatever the file lists.
    """
    rotary = rotary or (1,) * len(kinds)
    given = fields.take("layer_types", optional(listed(text)), None)
    found = kinds if given is None else given
    alike = not fixed or list(found) == list(kinds)
    windowless = special == "sliding_attention" and reach.window is None and special in found
    unknown = [kind for kind in found if kind not in (special, "full_attention")]
    if unknown or len(found) != len(kinds) or len(rotary) < len(kinds) or windowless or not alike:
        raise ModelError(
            f"{fields.where} has {len(found)} layer_types and {len(rotary)} no_rope_layers for {len(kinds)} layers"
            f"{f', one of them {shown(unknown[0])}' if unknown else ''}; one a layer is needed, each "
            f"{special + ' or ' if reach != Reach() else ''}full_attention{'' if alike else ', as its class has them'}."
        )
    return tuple(
        LayerAttention(reach if kind == special else Reach(), bool(turned))
        for kind, turned in zip(found, rotary, strict=False)
    )


def rotated(fields: Fields, layers: int) -> tuple[int, ...]:
    """Of each layer, 0 where queries and keys are not rotated."""
    interval = fields.take("no_rope_layer_interval", whole(1), 4)
    given = fields.take("no_rope_layers", optional(listed(whole(0, 1))), None)
    return given or tuple(int((index + 1) % interval != 0) for index in range(layers))


def windows_of(spec: ModelSpec) -> dict[str, Any]:
    """The config of a class with one window in some layers."""
    window = next((reach.window for reach in spec.reaches if reach.window is not None), None)
    kinds = ["full_attention" if reach.window is None else "sliding_attention" for reach in spec.reaches]
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}
