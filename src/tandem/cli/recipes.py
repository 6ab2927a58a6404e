"""Find a recipe by name among tandem's own, or in a file of the user's, without importing the others."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tandem
from tandem.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tandem.run.config import RunConfig

FOLDER = Path(tandem.__file__).parent / "recipes"


def functions(path: Path) -> list[str]:
    """Names of the recipes in a file: public functions annotated `-> RunConfig`, read without running the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe file {path} is not Python: {error}.") from error
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and node.returns is not None
        and ast.unparse(node.returns).strip("'\"").rpartition(".")[2] == "RunConfig"
    ]


def recipe_names(folder: Path = FOLDER) -> dict[str, Path]:
    """Recipe name -> the file that holds it."""
    return {name: path for path in sorted(folder.glob("*.py")) for name in functions(path)}


def find_recipe(name: str, folder: Path = FOLDER) -> Callable[[], RunConfig]:
    """The recipe `name`: one of tandem's, or `path/to/file.py:function` (the function may be left out where the file
    has one). Raises ConfigError with the nearest names.
    """
    known = recipe_names(folder)
    if name in known:
        return _load(known[name], name)
    file, colon, function = name.rpartition(":")
    if not colon or file.endswith(":"):
        file, function = name, ""
    if file.endswith(".py"):
        return _from_file(Path(file).expanduser(), function)
    raise ConfigError(
        f"no recipe is named {name}.{nearest(name, known)} A recipe of your own is given as path/to/file.py:function."
    )


def _from_file(path: Path, function: str) -> Callable[[], RunConfig]:
    if not path.is_file():
        raise ConfigError(f"the recipe file {path} does not exist.")
    names = functions(path)
    if not names:
        raise ConfigError(f"{path} has no recipe: write a function annotated `-> RunConfig` that takes no arguments.")
    if not function and len(names) > 1:
        raise ConfigError(f"{path} has several recipes. Choose one: " + ", ".join(f"{path}:{n}" for n in names) + ".")
    if function and function not in names:
        raise ConfigError(f"{path} has no recipe named {function}.{nearest(function, names)}")
    return _load(path, function or names[0])


def _load(path: Path, function: str) -> Callable[[], RunConfig]:
    own = path.parent == FOLDER
    module_name = f"tandem.recipes.{path.stem}" if own else f"tandem_user_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe: Callable[[], RunConfig] = getattr(module, function)
    required = [p.name for p in inspect.signature(recipe).parameters.values() if p.default is p.empty]
    if required:
        raise ConfigError(
            f"the recipe {function} of {path} asks for {', '.join(required)}; a recipe takes no arguments."
        )
    return recipe


def parse_settings(texts: Iterable[str]) -> dict[str, str]:
    """`["learner.lr=2e-5"]` -> {"learner.lr": "2e-5"}; the last of a name counts."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {text}: wanted dotted.name=value, such as --set learner.lr=2e-5.")
        settings[name.strip()] = value
    return settings
