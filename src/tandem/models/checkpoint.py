"""Weights in and out: open a model wherever it lies, write one that Transformers loads.

Headers are checked as it is opened: missing, unexpected and misshapen tensors and torn files, before a weight is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tandem.errors import CheckpointError, ModelError, TandemWarning
from tandem.models.families import FAMILIES
from tandem.models.families.family import Renaming
from tandem.models.fields import Fields, read_json, shown, table, token_ids
from tandem.models.gguf import PART, GgufFile, read_header, spec_from_gguf, to_hf_layout
from tandem.models.hf_config import read_config, to_hf_config
from tandem.models.parts import expected_shapes
from tandem.models.places import absent, download, package_file
from tandem.models.scratch import PREFIX, NewTensors, Shape, new_tokenizer
from tandem.models.spec import ModelSpec
from tandem.models.tokenizer import Tokenizer, load_gguf_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from tandem.models.quantised.opened import QuantisedTensors
    from tandem.numerics.blocks import Fp4
    from tandem.numerics.quantise import Quantised

SHARD_BYTES = 5_000_000_000
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_CODES = (*_FLOATS, "F8_E8M0", "U8", "I8", "I32", "I64")
_HOLDS_WEIGHTS = re.compile(
    r"(?!optimi[sz]er|reward_head).*\.(safetensors|gguf|h5|msgpack)"
    r"|(pytorch_model|consolidated|adapter_model).*\.(bin|pth?)"
    r"|adapter_config\.json"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class TensorStore(Protocol):
    """Tensors in Hugging Face names and layout; shapes are known without reading."""

    mapped_bytes: int  # of files whose pages stay with the process as they are read, until it is gone; else 0
    coded_bytes: int  # of the matrices whose codes can be kept, see `Checkpoint.codes`

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def codes(self, name: str) -> Quantised | None: ...

    def fp4(self, name: str) -> Fp4 | None: ...


class Packed(NamedTuple):
    """Quantised matrices to save, by the decoder's names: their tensors by the file's, their shapes, and what the
    config says of them."""

    parts: Mapping[str, Mapping[str, torch.Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]


class Checkpoint:
    """An opened model: its spec, its checked tensors and its tokeniser."""

    def __init__(
        self,
        origin: str,
        spec: ModelSpec,
        store: TensorStore,
        tokenizer_of: Path | GgufFile | Tokenizer,
        ignored: Sequence[str] = (),
    ) -> None:
        self.origin = origin  # what the user gave
        self._store = store
        self._tokenizer_of = tokenizer_of
        self.mapped_bytes, self.coded_bytes = store.mapped_bytes, store.coded_bytes
        self.spec, self._embed = _settle_head(spec, store)
        more = f"; and {len(ignored) - 8} more" if len(ignored) > 8 else ""
        notes = [f"not read: {'; '.join(ignored[:8])}{more}"] if ignored else []
        if self.spec != spec:
            notes.append(
                f"tie_word_embeddings is true, but {_HEAD} is stored and differs from the embedding: read as untied, "
                "as Transformers does"
            )
        shapes = {name: shape for name, shape in store.shapes.items() if name != self._embed}
        if self._embed in store.shapes:
            shapes[_EMBED] = store.shapes[self._embed]
        self.tensor_names: tuple[str, ...] = _check(origin, self.spec, shapes)
        if notes:
            warnings.warn(f"{origin}: {'. '.join(notes)}.", TandemWarning, stacklevel=2)

    @property
    def gguf(self) -> GgufFile | None:
        """The header of the file, where it is one of GGUF."""
        return self._tokenizer_of if isinstance(self._tokenizer_of, GgufFile) else None

    def tensors(self, without: Container[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor in Hugging Face layout) in the order of the forward pass, one read at a time.

        Those of models/parts.py for every family. In the file's own float dtype; float32 for quantised GGUF
        blocks. A tied model gives no `lm_head.weight`. Names of `without` are not read.
        """
        for name in self.tensor_names:
            if name not in without:
                yield name, self._store.read(self._embed if name == _EMBED else name)

    def codes(self, name: str) -> Quantised | None:
        """A matrix as the codes that the file has, in Hugging Face layout; None where it has none that are kept."""
        return self._store.codes(name)

    def fp4(self, name: str) -> Fp4 | None:
        """A matrix of e2m1 with scales in bytes, as the file has it; None where it is none."""
        return self._store.fp4(name)

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokeniser, whose stop ids include those of config.json and generation_config.json."""
        if isinstance(self._tokenizer_of, Tokenizer):
            return self._tokenizer_of
        if isinstance(self._tokenizer_of, GgufFile):
            return load_gguf_tokenizer(self._tokenizer_of, self.spec.eos_token_ids, self.spec.vocab_size)
        path = self._tokenizer_of / "generation_config.json"
        generation = Fields(str(path), read_json(path) if path.is_file() else {})
        generated = generation.take("eos_token_id", token_ids(self.spec.vocab_size), ())
        return load_tokenizer(self._tokenizer_of, (*self.spec.eos_token_ids, *generated), self.spec.vocab_size)


def open_checkpoint(source: str) -> Checkpoint:
    """The model at `source`.

    - a folder with config.json and safetensors (one file, or shards with their index)
    - a `.gguf` file, or a folder that holds one and no config.json
    - `new:width=256,layers=6`: a new model of random weights over bytes (models/scratch.py)
    - `package:NAME`: the GGUF file that an installed package carries; the package is not imported
    - `owner/name` of the Hugging Face hub, where it can be reached or is in the hub's cache

    Raises ModelError that says what is wrong with the path, the file, the architecture or a tensor.
    """
    if source.startswith(PREFIX):
        shape = Shape.read(source)
        return Checkpoint(source, shape.spec(), NewTensors(shape), new_tokenizer())
    if source.startswith("package:"):
        return _open_gguf(source, package_file(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(source, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source} is a file, but not a .gguf file. Give a .gguf file or a Hugging Face folder.")
        return _open_gguf(source, path)
    if _HUB_NAME.fullmatch(source) and path.suffix != ".gguf" and not path.parent.is_dir():
        return _open_folder(source, download(source))
    raise ModelError(f"no model at {source}: {absent(path)}")


def save_checkpoint(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer | None,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    *,
    packed: Packed | None = None,
) -> None:
    """Write config.json, weights of `dtype` ("bfloat16", ...), generation_config.json and the tokeniser into `folder`.
    Matrices of `packed` are written as they are.

    `tensors` are named and laid out as those of `Checkpoint.tensors`; a tied model's `lm_head.weight` is left out.
    Weights over `shard_bytes` are split with an index. Raises ModelError where the tensors are not those of `spec`,
    CheckpointError where the disk refuses; `folder` then holds a part, so write aside and rename.
    """
    packed = packed or Packed({}, {}, {})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = _check("the model to save", spec, shapes | dict(packed.shapes))
    stop_ids = tokenizer.stop_token_ids if tokenizer is not None else spec.eos_token_ids
    generation = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(stop_ids) or None,
        "pad_token_id": spec.pad_token_id,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [(name, tensors[name]) for name in names if name not in packed.parts]
        renaming = FAMILIES[spec.architecture].renaming
        if renaming is not None:
            written = [(renaming.write_name(name), renaming.write(spec, name, one)) for name, one in written]
        codes = [part for name in names for part in packed.parts.get(name, {}).items()]
        _write_weights(folder, written, codes, dtype, shard_bytes)
        own = {"quantization_config": packed.config} if packed.config else {}
        _write_json(folder / "config.json", to_hf_config(spec, dtype) | own)
        _write_json(
            folder / "generation_config.json", {name: value for name, value in generation.items() if value is not None}
        )
        if tokenizer is not None:
            tokenizer.save(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}. Free disk space or choose another.") from error


class _Safetensors:
    """The safetensors files of a folder."""

    coded_bytes = 0

    def __init__(self, folder: Path, kinds: Sequence[str] = _FLOATS) -> None:
        self._file_of: dict[str, Path] = {}
        self._kinds = kinds
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._opened: dict[Path, Any] = {}
        index = folder / _INDEX
        places = _places(index) if index.is_file() else {}
        names = sorted(path.name for path in folder.iterdir())
        if not places and not (folder / _WEIGHTS).is_file():
            raise ModelError(
                f"{folder} has neither {_WEIGHTS} nor {_INDEX}; it holds {', '.join(names[:12]) or 'nothing'}. "
                "Save the model as safetensors (Transformers: save_pretrained); shards need their index."
            )
        read = set(places.values()) or {_WEIGHTS}
        if _WEIGHTS not in read and _WEIGHTS in names:
            raise ModelError(
                f"{folder} holds two models: {_INDEX} does not name {_WEIGHTS}, which Transformers would read. Delete "
                "the one that is not meant."
            )
        self.ignored = [name for name in names if name not in read and _HOLDS_WEIGHTS.fullmatch(name)]
        for name in sorted(read):
            path = folder / name
            if not path.is_file():
                raise ModelError(f"{index} names the shard {name}, which is not there. Copy or download it again.")
            self._take(path, places)
        self.mapped_bytes = sum(path.stat().st_size for path in self._opened)
        absent = [tensor for tensor in places if tensor not in self.shapes]
        if absent:
            raise ModelError(f"{index} places {shown(absent[0])} in {places[absent[0]]}, which does not hold it.")

    def _take(self, path: Path, places: Mapping[str, str]) -> None:
        """The tensors of a file, but for copies of those that the index places in another."""
        opened = self._open(path)
        for tensor in opened.keys():
            place = places.get(tensor, path.name)
            if place != path.name:
                self.ignored.append(f"{tensor} in {path.name} (the index places it in {place})")
                continue
            if tensor in self._file_of:
                raise ModelError(
                    f"{path} and {self._file_of[tensor].name} both hold {tensor}, and the index names neither. Add "
                    "it to the index's weight_map, or remove the one that is not meant."
                )
            part = opened.get_slice(tensor)
            if part.get_dtype() not in self._kinds:
                raise ModelError(
                    f"{path}: tensor {tensor} is of {part.get_dtype()}; supported: {', '.join(self._kinds)}. "
                    "Choose a model that is not quantised so, or a GGUF file."
                )
            self._file_of[tensor], self.shapes[tensor] = path, tuple(part.get_shape())
            self.dtypes[tensor] = part.get_dtype()

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._opened:
            try:
                self._opened[path] = safe_open(str(path), framework="pt")
            except SafetensorError as error:
                raise ModelError(
                    f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {error}. "
                    "Download or copy the file again."
                ) from error
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error}. Let it be read, or copy it again.") from error
        return self._opened[path]

    def read(self, name: str) -> torch.Tensor:
        return self._open(self._file_of[name]).get_tensor(name)

    def codes(self, name: str) -> Quantised | None:
        return None

    def fp4(self, name: str) -> Fp4 | None:
        return None


class _Renamed:
    """The tensors of a checkpoint whose family has other names or another layout."""

    def __init__(self, store: _Safetensors | QuantisedTensors, spec: ModelSpec, renaming: Renaming) -> None:
        self._store, self._spec, self._renaming = store, spec, renaming
        named = [(renaming.read_name(name), name) for name in store.shapes]
        self._names = {name: own for name, own in named if name is not None}
        images = sum(name is None for name, _ in named)
        if len(self._names) + images < len(named):
            own = next(own for name, own in named if name is not None and self._names[name] != own)
            raise ModelError(
                f"the model holds {own} twice, also under another prefix. Remove the one that is not meant."
            )
        self.ignored = [*store.ignored, *([f"{images} tensors of the images' side"] if images else [])]
        self.shapes = {name: store.shapes[own] for name, own in self._names.items()}
        self.mapped_bytes, self.coded_bytes = store.mapped_bytes, 0

    def read(self, name: str) -> torch.Tensor:
        return self._renaming.read(self._spec, name, self._store.read(self._names[name]))

    def codes(self, name: str) -> Quantised | None:
        return None  # their rows are in another order

    def fp4(self, name: str) -> Fp4 | None:
        return None


class _Gguf:
    """The tensors of a GGUF file."""

    mapped_bytes = 0

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self._file, self._spec = file, spec
        self._names = file.hf_names(spec)
        self.shapes = {name: file.entries[own].shape for name, own in self._names.items()}
        self.coded_bytes = sum(entry.size_bytes for entry in file.entries.values() if entry.has_codes)

    def read(self, name: str) -> torch.Tensor:
        return to_hf_layout(self._spec, name, self._file.read(self._names[name]))

    def codes(self, name: str) -> Quantised | None:
        found = self._file.codes(self._names[name])
        if found is None:
            return None
        codes_NK, scales_NG = (to_hf_layout(self._spec, name, part) for part in (found.codes_NK, found.scales_NG))
        minima_NG = None if found.minima_NG is None else to_hf_layout(self._spec, name, found.minima_NG)
        return replace(found, codes_NK=codes_NK, scales_NG=scales_NG, minima_NG=minima_NG)

    def fp4(self, name: str) -> Fp4 | None:
        return None  # its blocks have other scales, or another order


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards."""
    places = Fields(str(index), read_json(index)).take("weight_map", table)
    if not places:
        raise ModelError(f"{index} has an empty weight_map; it is no index of shards. Copy or download it again.")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or not 0 < len(name) <= 200:
            raise ModelError(
                f"{index} places {shown(tensor)} in {shown(name)}; the name of a file beside it is needed. Copy or "
                "download it again."
            )
    return places


