"""GGUF files: header, metadata -> ModelSpec, tensors in Hugging Face names and layout.

The header is read here because `gguf.GGUFReader` makes a NumPy view of every vocabulary entry: 1.8 s for
SmolLM2's 98,000 strings, against 0.03 s. Blocks are dequantised by `gguf.quants`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.errors import ModelError
from tandem.models.spec import ARCHITECTURES, LayerAttention, ModelSpec, RopeScaling, llama3_frequency_factors
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
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's frequency divisors; a property of the spec, not a weight
# gguf dequantises 16 rows at a time whatever their length. Rows of 32768 weights took 0.20 s for SmolLM2's Q4_1 file,
# its own rows of 576 took 0.87 s, one row for the whole tensor 0.50 s (one core).
_ROW_WEIGHTS = 32768


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: shape in PyTorch's order (rows first), block format, byte range of the file."""

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
    """The header of a GGUF file, checked to lie wholly inside it."""

    path: Path
    fields: Mapping[str, Any]  # metadata: numbers, strings, lists of strings, NumPy arrays of numbers
    entries: Mapping[str, GgufTensor]  # by GGUF name
    header_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def hf_names(self) -> dict[str, str]:
        """Hugging Face name -> GGUF name of every weight; a name that has no counterpart stands for itself."""
        return {_hf_name(name): name for name in self.entries if name != _ROPE_FACTORS}

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
        from gguf import GGMLQuantizationType, dequantize

        blocks = raw.size // block_bytes
        row_blocks = min(blocks, _ROW_WEIGHTS // weights)
        while blocks % row_blocks:
            row_blocks -= 1
        values = dequantize(raw.reshape(-1, row_blocks * block_bytes), GGMLQuantizationType(entry.format))
        return torch.from_numpy(values).reshape(entry.shape)

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
        halves = blocks[:, :head].contiguous().view(torch.float16).view(entry.shape[0], -1, head // 2)
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
        with self.path.open("rb") as file:
            file.seek(entry.start)
            raw = np.fromfile(file, np.uint8, entry.size_bytes)
        if raw.size < entry.size_bytes:
            raise ModelError(f"{self.path} ended within tensor {name}; the file changed while it was read.")
        return raw


def read_header(path: Path) -> GgufFile:
    """The metadata and tensor table of a GGUF file of version 2 or 3.

    Raises ModelError where the file is no GGUF, is cut short, or holds a block format that is not supported.
    """
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
            fields[name] = reader.value(reader.scalar("<I"))
        table = [(reader.string(), *reader.tensor()) for _ in range(num_tensors)]
        alignment = int(fields.get("general.alignment", 32))
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
        if not shape or shape[-1] % weights:
            raise ModelError(f"{path}: tensor {name} of shape {shape} is no multiple of {label}'s {weights}.")
        size = int(np.prod(shape, dtype=np.int64)) // weights * block_bytes
        entries[name] = GgufTensor(shape, kind, base + offset, size)
        if base + offset + size > total:
            raise _truncated(path, f"tensor {name}, which should end at byte {base + offset + size}")
    return GgufFile(path, fields, entries, base)


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec that the metadata describes. Tied embeddings where `output.weight` is absent."""
    kind = file.architecture
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} has architecture {kind!r}, which is not supported; supported: {', '.join(ARCHITECTURES)}. "
            "Choose a model of one of these families."
        )
    fields = {
        name.removeprefix(f"{kind}."): value for name, value in file.fields.items() if name.startswith(f"{kind}.")
    }
    if fields.get("expert_count"):
        raise ModelError(f"{file.path} is a mixture of {fields['expert_count']} experts, which is not supported.")
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    absent = [f"{kind}.{name}" for name in needed if not isinstance(fields.get(name), int)]
    if absent or "token_embd.weight" not in file.entries:
        raise ModelError(
            f"{file.path} lacks {', '.join(absent) or 'token_embd.weight'}; it is no whole model. Take another file."
        )
    heads, width = fields["attention.head_count"], fields["embedding_length"]
    head_size = int(fields.get("attention.key_length", width // heads))
    if fields.get("rope.dimension_count", head_size) != head_size:
        raise ModelError(
            f"{file.path} rotates {fields['rope.dimension_count']} of {head_size} dimensions a head; all are needed."
        )
    ids = {name: file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    spec = ModelSpec(
        architecture=kind,
        vocab_size=file.entries["token_embd.weight"].shape[0],
        width=width,
        ff_width=fields["feed_forward_length"],
        layers=fields["block_count"],
        heads=heads,
        kv_heads=fields.get("attention.head_count_kv", heads),
        head_size=head_size,
        rope_theta=_shortest(fields.get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(file.path, fields),
        norm_eps=_shortest(fields.get("attention.layer_norm_rms_epsilon", 1e-6)),
        tied_embeddings="output.weight" not in file.entries,
        attention_bias="blk.0.attn_q.bias" in file.entries,
        qk_norm="blk.0.attn_q_norm.weight" in file.entries,
        max_position=fields["context_length"],
        attention=(LayerAttention(Reach(window=fields.get("attention.sliding_window"))),),
        bos_token_id=ids["bos"],
        eos_token_ids=tuple(dict.fromkeys(one for one in (ids["eos"], ids["eot"]) if one is not None)),
        pad_token_id=ids["padding"],
    )
    return _with_frequency_factors(file, spec)


def to_hf_layout(spec: ModelSpec, hf_name: str, weight: torch.Tensor) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k, [H*D, ...], in files of architecture llama.

    llama.cpp interleaves the two dimensions that rotate together; Hugging Face keeps them D/2 apart.
    """
    if spec.architecture != "llama" or ".q_proj." not in hf_name and ".k_proj." not in hf_name:
        return weight
    heads = spec.heads if ".q_proj." in hf_name else spec.kv_heads
    pairs = weight.reshape(heads, spec.head_size // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


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
            return [self.value(element) for _ in range(count)]
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
        dims = [self.scalar("<Q") for _ in range(self.scalar("<I"))]
        return tuple(reversed(dims)), self.scalar("<I"), self.scalar("<Q")


def _truncated(path: Path, where: str) -> ModelError:
    return ModelError(
        f"{path} is truncated: its {path.stat().st_size} bytes end within {where}. Download or copy the file again."
    )


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _NAMES:
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return name


def _format_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _shortest(value: float) -> float:
    # The file holds float32; 9.9999997e-06 was written as 1e-5.
    return float(str(np.float32(value)))


def _rope_scaling(path: Path, fields: Mapping[str, Any]) -> RopeScaling | None:
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = _shortest(fields.get("rope.scaling.factor", 1.0))
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise ModelError(f"{path} has rotary scaling {kind!r}; supported: none, linear, yarn and Llama 3's factors.")
    return RopeScaling(
        "yarn",
        factor,
        int(fields.get("rope.scaling.original_context_length", fields["context_length"])),
        beta_fast=_shortest(fields.get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_shortest(fields.get("rope.scaling.yarn_beta_slow", 1.0)),
    )


def _with_frequency_factors(file: GgufFile, spec: ModelSpec) -> ModelSpec:
    """`spec` with the llama3 scaling whose divisors the file lists; the file does not name the parameters.

    Both published sets (Llama 3.1: 8, Llama 3.2: 32) share low 1, high 4 and an original context of 8192.
    """
    if _ROPE_FACTORS not in file.entries:
        return spec
    factors = file.read(_ROPE_FACTORS).float().numpy()
    if np.allclose(factors, 1.0):
        return spec
    scaling = RopeScaling("llama3", float(round(factors.max())), 8192, 1.0, 4.0)
    wanted = llama3_frequency_factors(spec, scaling)
    if factors.shape != (len(wanted),) or not np.allclose(factors, wanted, rtol=1e-3):
        raise ModelError(
            f"{file.path} has rotary frequency factors that are not Llama 3.1's or 3.2's. "
            "Take the model as a Hugging Face folder, whose config.json names the parameters."
        )
    return replace(spec, rope_scaling=scaling)
