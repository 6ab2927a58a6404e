"""GGUF files: header, metadata -> ModelSpec, tensors in Hugging Face names and layout.

The header is read here because `gguf.GGUFReader` makes a NumPy view of every vocabulary entry: 1.8 s for
SmolLM2's 98,000 strings, against 0.03 s. Blocks are dequantised by `gguf.quants`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.errors import ModelError
from tandem.models.families import FAMILIES
from tandem.models.fields import Fields, number, optional, shown, text, token_id, whole
from tandem.models.parts import all_slots
from tandem.models.spec import (
    MOST_LAYERS,
    MOST_POSITIONS,
    LayerAttention,
    ModelSpec,
    RopeScaling,
    llama3_frequency_factors,
)
from tandem.types import Reach

if TYPE_CHECKING:
    import torch

    from tandem.numerics.quantise import Quantised

# Block formats by their number in the file: name, weights a block, bytes a block.
FORMATS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")  # llama.cpp's name of a part of a model
# Hyperparameters of an architecture that say nothing of the pass, and values that leave it as it is (else 0).
_SILENT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "expert_used_count")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"), (0.0, 1.0)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1.0,)),
}
_FLOAT32 = 3e38
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's frequency divisors; a property of the spec, not a weight
_DAMAGED = "The file is damaged: download or copy it again."


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: its file, shape in PyTorch's order (rows first), block format, byte range of the file."""

    path: Path
    shape: tuple[int, ...]
    format: int  # a key of FORMATS
    start: int
    size_bytes: int

    @property
    def has_codes(self) -> bool:
        """Whether it is a matrix whose codes are kept, see `GgufFile.codes`."""
        return len(self.shape) == 2 and FORMATS[self.format][0] in ("Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file, checked to lie wholly inside it; of a model in parts, the first's metadata."""

    path: Path
    fields: Mapping[str, Any]  # metadata: numbers, strings, lists of strings, NumPy arrays of numbers
    entries: Mapping[str, GgufTensor]  # by GGUF name
    header_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def hf_names(self, spec: ModelSpec) -> dict[str, str]:
        """Hugging Face name -> GGUF name of every weight; a name that has no counterpart stands for itself."""
        known = {one.gguf: one.name for slot in all_slots(spec) for one in slot.stored}
        names: dict[str, str] = {}
        for name in self.entries:
            hf_name = known.get(name, name)
            if hf_name in names:
                raise ModelError(f"{self.path} holds {name} twice, also under the name {names[hf_name]}.")
            if name != _ROPE_FACTORS and not self._is_scale(name):
                names[hf_name] = name
        return names

    def _is_scale(self, name: str) -> bool:
        """Whether it is the scale of a tensor in NVFP4, or of that one's inputs, which are not rounded here."""
        weight = self.entries.get(f"{name.rpartition('.')[0]}.weight")
        return name.endswith("scale") and weight is not None and FORMATS[weight.format][0] == "NVFP4"

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a GGUF name: F16, BF16 and F32 in their own dtype, blocks dequantised to float32.

        The rotary layout is the file's; see `to_hf_layout`.
        """
        import torch

        entry = self.entries[name]
        kind, weights, block_bytes = FORMATS[entry.format]
        raw = self._bytes(name)
        if kind in ("F32", "F16", "BF16"):
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            return torch.from_numpy(raw).view(dtype).reshape(entry.shape)
        from tandem.numerics.ggml_bytes import values

        scale = f"{name.removesuffix('weight')}scale"
        whole = self.read(scale) if kind == "NVFP4" and scale in self.entries else None
        if whole is not None and not (whole.numel() == 1 and 0 < float(whole) < math.inf):
            raise ModelError(f"{entry.path}: {scale} is {whole.tolist()}, and no scale of a tensor. {_DAMAGED}")
        return self._sound(name, values(raw, entry.format, (weights, block_bytes), entry.shape, whole))

    def _sound(self, name: str, scaled: torch.Tensor) -> torch.Tensor:
        """What block scales make, or these themselves. ModelError for one that is NaN or infinite."""
        if not bool(scaled.isfinite().all()):
            raise ModelError(
                f"{self.entries[name].path}: tensor {name} has a block whose scale is NaN or infinite. {_DAMAGED}"
            )
        return scaled

    def codes(self, name: str) -> Quantised | None:
        """The matrix of a GGUF name as the file has it: Q4_0, Q4_1 and Q8_0, in groups of 32; None for another format.

        `numerics.quantise.dequantise` of it is `read`. Rows as in the file.
        """
        import torch

        from tandem.numerics.quantise import Quantised

        entry = self.entries[name]
        kind, weights, block_bytes = FORMATS[entry.format]
        if not entry.has_codes:
            return None
        blocks = torch.from_numpy(self._bytes(name)).view(-1, block_bytes)
        head = 4 if kind == "Q4_1" else 2
        halves = self._sound(name, blocks[:, :head].contiguous().view(torch.float16))
        halves = halves.view(entry.shape[0], -1, head // 2)
        codes = blocks[:, head:]
        if kind != "Q8_0":  # the first 16 weights of a block are its low nibbles
            codes = torch.cat([codes & 15, codes >> 4], 1)
        codes = codes.contiguous().view(torch.int8).view(entry.shape)
        if kind == "Q4_0":
            codes -= 8
        minima = halves[..., 1].contiguous() if kind == "Q4_1" else None
        return Quantised(codes, halves[..., 0].contiguous(), 8 if kind == "Q8_0" else 4, weights, minima)

    def _bytes(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            raw = np.fromfile(file, np.uint8, entry.size_bytes)
        if raw.size < entry.size_bytes:
            raise ModelError(f"{entry.path} ended within tensor {name}; the file changed while it was read.")
        return raw


def read_header(path: Path) -> GgufFile:
    """The metadata and tensor table of a GGUF file of version 2 or 3; of a model in parts, those of all its parts.

    Raises ModelError where the file is no GGUF, is cut short, or holds a block format that is not supported.
    """
    try:
        found = _read_part(path)
        count = Fields(str(path), found.fields).take("split.count", whole(0, 65535), 1)
        return found if count <= 1 else _join(path, count)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}. Let it be read, or copy it again.") from error


def _join(path: Path, count: int) -> GgufFile:
    """The model of whose `count` parts `path` is one."""
    named = PART.fullmatch(path.name)
    merge = "or merge them into one file: llama-gguf-split --merge FIRST_PART OUT.gguf"
    if named is None or int(named["count"]) != count:
        raise ModelError(
            f"{path} is one of the {count} parts of a model. Name them NAME-00001-of-{count:05d}.gguf and so on, in "
            f"one folder, {merge}."
        )
    paths = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    absent = [one.name for one in paths if not one.is_file()]
    if absent:
        raise ModelError(
            f"{path} is part {int(named['number'])} of {count} of a model; {len(absent)} are not beside it: "
            f"{', '.join(absent[:3])}. Download them too, {merge}."
        )
    files = [_read_part(one) for one in paths]
    for index, file in enumerate(files):
        own = Fields(str(file.path), file.fields)
        place = own.take("split.no", whole()), own.take("split.count", whole())
        if place != (index, count):
            raise ModelError(
                f"{file.path} says that it is part {place[0] + 1} of {place[1]}, its name {index + 1} of {count}. Give "
                "each part the name that it was published under."
            )
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    held = sum(len(file.entries) for file in files)
    total = Fields(str(files[0].path), files[0].fields).take("split.tensors.count", whole(), held)
    if not len(entries) == held == total:
        raise ModelError(
            f"the {count} parts of {paths[0]} hold {held} tensors, {len(entries)} of them different; there should be "
            f"{total}. They are of different models: download them again, from one place."
        )
    return replace(files[0], entries=entries)


def _read_part(path: Path) -> GgufFile:
    if path.stat().st_size < 24:
        raise _truncated(path, "its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        reader = _Reader(path, view)
        magic, version = view[:4], reader.scalar("<I", 4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}. Give a .gguf file or a folder.")
        if version not in (2, 3):
            raise ModelError(f"{path} has GGUF version {version:#x}; supported: 2, 3. Convert it again.")
        num_tensors, num_fields = reader.scalar("<Q"), reader.scalar("<Q")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = reader.string()
            if name in fields:
                raise ModelError(f"{path} has {shown(name)} twice; the file is damaged. Copy or download it again.")
            fields[name] = reader.value(reader.scalar("<I"))
        table = [(reader.string(), *reader.tensor()) for _ in range(num_tensors)]
        alignment = Fields(str(path), fields).take("general.alignment", whole(1, 65536), 32)
        base = -(-reader.position // alignment) * alignment
        total = len(view)
    entries = {}
    for name, shape, kind, offset in table:
        if kind not in FORMATS:
            raise ModelError(
                f"{path}: tensor {name} has block format {_format_name(kind)}; supported: "
                f"{', '.join(sorted(entry[0] for entry in FORMATS.values()))}. Take the file in one of these."
            )
        label, weights, block_bytes = FORMATS[kind]
        if name in entries:
            raise ModelError(f"{path} has tensor {name} twice; the file is damaged. Copy or download it again.")
        if not shape or 0 in shape or shape[-1] % weights:
            raise ModelError(f"{path}: tensor {name} of shape {shape} is no multiple of {label}'s {weights}.")
        size = math.prod(shape) // weights * block_bytes
        entries[name] = GgufTensor(path, shape, kind, base + offset, size)
        if base + offset + size > total:
            raise _truncated(path, f"tensor {name}, which should end at byte {base + offset + size}")
    return GgufFile(path, fields, entries, base)


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec that the metadata describes. Tied embeddings where `output.weight` is absent."""
    kind = file.architecture
    supported = [name for name, family in FAMILIES.items() if family.gguf_pairs is not None]
    if kind not in supported:
        raise ModelError(
            f"{file.path} has architecture {kind!r}, which is not supported; supported: {', '.join(supported)}. "
            "Choose a model of one of these families."
        )
    own = Fields(
        f"{file.path} ({kind}.*)",
        {name.removeprefix(f"{kind}."): value for name, value in file.fields.items() if name.startswith(f"{kind}.")},
    )
    experts = own.take("expert_count", whole(), 0)
    if experts:
        raise ModelError(f"{file.path} is a mixture of {experts} experts, which is not supported.")
    if "token_embd.weight" not in file.entries:
        raise ModelError(f"{file.path} lacks token_embd.weight; it is no whole model. Take another file.")
    size, real = whole(1), number(0.0, _FLOAT32)
    heads, width = own.take("attention.head_count", size), own.take("embedding_length", size)
    head_size = own.take("attention.key_length", size, width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        found = own.take(name, whole(), head_size)
        if found != head_size:
            raise ModelError(
                f"{file.path} has {name} = {found} for heads of {head_size}; the decoder has one size for keys and "
                "values, and rotates all of it."
            )
    context = own.take("context_length", whole(1, MOST_POSITIONS))
    ids = Fields(str(file.path), file.fields)
    vocabulary = file.entries["token_embd.weight"].shape[0]
    named = token_id(vocabulary)
    bos, eos, eot, pad = (
        ids.take(f"tokenizer.ggml.{name}_token_id", named, None) for name in ("bos", "eos", "eot", "padding")
    )
    spec = ModelSpec(
        architecture=kind,
        vocab_size=vocabulary,
        width=width,
        ff_width=own.take("feed_forward_length", size),
        layers=own.take("block_count", whole(1, MOST_LAYERS)),
        heads=heads,
        kv_heads=own.take("attention.head_count_kv", size, heads),
        head_size=head_size,
        rope_theta=_shortest(own.take("rope.freq_base", number(most=_FLOAT32, above=1.0), 10000.0)),
        rope_scaling=_rope_scaling(own, context),
        norm_eps=_shortest(own.take("attention.layer_norm_rms_epsilon", real, 1e-6)),
        tied_embeddings="output.weight" not in file.entries,
        attention_bias="blk.0.attn_q.bias" in file.entries,
        qk_norm="blk.0.attn_q_norm.weight" in file.entries,
        max_position=context,
        attention=(LayerAttention(Reach(window=own.take("attention.sliding_window", whole(), 0) or None)),),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(one for one in (eos, eot) if one is not None)),
        pad_token_id=pad,
    )
    for name, value in own.values.items():
        known = name in own.taken or name in _SILENT
        if not known and not (isinstance(value, (int, float, str)) and value in _NEUTRAL.get(name, (0, ""))):
            raise ModelError(
                f"{file.path} has {kind}.{name} = {shown(value)}, which the decoder does not have. Take the model as a "
                "Hugging Face folder, or another model."
            )
    return _with_frequency_factors(file, spec)


def to_hf_layout(spec: ModelSpec, hf_name: str, weight: torch.Tensor) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k, [H*D, ...], in files of a family that has it.

    llama.cpp interleaves the two dimensions that rotate together; Hugging Face keeps them D/2 apart.
    """
    return _turned(spec, hf_name, weight, (spec.head_size // 2, 2))


def to_gguf_layout(spec: ModelSpec, hf_name: str, weight: torch.Tensor) -> torch.Tensor:
    """`to_hf_layout` back."""
    return _turned(spec, hf_name, weight, (2, spec.head_size // 2))


def _turned(spec: ModelSpec, hf_name: str, weight: torch.Tensor, parts: tuple[int, int]) -> torch.Tensor:
    if not FAMILIES[spec.architecture].gguf_pairs or ".q_proj." not in hf_name and ".k_proj." not in hf_name:
        return weight
    heads = spec.heads if ".q_proj." in hf_name else spec.kv_heads
    return weight.reshape(heads, *parts, -1).transpose(1, 2).reshape(weight.shape)


class _Reader:
    """A cursor over the header that refuses to leave the file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.position = path, view, 0

    def _advance(self, size: int) -> int:
        start = self.position
        self.position += size
        if self.position > len(self.view):
            raise _truncated(self.path, "its header")
        return start

    def scalar(self, form: str, position: int | None = None) -> Any:
        if position is not None:
            self.position = position
        return struct.unpack_from(form, self.view, self._advance(struct.calcsize(form)))[0]

    def string(self) -> str:
        start = self._advance(self.scalar("<Q"))
        return self.view[start : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("<I"), self.scalar("<Q")
            if element in _SCALARS:
                start = self._advance(count * struct.calcsize(_SCALARS[element]))
                return np.frombuffer(self.view[start : self.position], _SCALARS[element])
            if element == _STRING:
                return self._strings(count)
            raise ModelError(f"{self.path} has an array of unknown type {element}; the file is damaged.")
        if kind not in _SCALARS:
            raise ModelError(f"{self.path} has a metadata value of unknown type {kind}; the file is damaged.")
        return self.scalar(_SCALARS[kind])

    def _strings(self, count: int) -> list[str]:
        view, position, end = self.view, self.position, len(self.view)
        length = struct.Struct("<Q")
        found = []
        for _ in range(count):
            if position + 8 > end:
                raise _truncated(self.path, "its header")
            start = position + 8
            position = start + length.unpack_from(view, position)[0]
            found.append(view[start:position])
        self.position = position
        self._advance(0)
        return [text.decode("utf-8", errors="replace") for text in found]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        count = self.scalar("<I")
        if count > 4:
            raise ModelError(
                f"{self.path} has a tensor of {count} dimensions; GGUF has 4 at most. The file is damaged."
            )
        dims = [self.scalar("<Q") for _ in range(count)]
        return tuple(reversed(dims)), self.scalar("<I"), self.scalar("<Q")


def _truncated(path: Path, where: str) -> ModelError:
    return ModelError(
        f"{path} is truncated: its {path.stat().st_size} bytes end within {where}. Download or copy the file again."
    )


def _format_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _shortest(value: float) -> float:
    # The file holds float32; 9.9999997e-06 was written as 1e-5.
    return float(str(np.float32(value)))


def _rope_scaling(own: Fields, context: int) -> RopeScaling | None:
    """llama.cpp's reading: a factor without a type is linear, and `rope.scale_linear` an older name of it."""
    real = number(0.0, _FLOAT32)
    old = own.take("rope.scale_linear", real, 0.0)
    factor = _shortest(own.take("rope.scaling.factor", real, 0.0) or old or 1.0)
    kind = own.take("rope.scaling.type", text, "linear")
    original = own.take("rope.scaling.original_context_length", whole(), 0) or context
    turns = optional(number(0.0, 1e6))
    fast, slow = (own.take(f"rope.scaling.yarn_beta_{name}", turns, None) for name in ("fast", "slow"))
    if kind == "none" or kind == "linear" and factor == 1.0:
        return None
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise ModelError(
            f"{own.where} has rotary scaling {shown(kind)}; supported: none, linear, yarn, Llama 3's factors."
        )
    return RopeScaling("yarn", factor, original, beta_fast=_shortest(fast or 32.0), beta_slow=_shortest(slow or 1.0))


def _with_frequency_factors(file: GgufFile, spec: ModelSpec) -> ModelSpec:
    """`spec` with the llama3 scaling whose divisors the file lists; the file does not name the parameters.

    Both published sets (Llama 3.1: 8, Llama 3.2: 32) share low 1, high 4 and an original context of 8192.
    """
    if _ROPE_FACTORS not in file.entries:
        return spec
    if file.entries[_ROPE_FACTORS].shape != (spec.head_size // 2,):
        raise ModelError(f"{file.path}: {_ROPE_FACTORS} should hold {spec.head_size // 2} factors. Take another file.")
    factors = np.nan_to_num(file.read(_ROPE_FACTORS).float().numpy())
    if np.allclose(factors, 1.0):
        return spec
    if spec.rope_scaling is not None:
        raise ModelError(
            f"{file.path} has rotary frequency factors and {spec.rope_scaling.kind} scaling; the decoder has one. "
            "Take the model as a Hugging Face folder."
        )
    scaling = RopeScaling("llama3", max(1.0, float(np.round(factors.max()))), 8192, 1.0, 4.0)
    wanted = llama3_frequency_factors(spec, scaling)
    if not np.allclose(factors, wanted, rtol=1e-3):
        raise ModelError(
            f"{file.path} has rotary frequency factors that are not Llama 3.1's or 3.2's. "
            "Take the model as a Hugging Face folder, whose config.json names the parameters."
        )
    return replace(spec, rope_scaling=scaling)
