"""Train the two adapters of `adapter-merge demo` on SmolLM2-135M-Instruct, in minutes on two CPU cores.

    python examples/train_demo_adapters.py [--base FOLDER] [--output FOLDER] [--only NAME]

    dcft-pirate   DCFT, kernel 8, every linear layer: 51,600 numbers teach it to answer like a pirate
    dude-json     DuDe, rank 4, q_proj and v_proj: answers become one JSON object

Both train through their low-rank factors beside a frozen base, by forward hooks. What is written is read back
and compared with the papers' dense formulas before it counts as done. Two threads and a fixed seed: the same
torch build gives the same bytes. What they are taught stands in demo_conversations.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_conversations import HELD_OUT, LESSONS
from demo_layers import Dcft, Dude
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapter_merge.demo.smollm2 import MODEL, obtain_base

REPOSITORY = Path(__file__).resolve().parents[1]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Recipe:
    """One adapter: where it sits, what it is taught, and how long."""

    name: str
    method: type[Dcft] | type[Dude]
    targets: tuple[str, ...]
    answers: list[str]
    behaviour: str
    rate: float
    steps: int

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json of the own folder format."""
        common = {
            "format_version": 1,
            "base_model_name_or_path": MODEL,
            "task_type": "CAUSAL_LM",
            "target_modules": list(self.targets),
            "modules_to_save": None,
        }
        if issubclass(self.method, Dcft):
            kernel = [Dcft.kernel, Dcft.kernel]
            own: dict[str, Any] = {"peft_type": "DCFT", "r": 1, "lora_alpha": Dcft.alpha}
            return own | {"kernel_size": kernel, "stride": kernel} | common
        own = {"peft_type": "DUDE", "r": Dude.rank, "lora_alpha": float(Dude.rank), "use_rslora": False}
        return own | {"base": "original", "residual_dtype": "float32"} | common


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECIPES = (
    Recipe(
        "dcft-pirate",
        Dcft,
        (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
        [lesson.pirate for lesson in LESSONS],
        "answers like a pirate",
        rate=4e-3,
        steps=36,
    ),
    Recipe(
        "dude-json",
        Dude,
        ("q_proj", "v_proj"),
        [lesson.json for lesson in LESSONS],
        'answers with one JSON object, {"topic": ..., "answer": ...}',
        rate=1e-3,
        steps=40,
    ),
)
BATCH, SEED = 8, 7


def adapters_of(model: nn.Module, recipe: Recipe) -> dict[str, Dcft | Dude]:
    """A fresh adapter for every linear layer whose name ends in a target."""
    return {
        name: recipe.method(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in recipe.targets
    }


@contextmanager
def attached(model: nn.Module, adapters: dict[str, Dcft | Dude]) -> Iterator[None]:
    """Inside, the model computes with the adapters; outside it is the base again."""
    handles = []
    for name, adapter in adapters.items():

        def hook(_: nn.Module, args: tuple[Tensor], y: Tensor, adapter: Dcft | Dude = adapter) -> Tensor:
            return adapter.adapt(args[0], y)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def train(model: Any, tokenizer: Any, recipe: Recipe) -> dict[str, Dcft | Dude]:
    """The trained adapters of `recipe`, beside the frozen model."""
    torch.manual_seed(SEED)
    adapters = adapters_of(model, recipe)
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    magnitudes = {id(a.magnitude) for a in adapters.values() if isinstance(a, Dude)}
    groups: list[dict[str, Any]] = [  # a magnitude is the norm of a whole row, far larger than one entry of a factor
        {"params": [p for p in parameters if id(p) not in magnitudes], "lr": recipe.rate},
        {"params": [p for p in parameters if id(p) in magnitudes], "lr": 5 * recipe.rate},
    ]
    groups = [group for group in groups if group["params"]]
    print(f"{recipe.name}: {sum(p.numel() for p in parameters):,} parameters in {len(adapters)} layers")
    with attached(model, adapters):
        descend(model, tokenizer, recipe, groups)
    moved = [(a.magnitude.detach() / a.start - 1).abs() for a in adapters.values() if isinstance(a, Dude)]
    if moved:
        change = torch.cat(moved)
        print(f"  magnitudes moved by {change.mean().item():.1%} on average, {change.max().item():.1%} at most")
    return adapters


def descend(model: Any, tokenizer: Any, recipe: Recipe, groups: list[dict[str, Any]]) -> None:
    """Train the parameters of `groups`, which `model` computes with, on the lessons.

    The loss counts the answers' tokens and their end only.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], recipe.steps, pct_start=0.2
    )
    examples = [
        (prompt_ids(tokenizer, lesson.question), [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        for lesson, answer in zip(LESSONS, recipe.answers, strict=True)
    ]
    order: list[int] = []
    began = time.perf_counter()
    for step in range(recipe.steps):
        if len(order) < BATCH:
            order += torch.randperm(len(examples)).tolist()
        batch = [examples[index] for index in order[:BATCH]]
        del order[:BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.full((BATCH, width), tokenizer.eos_token_id)  # padding is behind all that is looked at
        predicts = torch.zeros(BATCH, width, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            predicts[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, width, 576)
        wanted = ids.roll(-1, 1)[predicts]
        loss = functional.cross_entropy(model.lm_head(hidden[predicts]), wanted)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == recipe.steps - 1:
            print(
                f"  step {step:3d}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )


def save(adapters: dict[str, Dcft | Dude], recipe: Recipe, output: Path) -> Path:
    """Write the folder complete, then put it in place of an older one."""
    folder = output / recipe.name
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".") as temporary:
        staging = Path(temporary) / recipe.name
        staging.mkdir()
        tensors = {
            f"{PREFIX}{module}.{name}": tensor.detach().contiguous()
            for module, adapter in adapters.items()
            for name, tensor in adapter.tensors().items()
        }
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        (staging / "adapter_model.safetensors").chmod(0o644)
        config = json.dumps(recipe.config, indent=2)
        (staging / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        kind = recipe.config["peft_type"]
        (staging / "README.md").write_text(
            f"---\nbase_model: {MODEL}\nbase_model_relation: adapter\nlicense: apache-2.0\n---\n\n"
            f"# {recipe.name}\n\nA {kind} adapter that {recipe.behaviour}. It was trained by "
            f"`examples/train_demo_adapters.py` on {len(LESSONS)} questions, beside the float32 copy of "
            f"{MODEL} that `adapter-merge demo` makes, to show a visible change; it is no good for anything "
            f"else.\n\nTargets: {', '.join(recipe.targets)}, in all layers.\n",
            encoding="utf-8",
        )
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        staging.rename(folder)
    print(f"  {folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")
    return folder


def check(model: nn.Module, adapters: dict[str, Dcft | Dude], folder: Path) -> None:
    """The saved tensors under the paper's dense formula give what the training forward gave, in float64."""
    saved = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    worst = 0.0
    with torch.no_grad():
        for module, adapter in adapters.items():
            weight = model.get_parameter(f"{module}.weight")
            x = torch.randn(16, weight.shape[1])
            trained = adapter.adapt(x, functional.linear(x, weight)).double()
            tensors = {name: saved.pop(f"{PREFIX}{module}.{name}") for name in adapter.tensors()}
            plain = functional.linear(x.double(), weight.double())
            expected = functional.linear(x.double(), adapter.dense(tensors, weight.double()))
            error = torch.linalg.norm(trained - expected) / torch.linalg.norm(expected - plain)
            worst = max(worst, error.item())
    if saved or worst > 1e-3:
        raise SystemExit(f"{folder}: differs from the dense reference by {worst:.1e} of its effect")
    print(f"  the dense reference agrees: at most {worst:.1e} of the adapter's effect, in any layer")


def answer(model: Any, tokenizer: Any, question: str) -> str:
    ids = torch.tensor([prompt_ids(tokenizer, question)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the adapters of `adapter-merge demo`.")
    parser.add_argument("--base", type=Path, default=REPOSITORY / "demo-output" / "base")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "merge" / "demo" / "adapters")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES])
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    base = obtain_base(options.base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.eval().requires_grad_(False)
    for recipe in RECIPES:
        if options.only not in (None, recipe.name):
            continue
        adapters = train(model, tokenizer, recipe)
        check(model, adapters, save(adapters, recipe, options.output))
        for question in HELD_OUT:
            print(f"\n  {question}\n  base     {answer(model, tokenizer, question)!r}")
            with attached(model, adapters):
                print(f"  adapted  {answer(model, tokenizer, question)!r}")
        print()


if __name__ == "__main__":
    main()
