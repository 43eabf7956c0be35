#!/usr/bin/env python3
"""docs/commands.md, from what the commands say of themselves.

python scripts/commands_page.py > docs/commands.md
"""

import inspect

import click
from click_option_group import GroupedOption

from converter import cli as converter
from parity import cli as parity

COMMANDS = {
    "convert-oss": converter._convert_oss,
    "verify-oss": converter._verify_oss,
    "inspect-oss": converter._inspect_oss,
    "check-parity": parity.main,
    "report-diff": parity._report_diff,
}
HEAD = """# Commands

Every option of every command, as `--help` says it. This page is made by
`python scripts/commands_page.py`; a test compares it with the commands. [JSON](json.md) has what they write for programs, and
[Converting](conversion.md) the exit codes.

In a terminal what they print takes its width, from 60 columns on, and verdicts are in colour, unless `NO_COLOR` is set.
Anywhere else each line is whole, and plain.

## Completion

The commands complete their options, paths, and the values of options that have a few, in bash, zsh and fish. For this shell,
in bash 4.4 or newer:

```bash
eval "$(_CONVERT_OSS_COMPLETE=bash_source convert-oss)"
eval "$(_VERIFY_OSS_COMPLETE=bash_source verify-oss)"
eval "$(_INSPECT_OSS_COMPLETE=bash_source inspect-oss)"
eval "$(_CHECK_PARITY_COMPLETE=bash_source check-parity)"
eval "$(_REPORT_DIFF_COMPLETE=bash_source report-diff)"
```

For good, put these lines into `~/.bashrc`. In zsh the same lines with `zsh_source` go into `~/.zshrc`, after `compinit`. In
fish each command has a file of its own:

```fish
_CONVERT_OSS_COMPLETE=fish_source convert-oss > ~/.config/fish/completions/convert-oss.fish
_VERIFY_OSS_COMPLETE=fish_source verify-oss > ~/.config/fish/completions/verify-oss.fish
_INSPECT_OSS_COMPLETE=fish_source inspect-oss > ~/.config/fish/completions/inspect-oss.fish
_CHECK_PARITY_COMPLETE=fish_source check-parity > ~/.config/fish/completions/check-parity.fish
_REPORT_DIFF_COMPLETE=fish_source report-diff > ~/.config/fish/completions/report-diff.fish
```
"""


def escaped(text: str) -> str:
    """As a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def option_row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    kind = option.type
    if option.is_flag:
        value = ""
    elif isinstance(kind, click.types.IntRange):
        value = f"`{option.metavar or 'N'}`"
    elif isinstance(kind, click.Choice):
        value = ", ".join(f"`{choice}`" for choice in kind.choices)
    else:
        value = f"`{option.metavar or kind.name.upper()}`"
    says = option.help or ""
    if option.show_default and option.default is not None:
        says += f" [default: {option.default}]"
    return f"| {names} | {escaped(value)} | {escaped(says)} |"


def section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, **command.context_settings)
    usage = " ".join(argument.metavar or str(argument.name).upper() for argument in arguments(command))
    required = {str(argument.name).upper() for argument in arguments(command) if argument.required}
    usage = " ".join(word if word in required or "[" in word or word == "DST" else f"[{word}]" for word in usage.split())
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    prose = "\n\n".join(text for text in paragraphs if not text.startswith("\b"))
    [shown, status] = (inspect.cleandoc(text).splitlines()[1:] for text in paragraphs if text.startswith("\b"))
    examples = "\n".join(["```bash", *(line.strip() for line in shown[1:]), "```"])
    after = " ".join(line.strip() for line in status)
    parts = [f"## {name}", f"`{name} {usage}`", prose, examples, f"{after}."]
    rows, group = ["| option | value | |\n|---|---|---|"], None
    for option in command.get_params(context):
        if isinstance(option, click.Option) and not option.hidden:
            title = option.group.name if isinstance(option, GroupedOption) else None
            if title != group and (title or group):
                rows.append(f"| **{title or 'Besides'}** | | |")
            group = title
            rows.append(option_row(option))
    return "\n\n".join(part for part in parts if part) + "\n\n" + "\n".join(rows) + "\n"


def arguments(command: click.Command) -> list[click.Argument]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


def page() -> str:
    return "\n".join([HEAD, *(section(name, command) for name, command in COMMANDS.items())])


if __name__ == "__main__":
    print(page(), end="")
