"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways, and merged into a model.

What PEFT can say and a decoder here cannot compute is refused by its name in the config; so is a folder whose tensors
are not those of its config, which PEFT itself loads without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tandem.errors import CheckpointError, ConfigError, ModelError
from tandem.models.adapter import AdapterSet, delta
from tandem.models.config import AdapterConfig
from tandem.models.families import FAMILIES
from tandem.models.fields import Fields, Kind, flag, listed, number, read_json, shown, text, whole

if TYPE_CHECKING:
    from tandem.models.checkpoint import Checkpoint
    from tandem.models.decoder import Decoder

N = TypeVar("N", int, float)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base"  # in the file's metadata: the hash of the weights that it was trained on
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
# What a forward pass does not hang on, or hangs on in training alone.
_PASSED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_DRAWN = (True, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base as it was


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """What `adapter_config.json` of a folder says."""

    folder: Path
    config: AdapterConfig
    base: str  # the model that it is of, as the file names it

    def weights(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors, and the file's metadata. ModelError where there is no such file, or it is damaged."""
        with self._file() as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})

    def trained_on(self) -> tuple[str, torch.dtype] | None:
        """The hash of the weights that it was trained on and the dtype that they had; None where the file says none."""
        tensors, said = self.weights()
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.ndim == 2}
        return (said[BASE], kinds.pop()) if said.get(BASE) and len(kinds) == 1 else None

    def check_ranks(self) -> None:
        """ModelError where the file's ranks are not the config's, by which memory is taken. Reads no tensor."""
        with self._file() as file:
            for name in file.keys():
                module, is_down, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
                size, shape = self.config.size(module), tuple(file.get_slice(name).get_shape())
                if is_down and size is not None and shape[:1] != (size[0],):
                    raise ModelError(
                        f"{self.folder / WEIGHTS}: tensor {name} has shape {shape}; {CONFIG} (r, rank_pattern) wants "
                        f"{(size[0], *shape[1:])}. One of the two files is damaged, or another's."
                    )

    @contextmanager
    def _file(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / WEIGHTS
        if not path.is_file():
            raise ModelError(f"{self.folder} has {CONFIG}, but no {WEIGHTS}. Save the adapter as safetensors.")
        try:
            with safe_open(str(path), framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Download or copy the file again.") from error

    def onto(self, decoder: Decoder, name: str = "") -> AdapterSet:
        """For this decoder. ModelError where its layers are others, or the tensors are not those of the config."""
        check_family(decoder.spec.architecture)
        try:
            made = AdapterSet(decoder, self.config, name)
        except ConfigError as error:
            raise ModelError(f"{self.folder / CONFIG}: {error}") from error
        return made.load(self.weights()[0], str(self.folder / WEIGHTS))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: str | Path) -> AdapterFolder:
    """What a folder's config says. ModelError where there is none, or it asks for what is not computed here."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is no adapter: it has no {CONFIG}. Give a folder in PEFT's format.")
    written = read_json(path)
    fields = Fields(str(path), written)
    if written.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {shown(written.get('peft_type'))}; LORA is read, with rsLoRA and DoRA.")
    odd = {name: value for name, value in written.items() if name not in _READ | _PASSED and value and value != "none"}
    if odd.get("init_lora_weights") in _DRAWN:
        del odd["init_lora_weights"]
    if odd:
        raise ModelError(
            f"{path} sets {', '.join(f'{name} to {shown(value)}' for name, value in sorted(odd.items()))}, which is "
            "not computed here. Merge the adapter with PEFT (merge_and_unload) and give the merged model."
        )
    targets = fields.take("target_modules", listed(text))
    try:
        config = AdapterConfig(
            rank=fields.take("r", whole(1)),
            alpha=fields.take("lora_alpha", number(above=0.0)),
            targets=tuple(sorted(targets)),
            rslora=fields.take("use_rslora", flag, False),
            dora=fields.take("use_dora", flag, False),
            rank_pattern=fields.take("rank_pattern", _pairs(whole(1)), ()),
            alpha_pattern=fields.take("alpha_pattern", _pairs(number(above=0.0)), ()),
        )
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from error
    found = AdapterFolder(Path(folder), config, str(written.get("base_model_name_or_path") or ""))
    if (found.folder / WEIGHTS).is_file():
        found.check_ranks()
    return found


def _pairs(kind: Kind[N]) -> Kind[tuple[tuple[str, N], ...]]:
    """An object of patterns, each with a value of `kind`; also null."""

    def accept(value: Any) -> tuple[tuple[str, N], ...]:
        if not isinstance(value, dict | None):
            raise ValueError
        return tuple((pattern, kind.accept(one)) for pattern, one in (value or {}).items())

    return Kind(f"an object of patterns, each with {kind.wanted},", accept)


def base_of(source: str) -> tuple[str, AdapterFolder | None]:
    """A model source as the model that is read and, where the source is an adapter's folder, the adapter on it."""
    folder = Path(source).expanduser()
    if not (folder.is_dir() and is_adapter(folder)):
        return source, None
    found = read_adapter(folder)
    if not found.base:
        raise ModelError(
            f"{folder / CONFIG} names no base_model_name_or_path. Write the model there that the adapter is of."
        )
    return found.base, found


def save_adapter(folder: Path, adapter: AdapterSet) -> None:
    """Write an adapter as PEFT reads it, with the dtype of its values, and which model it is of.

    CheckpointError where the disk refuses; the folder then holds a part.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = adapter.config
    base = adapter.base.source
    place = Path(base).expanduser()
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(place.resolve()) if place.exists() else base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "inference_mode": True,
    }
    # safetensors writes the memory of a view with wrong values or refuses it.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in adapter.export()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", BASE: adapter.base.digest})
        (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}. Free disk space or choose another.") from error


def check_family(architecture: str) -> None:
    """ModelError where the layers of a family have other names in its files than here."""
    if FAMILIES[architecture].renaming is not None:
        raise ModelError(f"adapters of {architecture} models are neither read nor written: their layers lie otherwise.")


def merged(checkpoint: Checkpoint, adapter: AdapterSet) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors with an adapter of it folded in: f (W + s B A), in fp32, in the order of the checkpoint.

    ModelError, at the end, where a layer of the adapter is not among the tensors.
    """
    additions = {f"{one.module}.weight": one for one in adapter.additions}
    for name, tensor in checkpoint.tensors():
        one = additions.pop(name, None)
        if one is None:
            yield name, tensor
            continue
        whole_NK = tensor.to(torch.float32) + delta(one.adapter, one.piece)
        if one.piece.magnitude is not None:
            whole_NK *= (one.piece.magnitude.value / whole_NK.square().sum(1).sqrt())[:, None]
        yield name, whole_NK
    if additions:
        raise ModelError(f"the model's files have no {next(iter(additions))}, which the adapter adds to.")
