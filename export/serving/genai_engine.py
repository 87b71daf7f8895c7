"""Answers of onnxruntime-genai, one job after the other, each with its adapter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from adapter_merge.export.engine.genai import open_genai
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import folder_layout
from adapter_merge.export.graph.adapter_file import SUFFIX, check_adapter

from .answer_tokens import Answer, prompt_logprobs
from .engine_job import Job


class GenaiEngine:
    """onnxruntime-genai, one job at a time."""

    max_batch = 1

    def __init__(self, folder: Path, device: str, stops: Collection[int]) -> None:
        check_packages("onnxruntime_genai")
        import onnxruntime_genai as og

        self.folder, self.stops, self.layout = folder, stops, folder_layout(folder)
        self.model = open_genai(folder, device)
        self.adapters = og.Adapters(self.model)
        self._loaded: set[str] = set()

    def run(self, jobs: list[Job]) -> None:
        """Answer the job; its adapter is set before the first token."""
        import onnxruntime_genai as og

        (job,) = jobs
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(job.ids) + job.sampling.max_tokens, do_sample=False)
        generator = og.Generator(self.model, parameters)
        if job.adapter is not None:
            if job.adapter not in self._loaded:
                file = self.folder / f"{job.adapter}{SUFFIX}"
                check_adapter(file, self.layout)
                self.adapters.load(str(file.resolve()), job.adapter)
                self._loaded.add(job.adapter)
            generator.set_active_adapter(self.adapters, job.adapter)
        generator.append_tokens(job.ids)
        if job.scored:
            job.prompt_logprobs = prompt_logprobs(generator.get_output("logits")[0], job.ids)
        answer = Answer(job, self.stops)
        while answer.add(generator.get_logits().reshape(-1)):
            generator.append_tokens([answer.last])
