"""How this package was installed, so that a hint on a missing extra is a command that works here."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

NAME = "adapter-merge"


def install_command(*extras: str) -> str:
    """Return the pip command that adds `extras` to the installation that is running.

    A checkout, a wheel and a version control URL are named as they were installed (PEP 610, direct_url.json); only an
    installation from a package index is named by the package alone.
    """
    return f"pip install {_requirement(','.join(extras))}"


def _requirement(extras: str) -> str:
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
