"""A model as a GGUF file that llama.cpp loads: metadata, tokeniser and tensors, in its names and its order of rows.

Matrices of layers are in the type that is asked for, or in what llama.cpp takes where blocks do not divide a width;
embedding and head are floats, norms and biases F32.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.errors import CheckpointError, ConfigError, ModelError, TandemWarning, nearest
from tandem.models.families import FAMILIES
from tandem.models.gguf import GgufFile, GgufTensor, spec_from_gguf, to_gguf_layout
from tandem.models.parts import all_slots, layer_slots
from tandem.models.spec import ModelSpec, llama3_frequency_factors
from tandem.numerics.ggml import TYPES, Coded, GgmlType

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_LABELS = {dtype: label for label, dtype in FLOATS.items()}
FILE_TYPES = {  # llama.cpp's LLAMA_FTYPE of a file that is mostly of a type
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
    "MXFP4": 38,
    "NVFP4": 39,
}
# llama-quant.cpp's tensor_type_fallback, where a type's blocks of 256 do not divide a width; F16 where 32 does not.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class GgufKind:
    """What a file's matrices are written in.

    >>> GgufKind.read("gguf:q4_k").type.name, GgufKind.read("gguf:F16").dtype
    ('Q4_K', 'float16')
    """

    name: str
    type: GgmlType | None = None  # None: floats of `dtype`
    dtype: str = "bfloat16"

    @classmethod
    def read(cls, text: str) -> GgufKind:
        """Of gguf:TYPE, in either case. ConfigError."""
        name = text.partition(":")[2].upper()
        known = (*TYPES, *FLOATS)
        if name not in known:
            raise ConfigError(f"--format {text}: write gguf:TYPE, as gguf:Q4_K.{nearest(name, known)}")
        return cls(name, TYPES.get(name), FLOATS.get(name, "bfloat16"))

    def types(self, spec: ModelSpec) -> dict[str, GgmlType | None]:
        """Of each matrix of the layers, by its decoder's name; None for F16. Other types than the one asked for are
        said in a TandemWarning. ModelError where llama.cpp has none in its place."""
        found: dict[str, GgmlType | None] = {}
        others: dict[tuple[int, str], int] = {}
        for slot in layer_slots(spec):
            if slot.columns is None or self.type is None:
                continue
            kind = self._fitting(slot.columns)
            found |= dict.fromkeys(slot.shapes(), kind)
            if kind != self.type:
                key = slot.columns, kind.name if kind else "F16"
                others[key] = others.get(key, 0) + len(slot.stored)
        for (width, name), count in others.items():
            warnings.warn(
                f"{self.name} has blocks of {TYPES[self.name].block}, which do not divide a width of {width}: {count} "
                f"matrices are in {name}, as llama.cpp has them.",
                TandemWarning,
                stacklevel=2,
            )
        return found

    def _fitting(self, width: int) -> GgmlType | None:
        kind = self.type
        assert kind is not None
        if width % kind.block == 0:
            return kind
        if kind.block == 64:
            raise ModelError(
                f"{kind.name} has blocks of {kind.block}, which do not divide a width of {width}, and llama.cpp has no "
                "type in its place. Choose MXFP4 or IQ4_NL, whose blocks are of 32."
            )
        other = TYPES.get(FALLBACK.get(kind.name, ""))
        return other if other and width % other.block == 0 else None


def metadata(spec: ModelSpec) -> dict[str, Any]:
    """What a file says of the architecture. ModelError where a reader of it would compute something else."""
    written = [one for one, family in FAMILIES.items() if family.gguf_pairs is not None]
    if spec.architecture not in written:
        raise ModelError(
            f"a model of family {spec.architecture} cannot be written as GGUF; those of {', '.join(written)} can. "
            "Write it in another format: compressed-tensors, gptq, awq (docs/numerics.md)."
        )
    spec = _named(spec)
    name = spec.architecture
    if any(reach.window or reach.chunk for reach in spec.reaches):
        raise ModelError(
            f"the model's queries see a window of keys, and llama.cpp gives {name} none. Write it in another format: "
            "compressed-tensors, gptq, awq (docs/numerics.md)."
        )
    own: dict[str, Any] = {
        "block_count": spec.layers,
        "context_length": spec.max_position,
        "embedding_length": spec.width,
        "feed_forward_length": spec.ff_width,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_size,
        "attention.value_length": spec.head_size,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": spec.rope_theta,
        "rope.dimension_count": spec.head_size,
        "vocab_size": spec.vocab_size,
    }
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind != "llama3":
        own |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.kind == "yarn":
        own |= {
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    fields = {"general.architecture": name} | {f"{name}.{key}": value for key, value in own.items()}
    _check(spec, fields)
    return fields


def _named(spec: ModelSpec) -> ModelSpec:
    """Of the family by llama.cpp's name."""
    return replace(spec, architecture="llama") if spec.architecture == "mistral" else spec


