"""Write three pages of docs/reference: command-line.md from the commands, python.md and code-map.md from docstrings.

python docs/generate.py; a test compares the pages with what this prints.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import click

import adapter_merge
from adapter_merge.cli.main import COMMANDS, group

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTE = "Written by `python docs/generate.py`.\n"
WIDTH = 100


def command_line() -> str:
    """The help of every command, as `adapter-merge COMMAND --help` prints it at 100 columns."""
    parts = [f"# Command line\n\n{NOTE}", help_block(group, "adapter-merge", None)]
    root = click.Context(group, info_name="adapter-merge", terminal_width=WIDTH)
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        parts.append(f"## {name}\n\n{help_block(command, name, root)}")
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name, parent=root, terminal_width=WIDTH)
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                parts.append(f"### {name} {inner}\n\n{help_block(found, inner, context)}")
    return "\n".join(parts)


def help_block(command: click.Command, name: str, parent: click.Context | None) -> str:
    """The command's help in a block of code."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH, color=False
    )
    context.help_option_names = ["-h", "--help"]
    lines = click.unstyle(command.get_help(context)).splitlines()
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```\n"


def python() -> str:
    """Every public name, its signature and its docstring."""
    names = [name for name in adapter_merge.__all__ if name != "__version__"]
    objects = {name: getattr(adapter_merge, name) for name in names}
    jobs = {name: found for name, found in objects.items() if inspect.isfunction(found)}
    errors = {name: found for name, found in objects.items() if is_error(found)}
    values = {name: found for name, found in objects.items() if name not in jobs and name not in errors}
    options = {name: found for name, found in values.items() if name.endswith("Options")}
    parts = [f"# Python\n\n{NOTE}\nEvery public name is in `adapter_merge`; nothing loads torch before it is needed.\n"]
    parts += section("Jobs", jobs) + section("Options", options)
    parts += section("Results and values", {name: found for name, found in values.items() if name not in options})
    parts += section("Errors", errors)
    return "\n".join(parts)


def is_error(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Exception)


def section(title: str, objects: dict[str, Any]) -> list[str]:
    """The heading, and one entry for each object."""
    return [f"## {title}\n", *(entry(name, objects[name]) for name in sorted(objects))]


def entry(name: str, found: Any) -> str:
    """One public name: signature, docstring, and the fields and properties of a class."""
    lines = [f"### {name}\n"]
    if is_error(found):
        lines.append(f"`{name}({found.__bases__[0].__name__})`: {text_of(found)}")
        return "\n".join(lines)
    if inspect.isfunction(found):
        lines.append(f"```python\n{signature(name, found)}\n```\n")
    lines.append(text_of(found))
    if isinstance(found, type) and not issubclass(found, enum.Enum):
        lines += members(found)
    return "\n".join(lines)


def signature(name: str, found: Any) -> str:
    """The function's signature as the source writes it, one parameter a line where it is long."""
    described = inspect.signature(found)
    parameters = []
    for parameter in described.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        text = f"{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            shown = "..." if callable(default) else repr(default)
            text += f" = {type(default).__name__}()" if dataclasses.is_dataclass(default) else f" = {shown}"
        parameters.append(text)
    line = f"{name}({', '.join(parameters)}) -> {described.return_annotation}"
    if len(line) <= WIDTH:
        return line
    return (
        f"{name}(\n"
        + "".join(f"    {parameter},\n" for parameter in parameters)
        + f") -> {described.return_annotation}"
    )


def text_of(found: Any) -> str:
    """The docstring; indented blocks stay blocks of code."""
    text = inspect.getdoc(found) or ""
    text = re.sub(r"^Example:\n(?=    )", "Example:\n\n", text, flags=re.MULTILINE)
    return text + "\n"


def members(found: type) -> list[str]:
    """A table of the fields with their defaults and comments, and of the properties."""
    rows = []
    comments = field_comments(found)
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            if field.name.startswith("_"):
                continue
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            kind = str(field.type).replace("|", "\\|")
            rows.append(f"| `{field.name}` | `{kind}` | {default} | {comments.get(field.name, '')} |")
    for name, value in inspect.getmembers(found, lambda value: isinstance(value, property)):
        if not name.startswith("_"):
            kind = str(value.fget.__annotations__.get("return", "")).replace("|", "\\|")
            rows.append(f"| `{name}` | `{kind}` | property | {' '.join((value.__doc__ or '').split())} |")
    return ["| name | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"] if rows else []


def field_comments(found: type) -> dict[str, str]:
    """The comment behind each field in the source of a class and its bases."""
    comments: dict[str, str] = {}
    for kind in reversed(found.__mro__[:-1]):
        for line in inspect.getsource(kind).splitlines():
            match = re.fullmatch(r"    (\w+): .*?  # (.+)", line)
            if match:
                comments[match[1]] = match[2].replace("|", "\\|").replace("<", "&lt;")
    return comments


def code_map() -> str:
    """Every room and every file of the package with the first line of its docstring."""
    parts = [
        f"# Code map\n\n{NOTE}\nEvery folder and file with the first line of its docstring. Within each of the"
        " three parts a folder imports only from those above it, export/ and serve/ import merge/.\n"
    ]
    for wing in ("merge", "export", "serve"):
        parts.append(f"## {wing}/\n\n{docstring(ROOT / wing / '__init__.py')}\n\n{table(ROOT / wing)}")
        for room in rooms(wing):
            for folder in (room, *sorted(path for path in room.iterdir() if (path / "__init__.py").is_file())):
                title = f"### {folder.relative_to(ROOT)}/"
                parts.append(f"{title}\n\n{docstring(folder / '__init__.py')}\n\n{table(folder)}")
    return "\n".join(parts)


def rooms(wing: str) -> list[Path]:
    """The folders of a wing, each after those that it imports, as the contracts in pyproject.toml order them."""
    name = "adapter_merge" if wing == "merge" else f"adapter_merge.{wing}"
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["containers"] == [name])
    names = [part.strip() for layer in reversed(layers) for part in layer.split("|")]
    return [ROOT / wing / part for part in names if (ROOT / wing / part).is_dir()]


def table(folder: Path) -> str:
    """The files of one folder."""
    files = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    rows = [f"| `{path.name}` | {docstring(path).replace('|', chr(92) + '|')} |" for path in files]
    return "\n".join(["| file | what it holds |", "|---|---|", *rows]) + "\n"


def docstring(path: Path) -> str:
    """The first paragraph line of a module's docstring, without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].strip()


def pages() -> dict[Path, str]:
    """File -> content of every generated page."""
    return {
        REFERENCE / "command-line.md": command_line(),
        REFERENCE / "python.md": python(),
        REFERENCE / "code-map.md": code_map(),
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
