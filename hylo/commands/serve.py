"""`hylo serve`: vLLM's own server, with the flags that hybrids need."""

import os
import shlex
import sys
from typing import Annotated

import typer

from hylo.commands.common import out
from hylo.errors import HyLoError


def register(app: typer.Typer) -> None:
    """Adds `serve` to a command line."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hybrid's folder or hub id.")],
    length: Annotated[
        str | None, typer.Option("--context", help="Tokens of the longest request, such as 64K or 1M. [trained length]")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Serve a hybrid through vLLM's OpenAI API. Every other option goes to `vllm serve` as it is, and wins over ours.

    Example: hylo serve runs/mine/model --context 1M --port 8000
    """
    from hylo.plan.quantities import parse_contexts
    from hylo.serve.launch import Request, check_installed, serve_command, server_environment

    lengths = parse_contexts(length) if length is not None else [None]
    if len(lengths) > 1:
        raise HyLoError(f"--context {length!r}: expected one length")
    request = Request(model, lengths[0], gpus, tuple(context.args))
    command = serve_command(request)
    if dry_run:
        out.print(shlex.join(command), highlight=False, markup=False, soft_wrap=True)
        return
    check_installed()
    # In this interpreter: a program called vllm on the PATH may belong to another.
    arguments = [sys.executable, "-m", "hylo.serve.start", *command[1:]]
    os.execve(sys.executable, arguments, server_environment(request, os.environ))