def _settle_head(spec: ModelSpec, store: TensorStore) -> tuple[ModelSpec, str]:
    """What Transformers makes of the head of a tied model: the spec, and the name that the embedding is stored under.

    A stored head that differs makes the model untied; a matrix stored only as the head is the embedding.
    """
    shapes = store.shapes
    if not spec.tied_embeddings or _HEAD not in shapes:
        return spec, _EMBED
    if _EMBED not in shapes:
        return spec, _HEAD
    return (spec if _same_values(store, _EMBED, _HEAD) else replace(spec, tied_embeddings=False)), _EMBED


def _same_values(store: TensorStore, one: str, other: str) -> bool:
    import torch

    if store.shapes[one] != store.shapes[other]:
        return False
    first, second = store.read(one), store.read(other)
    if first.dtype != second.dtype or first.itemsize == 1:
        first, second = first.double(), second.double()
    return torch.equal(first, second)


def _open_gguf(source: str, path: Path) -> Checkpoint:
    file = read_header(path)
    spec = spec_from_gguf(file)
    return Checkpoint(source, spec, _Gguf(file, spec), file)


def _open_folder(source: str, folder: Path) -> Checkpoint:
    config = folder / "config.json"
    if config.is_file():
        from tandem.models.quantised.opened import QuantisedTensors, take_scheme

        values = read_json(config)
        scheme = take_scheme(folder, values)
        spec, unread = read_config(Fields(str(config), values))
        plain = _Safetensors(folder, _FLOATS if scheme is None else _CODES)
        stored = plain if scheme is None else QuantisedTensors(plain, scheme)
        renaming = FAMILIES[spec.architecture].renaming
        store = _Renamed(stored, spec, renaming) if renaming is not None else stored
        return Checkpoint(source, spec, store, folder, [*store.ignored, *(f"{name} of config.json" for name in unread)])
    files = sorted(folder.glob("*.gguf"))
    parts = [PART.fullmatch(path.name) for path in files]
    if len(files) == 1 or len({part and (part["stem"], part["count"]) for part in parts}) == 1 and all(parts):
        return _open_gguf(source, files[0])
    found = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in found:
        raise ModelError(
            f"{folder} is an adapter, and no whole model. Fold it into its model first: tandem convert merge {folder} "
            "--out DIR; then give DIR."
        )
    raise ModelError(
        f"{folder} is no model folder: it has no config.json and {len(files)} GGUF files; it holds "
        f"{', '.join(found[:12]) or 'nothing'}. Give the folder that has config.json, or one .gguf file."
    )


