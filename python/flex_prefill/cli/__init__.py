"""The command line.

    flexprefill demo | bench | inspect | calibrate | eval | test-llm | info

Exit code 0: done; 1: failed, with one line that says what and how to mend it; 2: bad usage.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import flex_prefill
import flex_prefill.cli.bench as bench
import flex_prefill.cli.calibrate as calibrate
import flex_prefill.cli.demo as demo
import flex_prefill.cli.eval as evaluate
import flex_prefill.cli.info as info
import flex_prefill.cli.inspect as inspect
import flex_prefill.cli.llm as llm
from flex_prefill.cli.common import CommandError

__all__ = ["main"]

_COMMANDS = {
    "demo": demo,
    "bench": bench,
    "inspect": inspect,
    "calibrate": calibrate,
    "eval": evaluate,
    "test-llm": llm,
    "info": info,
}


class _CommandParser(argparse.ArgumentParser):
    """Names an unknown option, whose value argparse would take for a positional."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = self._option_string_actions
        for text in args or ():
            name = text.split("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" (did you mean {nearest[0]}?)" if nearest else ""
                self.error(f"no option {name}{hint}")
        return super().parse_known_args(args, namespace)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's module adds its own arguments."""
    parser = argparse.ArgumentParser(
        prog="flexprefill",
        description="Sparse attention for long prompts (FlexPrefill, arXiv 2502.20766).",
        epilog="flexprefill COMMAND --help shows what a command takes, with an example.",
    )
    parser.add_argument("--version", action="version", version=flex_prefill.__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(arguments)
    args.command_line = shlex.join(["flexprefill", *arguments])
    try:
        args.run(args)
    except CommandError as error:
        if error.usage:
            args.parser.error(str(error))
        print(f"flexprefill {args.command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        # What the library, torch or the file system refuses; their messages name it.
        print(f"flexprefill {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flexprefill: interrupted", file=sys.stderr)
        return 130
    return 0
