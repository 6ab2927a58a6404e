"""Drafters in vLLM's layout: config.json beside model.safetensors, read and written (docs/speculation.md).

What vLLM's `Eagle3LlamaForCausalLM.load_weights` takes, and what vllm-project/speculators publish: the layer is
`midlayer.` or `layers.0.`; `d2t` is what a target's id is beyond the drafter's, `t2d` which of the target's it knows.
Of DFlash what `DFlashQwen3Model.load_weights` takes, and z-lab publishes: `layers.N.`, `fc`, `hidden_norm`, `norm`.
Layers are counted in EAGLE-3's by what comes before them (j is the state behind layer j - 1, 0 the embedding), in
DFlash's as here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import CheckpointError, ModelError
from tandem.models.decoder import Decoder
from tandem.models.fields import Fields, flag, listed, optional, read_json, table, text, whole
from tandem.models.hf_config import from_hf_config, to_hf_config
from tandem.models.spec import ModelSpec
from tandem.speculate.block import Block, BlockSpec
from tandem.speculate.eagle import LAYER, Eagle, EagleSpec
from tandem.speculate.mixed import Mixed, MixedSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DFLASH = ("DFlashDraftModel", "DFlashForCausalLM", "DFlashQwen3ForCausalLM")
EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
MIXED = ("TandemMixedDrafter",)  # nobody else has one
KNOWN = (*EAGLE3, *DFLASH, *MIXED)
# Settings that another pass than ours has, and the value under which it is ours.
VARIANTS: Mapping[str, tuple[Any, ...]] = {
    "norm_before_fc": (None, False),
    "norm_output": (None, False),
    "fc_norm": (None, False),
    "parallel_drafting": (None, False),
    "logit_scale": (None, 1.0),
    "is_causal": (None, True),
}


def is_drafter(folder: Path) -> bool:
    """Whether a folder's config.json names one of these drafters."""
    config = folder / CONFIG
    return config.is_file() and bool({*KNOWN} & {*map(str, read_json(config).get("architectures") or ())})


def save_eagle(folder: Path, drafter: Eagle) -> None:
    """Into a folder, which may be there. CheckpointError where the disk refuses."""
    spec = drafter.spec
    dtype = str(drafter.dtype).removeprefix("torch.")
    config = to_hf_config(spec.model, dtype) | {
        "architectures": [EAGLE3[0]],
        "draft_vocab_size": spec.vocab_size,
        "target_hidden_size": spec.model.width,
        "norm_before_residual": spec.norm_first,
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in spec.layers],
        "eagle_config": {"use_aux_hidden_state": True},
    }
    _write(folder, config, _tensors_of(drafter))


def save_mixed(folder: Path, drafter: Mixed) -> None:
    """As `save_eagle`, of a layout of our own: layers.N as of a Llama, with `gru` or `linear_attn` in place of
    `self_attn`; layers of the target are counted as here."""
    spec = drafter.spec
    own = {
        "architectures": [MIXED[0]],
        "mixers": [*spec.mixers],
        "draft_vocab_size": spec.vocab_size,
        "target_layer_ids": [*spec.layers],
    }
    config = to_hf_config(spec.model, str(drafter.dtype).removeprefix("torch.")) | own
    _write(folder, config, _tensors_of(drafter))


def _tensors_of(drafter: Eagle) -> dict[str, Tensor]:
    ids_V, tensors = drafter.ids_V, {name: tensor.detach().clone() for name, tensor in drafter.export()}
    if ids_V is not None:
        known = torch.zeros(drafter.spec.model.vocab_size, dtype=torch.bool)
        known[ids_V] = True
        tensors |= {"d2t": ids_V - torch.arange(len(ids_V)), "t2d": known}
    return tensors


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}. Free disk space or choose another.") from error


