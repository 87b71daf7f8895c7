"""Adapters of any format in `vllm.LLM`, without a server.

from vllm import LLM
from adapter_merge.serve import lora_requests

adapters = lora_requests("base-model", {"support": "a-dude-adapter", "sql": "a-dcft-adapter"})
llm = LLM(**adapters.engine_options)
llm.generate(prompts, lora_request=adapters["support"])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.expert_layout import TARGET
from adapter_merge.serve.conversion.served_folder import Converter, Served, allowed_rank, check_name
from adapter_merge.serve.conversion.stated_settings import check_settings

_ids = itertools.count(1)


class LoraRequests(Mapping[str, Any]):
    """Converted adapters: name -> vllm.lora.request.LoRARequest. Keep the object as long as the engine runs.

    `engine_options` are arguments of vllm.LLM with which all adapters can be active in one batch.
    """

    def __init__(self, converter: Converter, served: Mapping[str, Served]) -> None:
        from vllm.lora.request import LoRARequest

        self.served = dict(served)
        self._requests = {
            name: LoRARequest(name, next(_ids), str(adapter.folder)) for name, adapter in self.served.items()
        }
        self.engine_options: dict[str, Any] = {
            "model": str(converter.base),
            "enable_lora": True,
            "max_loras": len(self.served) + 1,  # one spare slot: see row_scale.with_row_scale
            "max_lora_rank": allowed_rank(max(adapter.rank for adapter in self.served.values())),
            "lora_target_modules": sorted({target for adapter in self.served.values() for target in adapter.targets}),
        }
        if TARGET in self.engine_options["lora_target_modules"]:
            self.engine_options["enable_mixed_moe_lora_format"] = True

    def __getitem__(self, name: str) -> Any:
        return self._requests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)


def lora_requests(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    stated: Mapping[str, Mapping[str, Any]] | None = None,
    cache: Cache | None = None,
) -> LoraRequests:
    """Convert `adapters` (name -> folder or hub id, in any format) for `base` and return vLLM's requests for them.

    stated: by name, settings that an adapter's files do not hold, such as {"sql": {"alpha": 32}}: the options of
    `merge`. Raises AdapterMergeError with every problem where vLLM cannot serve an adapter exactly.
    """
    from adapter_merge.errors import AdapterMergeError, InputError, Problem, raise_all

    if not adapters:
        raise InputError("no adapters were given", expected="at least one name and folder")
    converter = Converter(base, cache)
    served: dict[str, Served] = {}
    problems: list[Problem] = []
    for name, adapter in adapters.items():
        try:
            settings = check_settings((stated or {}).get(name, {}), source=f"{name}: ")
            served[check_name(name)] = converter.obtain(adapter, settings)
            allowed_rank(served[name].rank)
        except AdapterMergeError as error:
            problems += error.problems
    unknown = sorted(set(stated or ()) - set(adapters))
    problems += [Problem(f"stated: {name!r} is not the name of a given adapter") for name in unknown]
    raise_all(problems)
    return LoraRequests(converter, served)
