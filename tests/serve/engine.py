"""One vLLM engine in a process of its own: a job in JSON on stdin or from zygote.py, the answers in JSON in a file.

A process per engine keeps vLLM's warnings, its global state and its plugins apart from the tests, and shows
the plugin as vLLM loads it, by its entry point. The job:

    {"engine": {LLM arguments}, "offline": whether to convert the adapters with lora_requests,
     "adapters": {name: folder}, "batches": [[{"adapter", "prompt", "count"}, ...],
    ...]}

The answers: per batch, per request, {"tokens", "logprobs"}; {"probabilities"} of requests without a "count", which are
for a classifier; or {"error": text} for a batch that vLLM refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def vllm_environment(**extra: str) -> dict[str, str]:
    """The settings under which vLLM runs on a CPU in one process."""
    return {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "PYTHONWARNINGS": "ignore",
        **extra,
    }


def answer(job: dict[str, Any], out: str) -> None:
    """Run the engine of `job` and write its answers to the file `out`."""
    options, requests = job["engine"], {}
    if job["offline"]:
        from adapter_merge.serve import lora_requests

        requests = lora_requests(options.pop("model"), job["adapters"])
        options = {**requests.engine_options, **options}
    if options.get("distributed_executor_backend") == "ray":
        import ray

        # Ray counts what it is told of: these GPUs are CPU workers, see ray_cpu/.
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm: Any = LLM(
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
            "enable_lora": True,
            **options,
        }
    )
    requests = requests or {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(job["adapters"].items(), start=1)
    }
    answers: list[Any] = []
    for batch in job["batches"]:
        if "load" in batch[0]:
            # The check that vLLM's server makes before it accepts an adapter at run time.
            try:
                llm.llm_engine.add_lora(requests[batch[0]["load"]])
                answers.append("loaded")
            except Exception as error:
                answers.append({"error": str(error)})
            continue
        if "count" not in batch[0]:
            found = llm.classify(
                [{"prompt_token_ids": request["prompt"]} for request in batch],
                lora_request=[requests.get(request["adapter"]) for request in batch],
                use_tqdm=False,
            )
            answers.append([{"probabilities": each.outputs.probs} for each in found])
            continue
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in batch],
            [
                SamplingParams(
                    temperature=0, max_tokens=request["count"], logprobs=0, detokenize=False, ignore_eos=True
                )
                for request in batch
            ],
            lora_request=[requests.get(request["adapter"]) for request in batch],
            use_tqdm=False,
        )
        answers.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                    ],
                    "cached": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    from adapter_merge.serve import plugin

    Path(out).write_text(json.dumps({"plugin": plugin.state, "answers": answers}))


if __name__ == "__main__":
    answer(json.loads(sys.stdin.read()), sys.argv[1])