def save_block(folder: Path, drafter: Block) -> None:
    """As `save_eagle`, of DFlash. Its embedding and head are the target's, and not in the file."""
    spec = drafter.spec
    own = {
        "architectures": [DFLASH[0]],
        "block_size": spec.block,
        "dflash_config": {"mask_token_id": spec.mask_token, "target_layer_ids": list(spec.layers)},
    }
    tensors = {name: tensor.detach().clone() for name, tensor in drafter.export()}
    _write(folder, to_hf_config(spec.model, str(drafter.dtype).removeprefix("torch.")) | own, tensors)


def save_drafter(folder: Path, drafter: Eagle | Block) -> None:
    """Of any kind."""
    if isinstance(drafter, Block):
        save_block(folder, drafter)
    elif isinstance(drafter, Mixed):
        save_mixed(folder, drafter)
    else:
        save_eagle(folder, drafter)


def open_drafter(folder: Path, target: Decoder, ids_V: Tensor | None = None) -> Eagle | Block:
    """Of any kind, as `open_eagle`. ids_V: the tokens that a DFlash drafts by the target's head; None: all."""
    spec = read_spec(folder, target.spec)
    if isinstance(spec, MixedSpec):
        return _open_mixed(folder, spec, target)
    if isinstance(spec, EagleSpec):
        return open_eagle(folder, target)
    try:
        return Block(spec, target.embed, target.head, ids_V).load(_tensors(folder).items())
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def open_eagle(folder: Path, target: Decoder) -> Eagle:
    """A drafter of this target, whose embedding it shares. ModelError that says what is wrong with the folder, or that
    it is of another model."""
    spec = read_spec(folder, target.spec)
    assert isinstance(spec, EagleSpec), folder
    tensors = {name.replace("layers.0.", LAYER): tensor for name, tensor in _tensors(folder).items()}
    ids_V = _ids(folder, tensors.pop("d2t", None), tensors.pop("t2d", None), spec)
    embed = tensors.pop("embed_tokens.weight", None)
    if embed is not None and not torch.equal(embed.to(target.dtype), target.embed.value):
        raise ModelError(
            f"{folder} brings an embedding of its own, which is not that of the model that it is to draft for. "
            "Supported: drafters that share the model's. Choose the one that was trained for this model."
        )
    try:
        return Eagle(spec, target.embed, ids_V).load(tensors.items())
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _open_mixed(folder: Path, spec: MixedSpec, target: Decoder) -> Mixed:
    tensors = _tensors(folder)
    ids_V = _ids(folder, tensors.pop("d2t", None), tensors.pop("t2d", None), spec)
    try:
        made = Mixed(spec, target.embed, ids_V)
        made.load(tensors.items())
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    return made


def read_spec(folder: Path, target: ModelSpec) -> EagleSpec | BlockSpec:
    """Of a drafter for this target; no tensor is read. ModelError as `open_eagle`."""
    fields = read_config(folder)
    if {*DFLASH} & {*fields.values["architectures"]}:
        return _block_spec(folder, fields, target)
    if {*MIXED} & {*fields.values["architectures"]}:
        return _mixed_spec(folder, fields, target)
    return _spec(folder, fields, target)


