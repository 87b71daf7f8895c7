"""The pip command that installs an extra of this package, for hints in errors."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

NAME = "adapter-merge"


def install_command(*extras: str) -> str:
    """Return the pip command that adds `extras` to the installation that is running.

    A package that was installed from a checkout, a wheel or a version control URL is named by that source (PEP 610,
    direct_url.json), one from a package index by its name.
    """
    return f"pip install {_requirement(','.join(extras))}"


def _requirement(extras: str) -> str:
    """Return the requirement of this package with `extras`, quoted for a shell."""
    try:
        stated = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        stated = None
    if stated is None:
        return f"'{NAME}[{extras}]'"
    origin = json.loads(stated)
    url = str(origin["url"])
    version_control = origin.get("vcs_info")
    if version_control is not None:
        return f"'{NAME}[{extras}] @ {version_control['vcs']}+{url}@{version_control['commit_id']}'"
    if not url.startswith("file:"):
        return f"'{NAME}[{extras}] @ {url}'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return editable + shlex.quote(f"{unquote(urlsplit(url).path)}[{extras}]")
