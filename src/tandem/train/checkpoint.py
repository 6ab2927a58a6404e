"""A checkpoint's folder: a Hugging Face model, the optimiser's state in shards, and where the run stood.

config.json model.safetensors tokenizer.json ...     what Transformers loads, or where an adapter is trained
adapter_config.json adapter_model.safetensors        what PEFT loads, with the name of the model that it is of
config.json model.safetensors                        of a drafter, where one is trained: what vLLM loads beside a model
optimiser-00001.safetensors ...                      fp32 master weights and moments
critic-00001.safetensors ...                         the same of a critic, where there is one
state.json                                           step, weights, and the state of each part by its name
manifest.json                                        the hash of each other file, without which none is believed
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tandem.algo.objective import Own
from tandem.errors import CheckpointError, RunFolderError
from tandem.models.checkpoint import save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.peft import BASE, read_adapter, save_adapter
from tandem.models.tokenizer import Tokenizer
from tandem.numerics.digest import file_hash
from tandem.train.config import SHARD_BYTES
from tandem.train.optimiser import Optimiser

MANIFEST = "manifest.json"
RESUMES = re.compile(r"optimiser-|critic-|stale-|rollouts\.|state\.json")  # files that only a resumed run reads


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stood. All randomness is derived from (seed, step, prompt, sibling), so this is the whole of it.

    >>> RunState(step=3, updates=3, weights="9f2c", parts={"prompts": {"cursor": 48}}).parts["prompts"]
    {'cursor': 48}
    """

    step: int  # steps finished
    updates: int  # of the optimiser, whose tensors lie beside
    weights: str  # hash of the compute weights
    parts: Mapping[str, Mapping[str, Any]]  # name -> what `Part.state` gave


class Part(Protocol):
    """What a run goes on with."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


def restore_parts(parts: Mapping[str, Part], saved: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Each part its own state; CheckpointError, before any has it, where the names are not the same."""
    lacking, unknown = sorted(set(parts) - set(saved)), sorted(set(saved) - set(parts))
    if lacking or unknown:
        raise CheckpointError(
            f"{directory / 'state.json'} was written by another version of tandem: it lacks the state of "
            f"{', '.join(lacking) or 'nothing'} and has that of {', '.join(unknown) or 'nothing'} beyond this one's "
            f"{', '.join(parts)}. Resume with the version that wrote it, or start a new run with --out."
        )
    for name, part in parts.items():
        try:
            part.restore(saved[name])
        except (ValueError, TypeError, LookupError) as error:
            raise CheckpointError(
                f"the state of {name} in {directory / 'state.json'} cannot be read: {error!r}. Remove the checkpoint "
                "to go on from the one before."
            ) from error


def _before_parts(saved: dict[str, Any]) -> dict[str, Any]:
    """state.json of 0.1 up to November 2026, where the ledger's place held the clock and the price too."""
    if "cursor" not in saved:
        return saved
    held = saved.get("ledger") or {}
    parts = {"prompts": {"cursor": saved["cursor"]}, "ledger": held["ledger"], "clock": {"wall_s": held["wall_s"]}}
    return {name: saved[name] for name in ("step", "updates", "weights")} | {
        "parts": parts | {"price": {"price": held["price"]}}
    }


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def save(
    directory: Path, model: Decoder | Own, optimisers: Mapping[str, Optimiser], tokenizer: Tokenizer, state: RunState
) -> None:
    """Write a checkpoint into an empty directory; the caller renames it into place. `optimisers` by their files' names:
    "optimiser" is the model's, "critic" that of a critic."""
    if not isinstance(model, Decoder):
        model.save(directory)
    elif model.adapter is not None:
        save_adapter(directory, model.adapter)
    else:
        dtype = str(model.dtype).removeprefix("torch.")
        save_checkpoint(directory, model.spec, dict(model.export()), tokenizer, dtype)
    for name, optimiser in optimisers.items():
        for number, shard in enumerate(_shards(optimiser.tensors()), start=1):
            save_file(shard, directory / f"{name}-{number:05d}.safetensors")
    (directory / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")


def seal(directory: Path) -> None:
    """Write down the hashes of all files, the last thing that is done to a checkpoint before it is renamed."""
    hashes = {path.name: file_hash(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"xxh3_128": hashes}, indent=1) + "\n", encoding="utf-8")


def verify(directory: Path, *, resumes: bool = True) -> None:
    """RunFolderError, naming the file, unless the checkpoint is what was saved.

    Not `resumes`: only what a model is read from. Files that are not of the checkpoint may lie there, but no tensors.
    """
    advice = f"Remove {directory} to go on from the checkpoint before it, or from the start where there is none."
    try:
        hashes: dict[str, str] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["xxh3_128"]
        added = {path.name for path in directory.glob("*.safetensors")} - set(hashes)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RunFolderError(
            f"{directory / MANIFEST} cannot be read ({error}), so no file is known. {advice}"
        ) from error
    for name in sorted(added | set(hashes)):
        if not resumes and RESUMES.match(name):
            continue
        try:
            found = file_hash(directory / name)
        except OSError as error:
            raise RunFolderError(f"{directory / name} cannot be read: {error.strerror}. {advice}") from error
        if found != hashes.get(name):
            raise RunFolderError(
                f"{directory / name} is not what was saved: its bytes hash to {found[:12]}, and {MANIFEST} has "
                f"{hashes.get(name, 'no such file')[:12]}. {advice}"
            )


def _read(directory: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(directory.glob(f"{name}-*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # a safe_open cannot be iterated itself
                yield name, shard.get_tensor(name)


def load(directory: Path, decoder: Decoder, optimisers: Mapping[str, Optimiser]) -> RunState:
    """Restore optimisers and what they train.

    RunFolderError where a file is damaged, CheckpointError where it is another's.
    """
    verify(directory)
    if decoder.adapter is not None:
        trained, now = read_adapter(directory).weights()[1].get(BASE), decoder.adapter.base
        if trained != now.digest:
            raise CheckpointError(
                f"the adapter of {directory} was trained on weights that hash to {trained or 'nothing'}, and those of "
                f"{now.source} hash to {now.digest}: the model was changed. Give back the one that the run began with."
            )
    try:
        state = RunState(**_before_parts(json.loads((directory / "state.json").read_text(encoding="utf-8"))))
        for name, optimiser in optimisers.items():
            optimiser.load(_read(directory, name), state.updates)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {directory} cannot be read: {error}. Remove it to go on from the one before."
        ) from error
    return state