def _check(origin: str, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names to read, each present with the spec's shape, and no others. Raises ModelError otherwise."""
    wanted = expected_shapes(spec)
    missing = [name for name in wanted if name not in shapes]
    reason = "The file is incomplete or the config is another's."
    if missing in ([_HEAD], [_EMBED]):
        reason = (
            "tie_word_embeddings of config.json is false, or left out, which means false: set it to true if the "
            "model's head is its embedding; else the file is incomplete."
        )
    if missing:
        raise ModelError(
            f"{origin} lacks {len(missing)} of the {len(wanted)} tensors of its config: {_listed(missing)}; "
            f"{missing[0]} should have shape {wanted[missing[0]]}. {reason}"
        )
    ignored = {_HEAD} if spec.tied_embeddings else set()
    unexpected = [
        name for name in shapes if name not in wanted and name not in ignored and not name.endswith(".inv_freq")
    ]
    if unexpected:
        raise ModelError(
            f"{origin} has {len(unexpected)} tensors that a {spec.architecture} model of its config does not: "
            f"{_listed(unexpected)}; {unexpected[0]} has shape {tuple(shapes[unexpected[0]])}. "
            "The config is another's, or the model is of a variant that is not supported."
        )
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ModelError(
                f"{origin}: tensor {name} has shape {tuple(shapes[name])}; its config wants {shape}. "
                "The config is another's, or the file is damaged."
            )
    return tuple(wanted)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _write_weights(
    folder: Path,
    floats: list[tuple[str, torch.Tensor]],
    codes: list[tuple[str, torch.Tensor]],
    dtype: str,
    shard_bytes: int,
) -> None:
    """`floats` in `dtype`, `codes` as they are."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    filled = total = 0
    kept = {name for name, _ in codes}
    for name, tensor in (*floats, *codes):
        size = tensor.numel() * (tensor.itemsize if name in kept else kind.itemsize)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += size
        total += size
    place: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = _WEIGHTS if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        place |= {name: file for name, _ in shard}
        ready = {
            name: tensor.detach().to("cpu", tensor.dtype if name in kept else kind).contiguous()
            for name, tensor in shard
        }
        try:
            save_file(ready, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file} could not be written: {error}. Free disk space.") from error
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
