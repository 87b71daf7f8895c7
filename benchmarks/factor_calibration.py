"""Calibrated against plain truncation, end to end: python benchmarks/factor_calibration.py BASE ADAPTER --kind json

The calibration text is what the adapter was trained on (examples/demo_conversations.py, as chats); the figures are
taken on the held-out questions, over question and greedy answer of the adapter as trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.factoring.calibration import collect
from adapter_merge.factoring.end_to_end import (
    GENERATED,
    compute_logits,
    install_factors,
    measure_figures,
    tokenize_prompts,
)
from adapter_merge.factoring.factor_folder import write_factors
from adapter_merge.factoring.weight_factors import Factoriser
from adapter_merge.verification.live_adapter import continued, load_model
from adapter_merge.verification.live_model import trained_model


def conversations() -> ModuleType:
    file = Path(__file__).parent.parent / "examples" / "demo_conversations.py"
    spec = importlib.util.spec_from_file_location("demo_conversations", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--kind", choices=["json", "pirate"], required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--questions", type=int, default=6)
    given = parser.parse_args()
    data = conversations()
    text = "".join(
        f"<|im_start|>user\n{lesson.question}<|im_end|>\n"
        f"<|im_start|>assistant\n{getattr(lesson, given.kind)}<|im_end|>\n"
        for lesson in data.LESSONS
    )
    bound = open_pair(given.base, given.adapter)
    live = trained_model(bound)
    paths, starts, expected = [], [], []
    for ids in tokenize_prompts(bound.base.folder, live, data.HELD_OUT[: given.questions]):
        starts.append(ids.shape[1] - 1)
        paths.append(continued(live, ids, GENERATED))
        expected.append(compute_logits(live, paths[-1]))
    del live
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "calibration.txt"
        file.write_text(text)
        moments = collect(bound, file)
        model = load_model(bound.base.folder).float()
        before = [compute_logits(model, path) for path in paths]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        names = {item.module.name for item in bound.modules}
        for rank in given.ranks:
            for calibrated in (False, True):
                factored = []
                for item in bound.modules:
                    root = moments.root(item.module.name) if calibrated else None
                    work = Factoriser(item.module, item, torch.device("cpu"), root=root)
                    factored.append(work.truncated(work.spectrum(rank), rank))
                folder = Path(temporary) / f"{rank}-{calibrated}"
                folder.mkdir()
                write_factors(folder, bound.adapter, factored, {}, False)
                with torch.no_grad():
                    for name in names:
                        model.get_submodule(name).weight = torch.nn.Parameter(state[f"{name}.weight"].clone())
                install_factors(model, folder)
                found = measure_figures(
                    paths, starts, expected, [compute_logits(model, path) for path in paths], before, True
                )
                mean = sum(one.figures.relative_error for one in factored) / len(factored)
                line = SimpleNamespace(rank=rank, calibrated=calibrated, mean_relative_error=round(mean, 4), **found)
                print(json.dumps(vars(line)), flush=True)


if __name__ == "__main__":
    main()
