"""The command line: ``bitring COMMAND``, or ``python -m bitring COMMAND``.

A command is one file in ``bitring/commands``: it holds a click command named ``command``, and the first line of its
docstring is its line in the help. The file is imported when its command runs, so help and the commands that need no MPI
work on a login node.
"""

from __future__ import annotations

import ast
import importlib
import io
import sys
from pathlib import Path

import click

from bitring import __version__
from bitring.exit_codes import ExitCode
from bitring.launcher import launched_rank, unknown_to_mpich

_FOLDER = Path(__file__).resolve().parent / "commands"


class Commands(click.Group):
    """The commands found in the folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, sorted."""
        return sorted(file.stem for file in _FOLDER.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's file; None when there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"bitring.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command lists the known ones."""
        known = self.list_commands(ctx)
        if args[0] not in known:
            ctx.fail(f"unknown command {args[0]!r}; known: {', '.join(known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line a command, read from the file's text: help imports no command."""
        lines: list[tuple[str, str]] = []
        for name in self.list_commands(ctx):
            docstring = ast.get_docstring(ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
            lines.append((name, docstring.partition("\n")[0]))
        with formatter.section("Commands"):
            formatter.write_dl(lines)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bitring")
def _bitring() -> None:
    """Gradient exchange over MPI: AllReduce algorithms, 1-bit gradients, data-parallel training."""


def main() -> None:
    """Run the command line and exit. Of ranks that all refuse their arguments, the first says why."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # µ and ─ are no reason to fail where the locale has none
            stream.reconfigure(errors="replace")
    advice = unknown_to_mpich()
    if advice is not None and launched_rank() == 0:
        click.echo(advice, err=True)  # what MPICH says of it helps nobody
    try:
        status = _bitring(prog_name="bitring", standalone_mode=False)
    except click.ClickException as error:
        if launched_rank() == 0:
            error.show()
        status = error.exit_code
    except click.Abort:  # Ctrl-C
        status = ExitCode.INTERRUPTED
    sys.exit(status)


if __name__ == "__main__":
    main()
