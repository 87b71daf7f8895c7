"""Train the demo's DCFT in PEFT and merge what PEFT saved: the same losses as examples/train_demo_adapters.py.

    python examples/train_dcft_with_peft.py [--base FOLDER] [--output FOLDER]

Needs the extra demo. The adapter starts from the same random numbers and sees the same lessons in the same order as the
one that ships with the demo, so that the losses that the two scripts print are equal up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from demo_conversations import HELD_OUT
from peft import get_peft_model
from train_demo_adapters import RECIPES, REPOSITORY, SEED, answer, descend

import adapter_merge as am
from adapter_merge.demo.smollm2 import obtain_base
from adapter_merge.peft import DCFTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's DCFT in PEFT.")
    parser.add_argument("--base", type=Path, default=REPOSITORY / "demo-output" / "base")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output" / "dcft-in-peft")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    base = obtain_base(options.base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    recipe = RECIPES[0]
    torch.manual_seed(SEED)
    config = DCFTConfig(kernel_size=8, target_modules=list(recipe.targets), task_type="CAUSAL_LM")
    live = get_peft_model(model, config)
    live.print_trainable_parameters()
    parameters = [parameter for parameter in live.parameters() if parameter.requires_grad]
    descend(live.get_base_model(), tokenizer, recipe, [{"params": parameters, "lr": recipe.rate}])
    live.save_pretrained(options.output / "adapter")

    am.merge(base, options.output / "adapter", options.output / "merged", am.MergeOptions(overwrite=True))
    assert am.verify(base, options.output / "adapter", options.output / "merged").passed
    merged: Any = AutoModelForCausalLM.from_pretrained(options.output / "merged", dtype=torch.float32).eval()
    for question in HELD_OUT:
        print(f"\n  {question}\n  in PEFT  {answer(live, tokenizer, question)!r}")
        print(f"  merged   {answer(merged, tokenizer, question)!r}")


if __name__ == "__main__":
    main()
