"""Where a model is read from, by what a config says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError, ModelError, RunFolderError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.fields import read_json
from tandem.models.hf_config import from_hf_config
from tandem.models.peft import CONFIG, AdapterFolder, base_of
from tandem.models.scratch import PREFIX, Shape
from tandem.models.spec import ModelSpec
from tandem.run.folder import latest_checkpoint
from tandem.train.checkpoint import MANIFEST, verify


def resolve_source(source: str) -> str:
    """A model source; a run folder stands for its newest checkpoint."""
    folder = Path(source)
    if not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        if (folder / MANIFEST).is_file():  # a run's checkpoint
            verify(folder, resumes=False)
        return source
    saved = latest_checkpoint(folder)
    if saved is None:
        raise ConfigError(f"the run {folder} has no checkpoint yet; it saves one in time, at its end and on Ctrl-C.")
    verify(saved.path, resumes=False)
    return str(saved.path)


ROUNDED = ("weights", "kv", "logits")  # settings of model.* by which a policy is rounded as it is computed
PLAIN = {f"model.{name}": str(getattr(ModelConfig("none"), name)) for name in ROUNDED}


def trained_as(source: str) -> dict[str, str]:
    """Of a run, or of one of its checkpoints: the settings of ROUNDED that its config says and that are not a plain
    run's, by their whole names; none for another model. A checkpoint has the weights, not what they are rounded to.
    """
    place = Path(source).expanduser()
    folder = next(
        (
            one
            for one in (place, place.parent.parent)
            if (one / "config.json").is_file() and (one / "checkpoints").is_dir()
        ),
        None,
    )
    if folder is None or (folder != place and place.parent.name != "checkpoints"):
        return {}
    try:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model", {})
        named = {f"model.{name}": str(model[name]) for name in ROUNDED if name in model}  # older runs have fewer
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{folder / 'config.json'} names no model ({error}). Restore the file.") from error
    return {name: value for name, value in named.items() if value != PLAIN[name]}


def rounded_by(model: ModelConfig) -> dict[str, str]:
    """Those of ROUNDED that are not a plain run's, by their whole names."""
    found = {f"model.{name}": str(getattr(model, name)) for name in ROUNDED}
    return {name: value for name, value in found.items() if value != PLAIN[name]}


def say_trained_as(source: str, given: Collection[str], *, taken: str = "", left: str = "") -> dict[str, str]:
    """`trained_as` but for what is `given`, said on stderr: that a verb has `taken` it, or has `left` it out."""
    found = {name: value for name, value in trained_as(source).items() if name not in given}
    if found:
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        how = f"{taken} rounds alike" if taken else f"{left} takes its weights as they are saved, not rounded"
        print(f"{source} was trained with {told}: {how}.", file=sys.stderr, flush=True)
    return found


def origin_of(source: str, base: str = "") -> tuple[str, AdapterFolder | None]:
    """The weights that a model source is read from and, where it is an adapter or a run that trains one, that. `base`:
    a model in place of the one that an adapter names."""
    named, adapter = base_of(resolve_source(source))
    if adapter is None:
        return named, None
    base, place = base or named, Path(named).expanduser()
    if base == named and place.is_absolute() and not place.exists():
        raise ModelError(
            f"{adapter.folder} is an adapter of {named} (base_model_name_or_path in its {CONFIG}), and there is "
            "nothing: the model was moved or removed. Put it back there, or a link to where it is now, or write its "
            f"new place into {CONFIG} (not in a run's checkpoint, whose files are hashed). To merge it give the place: "
            "tandem convert merge ... --base MODEL."
        )
    base, another = base_of(resolve_source(base))
    if another is not None:
        raise ModelError(f"{source} is an adapter of an adapter, {adapter.base}. Merge that one first.")
    return base, adapter


def spec_of(source: str) -> ModelSpec:
    """The shape of a model, by what a config says of it. A folder needs no weights: its config.json is enough."""
    if source.startswith(PREFIX):
        return Shape.read(source).spec()
    config = Path(source).expanduser() / "config.json"
    if config.is_file() and not (config.parent / "checkpoints").is_dir():
        return from_hf_config(read_json(config))
    return open_checkpoint(resolve_source(source)).spec


class Same:
    """A part of a checkpoint: a run that goes on has beside it what it began with. `named`: the setting and its value;
    `anew`: the setting by which another run begins with what this one learned."""

    def __init__(self, named: str, digest: str, anew: str) -> None:
        self._named, self._digest, self._anew = named, digest, anew

    def state(self) -> dict[str, Any]:
        return {"digest": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """RunFolderError where it is another."""
        if state["digest"] != self._digest:
            raise RunFolderError(
                f"{self._named} hashes to {self._digest[:12]} now, and the run began with {state['digest'][:12]}: it "
                f"was trained on, or written anew. Put the first back, or start a new run from this one: --set "
                f"{self._anew}=RUN."
            )
