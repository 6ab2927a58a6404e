"""`tandem recipes`: the recipes, and every setting with its type, default and meaning."""

from __future__ import annotations

import ast
import inspect
import json as jsonlib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as its class declares it.

    >>> next(each for each in settings() if each.name == "learner.lr").meaning
    'peak learning rate'
    """

    name: str  # dotted
    type: str
    default: str | None  # as --set takes it; None where a recipe must give it
    meaning: str  # the comment beside the field


def recipes(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Show the values of this recipe; without, list all.")
    ] = None,
    setting: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only settings with this in their name or meaning.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> int:
    """List the recipes and every setting, or the settings of one recipe."""
    from tandem.cli.recipes import find_recipe
    from tandem.config import flatten, render
    from tandem.errors import ConfigError, nearest

    known = list(settings())
    shown = [each for each in known if setting is None or setting.lower() in f"{each.name} {each.meaning}".lower()]
    if not shown:
        names = [each.name for each in known] + [each.name.rpartition(".")[2] for each in known]
        hint = nearest(setting or "", names)
        hint = hint if hint.startswith(" Did") else " `tandem recipes` lists them all."
        raise ConfigError(f"no setting has {setting} in its name or meaning.{hint}")
    values = {} if recipe is None else {name: render(value) for name, value in flatten(find_recipe(recipe)()).items()}
    listed = {} if recipe is not None else summaries()
    rows = [asdict(each) | ({"value": values[each.name]} if values else {}) for each in shown]
    if json:
        of = {"recipes": listed} if recipe is None else {"recipe": recipe}
        print(jsonlib.dumps({**of, "settings": rows}, indent=1))
        return 0
    for name, summary in listed.items() if setting is None else ():
        print(f"{name}\n    {summary}\n")
    _show(rows)
    return 0


def summaries() -> dict[str, str]:
    """Recipe name -> the first line of its docstring, read without running its file."""
    from tandem.cli.recipes import recipe_names

    found = {}
    for name, path in recipe_names().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        found[name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def settings(cls: Any = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config class (RunConfig), those of its parts under their dotted names."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from tandem.config import describe, render
    from tandem.run.config import RunConfig

    cls = cls or RunConfig
    hints, meanings = get_type_hints(cls, include_extras=True), comments(cls)
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from settings(hint, f"{prefix}{field.name}.")
            continue
        default = None if field.default is MISSING else render(field.default)
        yield Setting(prefix + field.name, describe(hint), default, meanings.get(field.name, ""))


@cache
def comments(cls: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    lines, start = inspect.getsourcelines(cls)
    tree = ast.parse(Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            rest = lines[(node.end_lineno or 0) - max(start, 1)].encode()[node.end_col_offset :].decode()
            found[node.target.id] = rest.partition("#")[2].strip()
    return found


def _show(rows: list[dict[str, Any]]) -> None:
    """A line a setting: its name and value (or default), type and meaning; what a recipe changed is marked."""
    for row in rows:
        value = row.get("value", row["default"])
        changed = "value" in row and row["value"] != row["default"]
        given = "(the recipe's to give)" if value is None else value if value.strip() else '""'
        was = f", {row['default']} by default" if changed and row["default"] is not None else ""
        print(f"{'*' if changed else ' '} {row['name']} = {given}\n      {row['meaning']} ({row['type']}{was})")
