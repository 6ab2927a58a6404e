"""The command `tandem`: one verb a file, loaded without torch; what goes wrong is printed for the user.

Exit codes: 0 done; 1 something outside tandem failed; 2 what the user gave is wrong; 128 + a signal's number: it
stopped the run, which was saved (130 Ctrl-C, 129 a closed terminal); 141 whoever should read the output has gone.
"""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import tandem
from tandem import env
from tandem.cli import (
    bench,
    catalogue,
    chat,
    convert,
    doctor,
    eval,
    generate,
    numerics,
    replay,
    report,
    rollout,
    route,
    serve,
    simulate,
    study,
    train,
)
from tandem.errors import TandemWarning, UserError, WorldError, nearest
from tandem.run import outlet


class _Verbs(typer.core.TyperGroup):
    """Ctrl-C inside a verb is told from one that it dealt with: typer makes an exit code of both."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise typer.Abort from stopped


app = typer.Typer(
    name="tandem",
    cls=_Verbs,
    help="Post-train language models with the engine and the learner on one forward pass.",
    epilog="tandem VERB --help explains a verb. tandem doctor says what this machine lacks.",
    add_completion=False,
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("rollout")(rollout.rollout)
app.command("replay")(replay.replay)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("route")(route.route)
app.command("convert")(convert.convert)
app.command("report")(report.report)
app.command("numerics")(numerics.numerics)
app.command("recipes")(catalogue.recipes)
app.command("bench")(bench.bench)
app.command("simulate")(simulate.simulate)
app.command("study")(study.study)
app.command("doctor")(doctor.doctor)

KEEPING = ("train", "rollout", "study")  # verbs that store what they print: without a reader they go on, and are fine


def versions(root: Path = Path(tandem.__file__).parents[2]) -> str:
    """tandem with its commit where it runs from a checkout, torch and Python, on one line; loads nothing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    commit = ""
    if (root / ".git").exists():
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        with suppress(OSError):  # no git here
            commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    tail = f" (commit {commit})" if commit else ""
    return f"tandem {tandem.__version__}{tail}, torch {torch}, Python {platform.python_version()}"


def _show_versions(asked: bool) -> None:
    if asked:
        print(versions())
        raise typer.Exit


@app.callback()
def _itself(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_versions, help="Print versions and exit.")
    ] = False,
) -> None: ...


# typer has moved click inside itself: its error class is reached through the one that typer exports.
UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv where `arguments` is None) and return the exit code."""
    outlet.outlive()
    try:
        env.check()
        env.limit_spinning()
        given = list(sys.argv[1:] if arguments is None else arguments)
        with _plain_warnings():
            returned = app(args=given, prog_name="tandem", standalone_mode=False)
        return _shown(returned if isinstance(returned, int) else 0, given)
    except UserError as error:
        return _fail(str(error), 2)
    except WorldError as error:
        return _fail(str(error), 1)
    except UsageProblem as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 130)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """tandem's own warnings on one line, without the line of source that gave them; others as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plain(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
            if issubclass(category, TandemWarning):
                print(f"tandem: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **rest)

        warnings.showwarning = plain
        yield


def _shown(code: int, given: Sequence[str]) -> int:
    """The exit code of a verb, and of its output where nobody has that."""
    sys.stdout.flush()
    reason = outlet.LOST.get("stdout")
    if code or reason is None or given[:1] in [[verb] for verb in KEEPING]:
        return code
    return 141 if reason == os.strerror(errno.EPIPE) else _fail(f"the output could not be written: {reason}.", 1)


def _fail(message: str, code: int) -> int:
    print(f"tandem: {message}", file=sys.stderr)
    return code


def _usage(error: Any) -> int:
    """A wrong verb, flag or argument: one line with the nearest names, and where to read on."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "tandem"
    message = str(error.format_message())
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    if type(error).__name__ == "NoSuchOption":
        flags = [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]
        message = f"{path} has no flag {error.option_name}.{nearest(error.option_name, flags)}"
    elif context is not None and hasattr(context.command, "commands") and message.startswith("No such command"):
        verb = message.split("'")[1]
        message = f"no verb is named {verb}.{nearest(verb, context.command.commands)}"
    message = message.replace("Value error, ", "")
    return _fail(f"{message}\nTry: {path} --help", 2)


def flags() -> list[str]:
    """One line for each argument and flag of each verb, as frozen in tests/goldens/flags.txt."""
    commands: Any = typer.main.get_command(app)
    lines = [f"tandem {'/'.join(parameter.opts)}" for parameter in commands.params]
    for registered in app.registered_commands:
        assert registered.name is not None and registered.callback is not None
        kinds = get_type_hints(registered.callback)
        for parameter in commands.commands[registered.name].params:
            if parameter.name in kinds:
                kind = getattr(kinds[parameter.name], "__name__", str(kinds[parameter.name]))
                default = "required" if parameter.required else f"default {parameter.default}"
                lines.append(f"{registered.name} {'/'.join(parameter.opts)} {kind} {default}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