def read_config(folder: Path) -> Fields:
    """config.json, that of the layer within it where it is nested. ModelError where it is of no drafter known here."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}, so it is no drafter. Name a folder that `tandem train` saved one in."
        )
    values = read_json(path)
    fields = Fields(str(path), values)
    named = fields.take("architectures", optional(listed(text)), None) or ["nothing"]
    if not {*KNOWN} & {*named}:
        raise ModelError(f"{path} is of {', '.join(named)}; drafters that are read: {', '.join(KNOWN)}.")
    for name, same in VARIANTS.items():
        if values.get(name) not in same:
            raise ModelError(f"{path}: {name} is {values[name]!r}, which changes the pass and is not supported.")
    inner = fields.take("transformer_layer_config", optional(table), None)
    return fields if inner is None else Fields(str(path), {**inner, **values})


def _spec(folder: Path, fields: Fields, target: ModelSpec) -> EagleSpec:
    named = {
        **fields.values,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
    }
    known = ("d2t", "t2d", "draft_vocab_size", "norm_before_residual", "transformer_layer_config", "speculators_config")
    model = from_hf_config({name: value for name, value in named.items() if name not in known})
    if model.layers != 1:
        raise ModelError(f"{folder} has {model.layers} layers; supported: drafters of one.")
    theirs = fields.take("target_hidden_size", optional(whole(1)), None) or model.width
    _check_target(folder, model, theirs, target)
    named_layers = fields.take("eagle_aux_hidden_state_layer_ids", optional(listed(whole(0))), None)
    layers = tuple(j - 1 for j in named_layers) if named_layers else EagleSpec.of(target).layers
    size = fields.take("draft_vocab_size", optional(whole(1)), None) or model.vocab_size
    return EagleSpec(model, layers, size, fields.take("norm_before_residual", flag, False))


def _mixed_spec(folder: Path, fields: Fields, target: ModelSpec) -> MixedSpec:
    mixers = fields.take("mixers", listed(text))
    layers = fields.take("target_layer_ids", listed(whole(0)))
    size = fields.take("draft_vocab_size", whole(1))
    named = {**fields.values, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    known = ("d2t", "t2d", "draft_vocab_size", "mixers", "target_layer_ids")
    model = from_hf_config({name: value for name, value in named.items() if name not in known})
    _check_target(folder, model, model.width, target)
    try:
        return MixedSpec(model, layers, size, mixers=mixers)  # type: ignore[arg-type]  # which is checked there
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _block_spec(folder: Path, fields: Fields, target: ModelSpec) -> BlockSpec:
    own = fields.take("dflash_config", table, {})
    where = Fields(f"dflash_config of {fields.where}", own)
    for name, same in {"causal": (None, False), "use_swa": (None, False), "attention_sink_bias": (None, False)}.items():
        if own.get(name) not in same:
            raise ModelError(f"{where.where}: {name} is {own[name]!r}, which changes the pass and is not supported.")
    named = {**fields.values, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    known = ("block_size", "dflash_config", "num_target_layers", "draft_vocab_size", "layer_types")
    sliding = "sliding_attention" in (fields.take("layer_types", optional(listed(text)), None) or ())
    if sliding or fields.take("draft_vocab_size", optional(whole(1)), None) not in (None, target.vocab_size):
        raise ModelError(f"{folder} has sliding layers or a head of its own, which are not supported.")
    model = from_hf_config({name: value for name, value in named.items() if name not in known})
    model = replace(model, tied_embeddings=True)
    _check_target(folder, model, model.width, target)
    layers = where.take("target_layer_ids", listed(whole(0)))
    return BlockSpec(model, layers, fields.take("block_size", whole(2)), where.take("mask_token_id", whole(0)))


def _check_target(folder: Path, model: ModelSpec, theirs: int, target: ModelSpec) -> None:
    if (model.width, theirs, model.vocab_size) != (target.width, target.width, target.vocab_size):
        raise ModelError(
            f"{folder} drafts for a model of width {theirs} and {model.vocab_size} tokens, by a layer of width "
            f"{model.width}; this model has {target.width} and {target.vocab_size}. Choose one that was trained for it."
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Without the prefix that some have."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy or download the file again.") from error
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def _ids(folder: Path, d2t: Tensor | None, t2d: Tensor | None, spec: EagleSpec) -> Tensor | None:
    """The target's ids of the head's rows; None: all of them."""
    if d2t is None:
        if spec.vocab_size != spec.model.vocab_size:
            raise ModelError(f"{folder} has a head of {spec.vocab_size} tokens and no d2t that says which they are.")
        return None
    ids_V = d2t.long() + torch.arange(len(d2t))
    right = len(ids_V) == spec.vocab_size and bool((ids_V.diff() > 0).all())
    if not right or int(ids_V[0]) < 0 or int(ids_V[-1]) >= spec.model.vocab_size:
        raise ModelError(
            f"{folder}: d2t does not give {spec.vocab_size} ids of {spec.model.vocab_size} in ascending order."
        )
    if t2d is not None and not torch.equal(t2d.bool().nonzero()[:, 0], ids_V):
        raise ModelError(f"{folder}: t2d and d2t name different tokens. Copy or download the file again.")
    return ids_V
