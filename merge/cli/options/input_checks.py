"""Checks of a command's inputs before torch is imported: they exist, and BASE is a model and not an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from adapter_merge.errors import InputError, MismatchError, Problem, raise_all


def check_paths(base: str | None, *adapters: str) -> None:
    """Raise InputError with every input that does not exist, MismatchError where an adapter is given as the base.

    Hub ids are downloaded here, into the hub's cache.
    """
    from adapter_merge.storage.checkpoint import resolve, resolve_base

    problems: list[Problem] = []
    folders: list[Path | None] = []
    for name, find in ((base, resolve_base), *((adapter, resolve) for adapter in adapters)):
        try:
            folders.append(None if name is None else Path(name) if Path(name).is_file() else find(name))
        except InputError as error:
            problems += error.problems
            folders.append(None)
    raise_all(problems)
    base_folder = folders[0]
    if base is None or base_folder is None or not is_adapter(base_folder) or is_model(base_folder):
        return
    models = [adapter for adapter, folder in zip(adapters, folders[1:], strict=True) if folder and is_model(folder)]
    if not models:
        raise MismatchError(
            f"{base}: is an adapter, but the first argument must be the base model",
            expected="BASE first, then ADAPTER",
            hint=f"{command_path()} BASE {base}",
        )
    raise MismatchError(
        f"{base} is an adapter and {models[0]} is a model: are they swapped?",
        expected="BASE first, then ADAPTER",
        hint=f"{command_path()} {models[0]} {base}",
    )


def command_path() -> str:
    """Return the name of the running command with its group, such as `adapter-merge merge`."""
    context = click.get_current_context(silent=True)
    return context.command_path if context is not None else "adapter-merge"


def is_adapter(folder: Path) -> bool:
    """True for a folder with an adapter's config."""
    return (folder / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    """True for a folder, or a GGUF file, with a model's weights."""
    from adapter_merge.storage.checkpoint import CANDIDATES

    return folder.is_file() or any((folder / name).is_file() for name in CANDIDATES)
