"""A checkpoint's quantised matrices by the names of the weights that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tandem.errors import ModelError, nearest
from tandem.models.fields import Fields, read_json, shown
from tandem.models.quantised.compressed import CompressedTensors
from tandem.models.quantised.floats import Fp8, ModelOpt, Mxfp4
from tandem.models.quantised.integers import Awq, Gptq
from tandem.models.quantised.scheme import Held, Scheme, scales_fault

if TYPE_CHECKING:
    import torch

    from tandem.numerics.blocks import Fp4
    from tandem.numerics.quantise import Quantised

METHODS: dict[str, type[Scheme]] = {one.method: one for one in (CompressedTensors, Awq, Gptq, Fp8, ModelOpt, Mxfp4)}
# Files beside config.json that say it, where config.json does not: AutoGPTQ's, AutoAWQ's, ModelOpt's.
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_FLOATS = ("F64", "F32", "F16", "BF16")  # that are weights without a scale
_FAULTS = (KeyError, ValueError, TypeError, IndexError, AssertionError, RuntimeError)  # of parts that do not fit
_SMALL = frozenset({"weight_shape"})  # parts that shapes hang on
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one product in readers, and so one global scale
_WHOLE = frozenset({"weight_global_scale", "weight_scale_2"})


class Stored(Protocol):
    """Tensors of files, by the names there."""

    mapped_bytes: int
    ignored: list[str]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, str]: ...  # as safetensors names them

    def read(self, name: str) -> torch.Tensor: ...


def take_scheme(folder: Path, config: dict[str, Any]) -> Scheme | None:
    """How the matrices of a folder are quantised; takes what says it out of its config. None for none.

    ModelError for a method that is not read.
    """
    places = [config, *(one for one in (config.get("text_config"),) if isinstance(one, dict))]
    found = [one.pop(name, None) for one in places for name in ("quantization_config", "compression_config")]
    given = next((one for one in found if one), None)
    where = f"quantization_config of {folder / 'config.json'}"
    method = given.get("quant_method") if isinstance(given, dict) else None
    if given is None:
        name = next((one for one in SIDE_FILES if (folder / one).is_file()), None)
        if name is None:
            return None
        where, given, method = str(folder / name), read_json(folder / name), SIDE_FILES[name]
    elif isinstance(given, dict) and method is None and "config_groups" in given:
        method = CompressedTensors.method
    if not isinstance(given, dict) or method not in METHODS:
        raise ModelError(
            f"{where} has quant_method {shown(method)}, which is not read; read are {', '.join(METHODS)}."
            f"{nearest(method, METHODS) if isinstance(method, str) else ''} Take the model in one of these, as a GGUF "
            "file or not quantised."
        )
    return METHODS[method](Fields(where, given))


class QuantisedTensors:
    """A store of models/checkpoint.py over one of files."""

    def __init__(self, store: Stored, scheme: Scheme) -> None:
        self._store, self._scheme = store, scheme
        self.mapped_bytes = store.mapped_bytes
        parts: dict[str, dict[str, str]] = {}
        for name in store.shapes:
            module, part = scheme.split(name)
            if part in scheme.parts:
                parts.setdefault(module, {})[part] = name
        kept = {module: found for module, found in parts.items() if _is_quantised(found, scheme)}
        if not kept:
            raise ModelError(
                f"{scheme.where} says {scheme.method}, but no matrix has a {scheme.key} beside it. The config is "
                "another's, or the model is not saved as codes."
            )
        own = {name for found in kept.values() for name in found.values()}
        spare = [name for name in store.shapes if name not in own and scheme.split(name)[1] in scheme.spare]
        self._parts = {f"{module}.weight": found for module, found in kept.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in store.shapes.items():
            if name not in own and name not in spare:
                self.shapes[name] = shape
                if store.dtypes[name].startswith("F8_"):
                    raise ModelError(
                        f"tensor {name} {shape} is of {store.dtypes[name]} and has no scale beside it by "
                        f"{scheme.method}: it stands for no numbers without one. A part is missing, or the config "
                        f"({scheme.where}) is another's."
                    )
                if store.dtypes[name] not in _FLOATS:
                    raise ModelError(
                        f"tensor {name} is of {store.dtypes[name]}, and is no part of what {scheme.method} has. The "
                        f"config is another's, or of a variant that is not read ({scheme.where})."
                    )
        for name, found in self._parts.items():
            if name in store.shapes and (name not in own or "weight_packed" in found):
                raise ModelError(
                    f"{name} is there in {store.dtypes[name]} beside its codes ({self._listed(name)}), and nothing "
                    "says which is the model's. Save the model again, or take it again."
                )
            self.shapes[name] = self._shape(name, found)
        self.coded_bytes = self._coded_bytes()
        notes = list(dict.fromkeys(scheme.notes))
        if spare:
            notes.append(f"{len(spare)} scales of activations or of keys and values, {spare[0]} first")
        notes += self._two_wholes()
        self.ignored = [*store.ignored, *notes]

    def read(self, name: str) -> torch.Tensor:
        return self._held(name).values() if name in self._parts else self._store.read(name)

    def codes(self, name: str) -> Quantised | None:
        return self._held(name).codes() if name in self._parts else None

    def fp4(self, name: str) -> Fp4 | None:
        return self._held(name).fp4() if name in self._parts else None

    def _coded_bytes(self) -> int:
        """Of all matrices where some are codes, the others in bf16; 0 where none is."""
        bits = {
            name: self._scheme.coded_bits(
                name.removesuffix(".weight"), {x: self._store.dtypes[y] for x, y in own.items()}
            )
            for name, own in self._parts.items()
        }
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items() if len(shape) == 2}
        return int(sum((bits.get(name) or 16) * size / 8 for name, size in sizes.items())) if any(bits.values()) else 0

    def _shape(self, name: str, found: Mapping[str, str]) -> tuple[int, ...]:
        shapes = {part: self._store.shapes[own] for part, own in found.items()}
        small = {part: self._store.read(own) for part, own in found.items() if part in _SMALL}
        try:
            return self._scheme.shape(shapes, small)
        except _FAULTS as error:
            raise self._odd(name) from error

    def _held(self, name: str) -> Held:
        parts = {part: self._store.read(own) for part, own in self._parts[name].items()}
        try:
            held = self._scheme.held(name.removesuffix(".weight"), parts)
            held.check(tuple(self.shapes[name]))
        except _FAULTS as error:
            raise self._odd(name) from error
        fault = scales_fault(held.blocks, held.form)
        if fault:
            raise ModelError(f"{name}: {fault} ({self._listed(name)}). The file is damaged: download or copy it again.")
        return held

    def _odd(self, name: str) -> ModelError:
        return ModelError(
            f"the parts of {name} do not fit one another by {self._scheme.method}: {self._listed(name)}. A part is "
            f"missing, the config ({self._scheme.where}) is another's, or the file is damaged."
        )

    def _listed(self, name: str) -> str:
        shapes, dtypes = self._store.shapes, self._store.dtypes
        return ", ".join(
            f"{part} {tuple(shapes[own])} of {dtypes[own]}" for part, own in sorted(self._parts[name].items())
        )

    def _two_wholes(self) -> list[str]:
        """Matrices that are one product in other readers and have global scales of their own: named, each read by its
        own."""
        wholes = {}
        for name, found in self._parts.items():
            for own in (own for part, own in found.items() if part in _WHOLE):
                if math.prod(self._store.shapes[own]) != 1:
                    raise self._odd(name)
                wholes[name.removesuffix(".weight")] = float(self._store.read(own))
        differ = []
        for names in _FUSED:
            for module, whole in wholes.items():
                stem, _, last = module.rpartition(".")
                if last == names[0] and any(wholes.get(f"{stem}.{one}", whole) != whole for one in names[1:]):
                    differ.append(f"{stem}.{'/'.join(names)}")
        if not differ:
            return []
        note = (
            f"one global scale for each of {len(differ)} fused matrices, which have several ({differ[0]} first): each "
            "part is read by its own, where readers with one product for all take one of them"
        )
        return [note]


def _is_quantised(found: Mapping[str, str], scheme: Scheme) -> bool:
    """Whether parts of a module are a matrix: a bare weight is not."""
    return set(found) != {"weight"} and (scheme.key in found or len(found) > 1)