def _check(spec: ModelSpec, fields: Mapping[str, Any]) -> None:
    """ModelError unless the metadata is read back as the spec."""
    path, llama3 = Path("the new file"), spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3"
    shapes = {one.gguf: slot.shapes()[one.name] for slot in all_slots(spec) for one in slot.stored}
    entries = {own: GgufTensor(path, shape, 0, 0, 0) for own, shape in shapes.items()}
    again = spec_from_gguf(GgufFile(path, fields, entries, 0))
    if llama3 and (one := spec.rope_scaling) is not None:
        if (one.low_freq_factor, one.high_freq_factor, one.original_max_position) == (1.0, 4.0, 8192):
            again = replace(again, rope_scaling=one)
    wanted = replace(spec, bos_token_id=None, eos_token_ids=(), pad_token_id=None)
    lost = [part.name for part in dataclasses.fields(spec) if getattr(wanted, part.name) != getattr(again, part.name)]
    if lost:
        raise ModelError(
            f"a GGUF file of {spec.architecture} cannot say the model's "
            f"{', '.join(f'{part} = {getattr(spec, part)}' for part in lost)}. Write it in another format: "
            "compressed-tensors, gptq, awq (docs/numerics.md)."
        )


def kept_fields(file: GgufFile) -> dict[str, Any]:
    """The tokeniser and what is told of the model, of the file that a model came from."""
    new = ("architecture", "alignment", "file_type", "quantization_version")
    return {
        name: value
        for name, value in file.fields.items()
        if name.startswith("tokenizer.") or name.startswith("general.") and name.removeprefix("general.") not in new
    }


def write_gguf(
    path: Path,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    coded: Mapping[str, Coded | None],
    fields: Mapping[str, Any],
    kind: GgufKind,
) -> None:
    """Write a model: `coded` by the decoder's names, None for F16; other matrices in kind.dtype, vectors in F32.

    `fields`: of `metadata`, and the tokeniser's. CheckpointError where the disk refuses; the file is then a part.
    """
    from gguf import GGUFWriter

    spec = _named(spec)
    writer = GGUFWriter(path, fields["general.architecture"])
    stored = dict(fields) | {"general.file_type": FILE_TYPES[kind.name], "general.quantization_version": 2}
    for name, value in stored.items():
        if name != "general.architecture":
            _add(writer, name, value)
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3":
        factors = llama3_frequency_factors(spec, spec.rope_scaling)
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for slot in all_slots(spec):
        for one in slot.stored:
            _put(writer, spec, (one.name, one.gguf), tensors, coded, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. Free disk space or choose another.") from error


def _put(
    writer: Any,
    spec: ModelSpec,
    names: tuple[str, str],
    tensors: Mapping[str, Tensor],
    coded: Mapping[str, Coded | None],
    kind: GgufKind,
) -> None:
    """A tensor, and NVFP4's scale beside it."""
    from gguf import GGMLQuantizationType

    name, own = names
    found = coded.get(name)
    if found is not None:
        raw = to_gguf_layout(spec, name, found.packed())
        writer.add_tensor(own, raw.contiguous().numpy(), raw_dtype=GGMLQuantizationType[found.type.name])
        if found.whole is not None:
            writer.add_tensor(f"{own.removesuffix('weight')}scale", found.whole.reshape(1).numpy())
        return
    tensor = tensors[name]
    label = "F32" if tensor.ndim == 1 else "F16" if name in coded else _LABELS[kind.dtype]
    values = to_gguf_layout(spec, name, tensor.detach().to("cpu", getattr(torch, FLOATS[label]))).contiguous()
    writer.add_tensor(own, values.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType[label])


def _add(writer: Any, name: str, value: Any) -> None:
    """A metadata value, as the kind that it is."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        (writer.add_int32 if value < 0 else writer.add_uint32 if value < 1 << 32 else writer.add_uint64)(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)
