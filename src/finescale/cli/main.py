"""Entry point of ``finescale``."""

from __future__ import annotations

import sys

import typer

from finescale._version import __version__
from finescale.cli import bench, compare, convert, demo, evaluate, inspect, mix, quantize, recipes, serve, verify
from finescale.cli.common import stderr
from finescale.environment import wait_without_spinning
from finescale.errors import FinescaleError

RESUMED = ("quantize", "compare", "mix", "demo")
"""Commands that find again what they did before they were stopped."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize large language models after training, and run them fast.",
)
app.command("quantize")(quantize.quantize)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("mix")(mix.mix)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("convert")(convert.convert)
app.command("recipes")(recipes.recipes)
app.command("demo")(demo.demo)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.add_typer(bench.app, name="bench", help="Benchmarks against baselines in the same run.")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Quantize large language models after training, and run them fast."""


def main() -> None:
    """Run the command line; an expected error is one sentence and exit code 1."""
    wait_without_spinning()
    try:
        app()
    except FinescaleError as error:
        stderr.print(f"[bold red]Error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        # A full disk, a path that cannot be written: the machine's fault, not finescale's.
        place = f"{error.filename}: " if error.filename else ""
        stderr.print(f"[bold red]Error:[/] {_escaped(place)}{_escaped(error.strerror or str(error))}.", soft_wrap=True)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # By its name: this file must not load torch, which raises it for GPUs.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        place = "memory" if isinstance(error, MemoryError) else "the GPU's memory"
        stderr.print(
            f"[bold red]Error:[/] {place} is used up; finished blocks are kept, so start again when other programs "
            "need less, or with fewer --samples or a shorter --length.",
            soft_wrap=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        _say_stopped()
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:  # typer has turned Ctrl-C into an exit without a word
            _say_stopped()
        raise


def _say_stopped() -> None:
    goes_on = sys.argv[1:2] and sys.argv[1] in RESUMED
    stderr.print("Stopped; start the same command again to go on with what is left." if goes_on else "Stopped.")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
