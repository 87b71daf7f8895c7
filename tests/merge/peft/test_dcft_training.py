"""DCFT trained in PEFT: save_pretrained writes what merge reads, by the paper's formula and the live model.

The oracle of the layer is DcftLinear of pico.py, the formula written out with conv_transpose2d; that of a merge is the
live, trained model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import TARGETS, VOCABULARY, DcftLinear, logits, pico_model, save_base
from safetensors.torch import load_file, save_file

from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.verify import check, verify
from adapter_merge.errors import AdapterError, InputError

peft = pytest.importorskip("peft", reason="DCFT is trained in PEFT (extra verify)")
transformers = pytest.importorskip("transformers")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kernel 8, every linear layer": ("llama", {"kernel_size": 8, "target_modules": "all-linear"}),
    "rank 2, kernel (4, 6), exclusions": (
        "llama",
        {"r": 2, "kernel_size": [4, 6], "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "stride below the kernel": ("llama", {"kernel_size": 8, "stride": [4, 2], "target_modules": ["q_proj", "up_proj"]}),
    "Conv1D": ("gpt2", {"kernel_size": 8, "target_modules": TARGETS["gpt2"]}),
    "a head trained in whole": (
        "bert",
        {"kernel_size": 8, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "one layer": ("llama", {"kernel_size": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


def train(model: Any, steps: int = 6) -> list[float]:
    """A few large steps on random tokens, for models with and without a language head; returns the losses."""
    torch.manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (4, 12))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        found = model(input_ids=ids).logits
        wanted = ids if found.dim() == 3 else torch.arange(4) % found.shape[-1]
        loss = torch.nn.functional.cross_entropy(found.flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(kind: str, folder: Path, **settings: Any) -> tuple[Path, Path, Any]:
    """A pico base, an adapter trained on it and saved by PEFT, and the live model."""
    from adapter_merge.peft import DCFTConfig

    base = save_base(pico_model(kind), folder / "base")
    torch.manual_seed(1)
    live = peft.get_peft_model(pico_model(kind), DCFTConfig(**settings))
    losses = train(live)
    assert losses[-1] < losses[0]
    live.eval().save_pretrained(folder / "adapter")
    return base, folder / "adapter", live


def by_formula(kind: str, adapter: Path, stride: tuple[int, int], alpha: float = 32.0) -> Any:
    """The base with DcftLinear in place of each adapted layer, its tensors read from the saved file."""
    model = pico_model(kind)
    saved = load_file(adapter / "adapter_model.safetensors")
    names = sorted({name.rpartition(".")[0] for name in saved if name.endswith(".lora_C")})
    for name in names:
        module = name.removeprefix("base_model.model.")
        a, c = saved[f"{name}.lora_A"], saved[f"{name}.lora_C"]
        layer = DcftLinear(model.get_submodule(module), tuple(c.shape[2:]), a.shape[0], alpha, stride)
        tensors = {part: saved[f"{name}.{part}"] for part in ("lora_A", "lora_B", "lora_C", "ranknum")}
        layer.load_state_dict(tensors, strict=False)
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_the_live_model(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    base, adapter, live = trained(kind, tmp_path, **settings)
    merge(base, adapter, tmp_path / "merged")
    merged = type(pico_model(kind)).from_pretrained(tmp_path / "merged").eval()
    effect = (logits(live) - logits(pico_model(kind))).abs().max()
    assert effect > 0.1
    assert (logits(merged) - logits(live)).abs().max() < 2e-5
    again = peft.PeftModel.from_pretrained(pico_model(kind), adapter).eval()
    assert (logits(again) - logits(live)).abs().max() < 2e-5
    assert (logits(live.merge_and_unload(safe_merge=True)) - logits(merged)).abs().max() < 2e-5


@pytest.mark.parametrize(("kernel", "stride"), [(8, (8, 8)), ([4, 8], (2, 8)), (16, (8, 4))])
def test_the_layer_is_the_papers_formula(tmp_path: Path, kernel: Any, stride: tuple[int, int]) -> None:
    settings = {"r": 3, "lora_alpha": 5.0, "kernel_size": kernel, "stride": list(stride)}
    _, adapter, live = trained("llama", tmp_path, target_modules=TARGETS["llama"], **settings)
    expected = logits(by_formula("llama", adapter, stride, alpha=5.0))
    assert (logits(live) - expected).abs().max() < 2e-5


def test_trainer_saves_what_every_command_reads(tmp_path: Path) -> None:
    from adapter_merge.peft import DCFTConfig

    base = save_base(pico_model("llama"), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = DCFTConfig(kernel_size=8, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    live = peft.get_peft_model(model, config)
    ids = torch.randint(5, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))
    trainer = transformers.Trainer(
        model=live,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "runs"), max_steps=4, save_steps=2, per_device_train_batch_size=4,
            learning_rate=0.02, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None)
    trainer.save_model(str(tmp_path / "adapter"))
    live.eval()
    assert inspect(tmp_path / "adapter").method == "DCFT"
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    factor(base, tmp_path / "adapter", tmp_path / "factors")
    for artefact in ("merged", "factors"):
        check(verify(base, tmp_path / "adapter", tmp_path / artefact))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    factors = peft.PeftModel.from_pretrained(plain, tmp_path / "factors").eval()
    assert (logits(factors) - logits(live)).abs().max() < 2e-5
    assert (logits(live) - logits(pico_model("llama"))).abs().max() > 0.05
    resumed = transformers.Trainer(model=live, args=trainer.args, train_dataset=trainer.train_dataset)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))


def test_two_adapters_switch_and_go_off(tmp_path: Path) -> None:
    from adapter_merge.peft import DCFTConfig

    _, adapter, live = trained("llama", tmp_path, kernel_size=8, target_modules=["q_proj", "v_proj"])
    first = logits(live)
    live.add_adapter("other", DCFTConfig(kernel_size=4, target_modules=["v_proj"], init_weights=False))
    assert torch.equal(logits(live), first)
    live.set_adapter("other")
    assert (logits(live) - first).abs().max() > 1e-3
    with live.disable_adapter():
        assert torch.equal(logits(live), logits(pico_model("llama")))
    live.save_pretrained(tmp_path / "both")
    assert inspect(tmp_path / "both" / "other").method == "DCFT"
    live.set_adapter("default")
    live.merge_adapter()
    assert (logits(live) - first).abs().max() < 2e-5
    live.unmerge_adapter()
    assert (logits(live) - first).abs().max() < 2e-5
    live.delete_adapter("other")
    again = peft.PeftModel.from_pretrained(pico_model("llama"), adapter).eval()
    assert (logits(again) - logits(live)).abs().max() < 2e-5


def test_bfloat16_base_trains_in_float32(tmp_path: Path) -> None:
    from adapter_merge.peft import DCFTConfig

    live = peft.get_peft_model(pico_model("llama", torch.bfloat16), DCFTConfig(r=3, target_modules=["q_proj"]))
    train(live, steps=2)
    live.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert {float(tensor) for name, tensor in saved.items() if name.endswith("ranknum")} == {3.0}
    frozen = [name for name, parameter in live.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert not frozen


def test_a_damaged_tensor_is_seen(tmp_path: Path) -> None:
    """The test above can fail: another kernel in the file is another model."""
    base, adapter, live = trained("llama", tmp_path, kernel_size=8, target_modules=["q_proj", "v_proj"])
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({name: tensor.flip(-1) if name.endswith("lora_C") else tensor for name, tensor in saved.items()}, file)
    merge(base, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(live)).abs().max() > 1e-3


def test_every_module_that_does_not_fit_is_named() -> None:
    from adapter_merge.peft import DCFTConfig

    with pytest.raises(InputError) as raised:
        peft.get_peft_model(pico_model("llama"), DCFTConfig(kernel_size=32, target_modules=["q_proj", "up_proj"]))
    assert str(raised.value).count("do not fit the kernel") == 4
    with pytest.raises(InputError, match="cannot adapt it"):
        peft.get_peft_model(pico_model("llama"), DCFTConfig(target_modules=["embed_tokens"]))
    for wrong in ({"kernel_size": 0}, {"kernel_size": [8]}, {"stride": "8"}, {"r": 0}, {"form": "reshape"}):
        with pytest.raises(InputError):
            DCFTConfig(**wrong)


def test_demo_adapter_runs_in_peft(tmp_path: Path) -> None:
    """PEFT reads a folder that it did not write, with the keys that the folder lacks at their defaults."""
    from adapter_merge.demo.walkthrough import adapter_folder
    from adapter_merge.peft import DCFTConfig

    config = DCFTConfig.from_pretrained(adapter_folder("dcft-pirate"))
    assert (config.kernel_size, config.stride, config.lora_alpha) == ([8, 8], [8, 8], 32.0)
    assert peft.PeftConfig.from_pretrained(adapter_folder("dcft-pirate")) == config


def test_an_unknown_setting_is_still_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained("llama", tmp_path, kernel_size=8, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"form": null', '"form": null, "gain": 2'))
    with pytest.raises(AdapterError, match="'gain' is unknown"):
        merge(base, adapter, tmp_path / "merged")
