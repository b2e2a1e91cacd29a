# SPDX-License-Identifier: MIT
"""`pyublk completion`."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes this command in SHELL.

    \b
    in ~/.bashrc: eval "$(pyublk completion bash)"
    in ~/.zshrc:  eval "$(pyublk completion zsh)"
    in ~/.config/fish/config.fish:
                  pyublk completion fish | source
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "pyublk", "_PYUBLK_COMPLETE").source())
