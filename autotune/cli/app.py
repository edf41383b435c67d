"""The command ``autotune``: its verbs, and the place where errors become a line."""

from __future__ import annotations

import io
import os
import sys
import warnings

import click
import typer

from autotune import __version__
from autotune.cli import machines, profile
from autotune.cli.env import env
from autotune.cli.models import models
from autotune.cli.optimizations import optimizations
from autotune.cli.plan import plan, predict
from autotune.cli.probe import probe
from autotune.cli.run import run
from autotune.errors import AutotuneError, first_line

# Notes that libraries print about optional packages and profiling; errors still raise.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

app = typer.Typer(
    help="Make a diffusers pipeline run as fast as this machine allows, without out-of-memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (run, probe, plan, predict, models, optimizations, env):
    app.command()(verb)
app.add_typer(profile.app, name="profile")
app.add_typer(machines.app, name="machines")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; every expected error ends in one line, a remedy and exit code 1."""
    for name, level in _QUIET.items():
        os.environ.setdefault(name, level)
    # What libraries deprecate is for programmers, and no terminal's encoding is worth a traceback.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # In standalone mode click would swallow Ctrl-C without a word.
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except AutotuneError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.hint:
            typer.echo(f"  try: {error.hint}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has seen enough
        sys.exit(1)
    except Exception as error:
        # By name: naming torch's class would import it.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        typer.echo(f"error: out of memory: {first_line(error)}", err=True)
        typer.echo("  try: --vram-limit with less, a smaller image, or --quality high", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
