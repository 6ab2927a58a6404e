"""Where a model is read from, by what a config says of it."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import ConfigError, ModelError
from tandem.models.peft import AdapterFolder, base_of
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


def origin_of(source: str) -> tuple[str, AdapterFolder | None]:
    """The weights that a model source is read from and, where it is an adapter or a run that trains one, that."""
    base, adapter = base_of(resolve_source(source))
    if adapter is None:
        return base, None
    base, another = base_of(resolve_source(base))
    if another is not None:
        raise ModelError(f"{source} is an adapter of an adapter, {adapter.base}. Merge that one first.")
    return base, adapter
