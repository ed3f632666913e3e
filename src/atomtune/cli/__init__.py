"""The command line: one command a file, dataclasses read by tyro, no logic."""

from __future__ import annotations

import importlib
import io
import logging
import shlex
import sys

COMMANDS = {
    "demo": "Learn a new subject on the embedded world, show its atoms, write a report.",
    "train": "Train an adapter on a folder of pictures.",
    "many": "Train many concepts at once over one base, as a file lists them.",
    "doctor": "Say what a run would meet and cost, before it starts.",
    "generate": "Paint pictures with an adapter, its dials turned as you say.",
    "edit": "Tune on one picture, and paint edits of it over a sweep of which atoms take part.",
    "atoms": "Rank the atoms of an adapter.",
    "prune": "Keep the most important atoms for good.",
    "surgery": "Keep or drop single atoms for good, label them, and write notes beside them.",
    "mix": "Put adapters side by side, to be used like one; or list which of their atoms conflict.",
    "diff": "Say what became of the atoms of one adapter in another.",
    "export": "Write the LoRA that is nearest to an adapter, for diffusers and PEFT.",
    "import": "Turn a LoRA into atoms, to see, rank and prune them.",
    "compare": "Measure methods against each other on the embedded world.",
}

FILES = {"import": "imported"}
"""Modules of commands whose names a module can't have."""

_given: list[str] = []


def command_line() -> str:
    """The command that runs, as one would type it."""
    return shlex.join(["atomtune", *_given])


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    _given[:] = arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        print(f"usage: atomtune COMMAND [OPTIONS]\n\n{listing}\n\natomtune COMMAND --help tells more.")
        return 0
    if arguments[0] == "--version":
        import importlib.metadata

        print(importlib.metadata.version("atomtune"))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from atomtune.errors import did_you_mean

        hint = did_you_mean(name, COMMANDS)
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    import tyro

    from atomtune.errors import OPTIONAL, UserError

    for quiet in OPTIONAL:
        logging.getLogger(quiet).setLevel(logging.ERROR)
    module = importlib.import_module(f"atomtune.cli.{FILES.get(name, name)}")
    try:
        arguments = getattr(module, "expand", list)(arguments)  # what a command reads from a file
        tyro.cli(module.Command, args=arguments, prog=f"atomtune {name}").run()
    except SystemExit as stop:  # tyro has said why
        return int(stop.code or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def console() -> None:
    """Entry point of the `atomtune` script."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        sys.stderr.close()
