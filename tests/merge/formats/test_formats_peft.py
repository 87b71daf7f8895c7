"""Every kind of PEFT folder, merged and run by transformers, against PEFT's live forward on the same base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES, EXPERTS, SOME, TOLERANCE, bases, converted_dude, merged_logits
from pico_bases import (
    TOKENS,
    error,
    gpt_oss,
    llama4,
    load,
    logits,
    quiet,
    randomise,
    train,
)
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError, MismatchError, NumericsError
from adapter_merge.formats.detection import detect
from adapter_merge.formats.stated_settings import ReadOptions

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_merged_model_computes_what_peft_computes(case: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    name, kind, arguments = CASES[case]
    scale = 0.03 if "OLoRA" in case else 0.1
    with quiet():
        config = getattr(peft, kind)(**arguments)
    live = train(base(name), config, tmp_path / "adapter", scale=scale)
    expected = logits(live)
    assert error(logits(load(base(name))), expected) > 0.01, "the adapter does something"
    assert error(merged_logits(base(name), tmp_path / "adapter", tmp_path / "out"), expected) < TOLERANCE
    found = detect(tmp_path / "adapter")
    assert (found.format, found.certainty) == ("peft", "certain")


@pytest.mark.parametrize("case", ["lora", "DuDe", "embedding DoRA", "tokens", "experts, apart on disk", "lora_bias"])
def test_delta_is_the_difference_of_the_merged_weights(case: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    name, kind, arguments = CASES[case]
    train(base(name), getattr(peft, kind)(**arguments), tmp_path / "adapter")
    merge(base(name), tmp_path / "adapter", tmp_path / "merged", MergeOptions(device="cpu"))
    delta(base(name), tmp_path / "adapter", tmp_path / "delta", DeltaOptions(device="cpu"))
    before, after = load_file(base(name) / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    deltas = load_file(tmp_path / "delta" / "delta.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == deltas.keys()
    for key in changed:
        torch.testing.assert_close(after[key] - before[key], deltas[key], atol=2e-6, rtol=0)


def test_bin_file_is_read_without_running_code(base: Callable[[str], Path], tmp_path: Path) -> None:
    live = train(base("llama"), peft.LoraConfig(r=4, target_modules=SOME), tmp_path / "a")
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert error(merged_logits(base("llama"), tmp_path / "a", tmp_path / "out"), logits(live)) < TOLERANCE


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_resized_vocabulary(
    kind: str, targets: list[str], saved: list[str] | None, base: Callable[[str], Path], tmp_path: Path
) -> None:
    if saved and "lm_head" in targets:
        return  # PEFT refuses a module that is both

    def resize(model: Any) -> None:
        model.resize_token_embeddings(70, mean_resizing=False)

    config = peft.LoraConfig(
        r=4, target_modules=targets, base_model_name_or_path=str(base(kind)), modules_to_save=saved
    )
    live = train(base(kind), config, tmp_path / "a", before=resize)
    if kind == "llama" and targets == ["q_proj", "embed_tokens"] and not saved:  # the head is not saved then
        with pytest.raises(MismatchError, match="give the resized model as BASE"):
            merge(base(kind), tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
        with quiet():
            resized = load(base(kind))
            resize(resized)
            resized.save_pretrained(tmp_path / "resized")
            live = peft.PeftModel.from_pretrained(load(tmp_path / "resized"), tmp_path / "a").eval()
        got = merged_logits(tmp_path / "resized", tmp_path / "a", tmp_path / "out")
        assert got.shape[-1] == 70
        assert error(got, logits(live)) < TOLERANCE
        return
    got = merged_logits(base(kind), tmp_path / "a", tmp_path / "out")
    assert got.shape[-1] == 70
    assert error(got, logits(live)) < TOLERANCE


def test_tokens_of_a_resized_vocabulary(base: Callable[[str], Path], tmp_path: Path) -> None:
    def resize(model: Any) -> None:
        model.resize_token_embeddings(70, mean_resizing=False)

    config = peft.LoraConfig(r=4, target_modules=SOME, trainable_token_indices=[1, 64, 65])
    live = train(base("llama"), config, tmp_path / "a", before=resize)
    assert error(merged_logits(base("llama"), tmp_path / "a", tmp_path / "out"), logits(live)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama4", "llama4, square", "gpt_oss, square"])
def test_experts_as_earlier_versions_of_peft_laid_them(name: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    """Before 0.19 the delta was turned round on (experts, n, m): here it is written out in float64."""
    torch.manual_seed(4)
    state = load_file(base(name) / "model.safetensors")
    outer = "feed_forward" if name.startswith("llama4") else "mlp"
    tensors, expected = {}, {}
    for parameter in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.{outer}.experts.{parameter}"
        experts, inner, out = state[key].shape
        a, b = torch.randn(2 * experts, inner), torch.randn(out, 2 * experts)
        nested = ".base_layer" if parameter == "gate_up_proj" else ""
        stem = f"base_model.model.model.layers.1.{outer}.experts{nested}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        three, four = a.double().reshape(experts, 2, inner), b.double().reshape(out, 2, experts)
        expected[key] = state[key].double() + 1.5 * torch.einsum("ore,eri->eio", four, three)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": EXPERTS[
        "target_parameters"], "peft_version": "0.18.1"}  # fmt: skip
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merge(base(name), folder, tmp_path / "out", MergeOptions(device="cpu"))
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in state if not torch.equal(got[key], state[key])} == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key].double(), value, atol=3e-6, rtol=0)
    del config["peft_version"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if name == "llama4, square":
        with pytest.raises(MismatchError, match="the orientation of their factors"):
            merge(base(name), folder, tmp_path / "no", MergeOptions(device="cpu"))
    else:
        merge(base(name), folder, tmp_path / "out2", MergeOptions(device="cpu"))
        assert (tmp_path / "out2" / "model.safetensors").read_bytes() == (
            tmp_path / "out" / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapter_of_separate_experts(name: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    """Adapters from before the experts were stacked; PEFT converts them while it loads them."""
    torch.manual_seed(3)
    outer, kinds = {
        "mixtral": ("block_sparse_moe", {"w1": (24, 32), "w3": (24, 32), "w2": (32, 24)}),
        "qwen3_moe": ("mlp", {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}),
    }[name]
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for kind, (out, inner) in kinds.items():
                module = f"base_model.model.model.layers.{layer}.{outer}.experts.{expert}.{kind}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(2, inner)
                tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(kinds), init_lora_weights=False)
    config.save_pretrained(tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base(name)), tmp_path / "a").eval()
    expected = logits(live)
    assert error(logits(load(base(name))), expected) > 0.01
    assert error(merged_logits(base(name), tmp_path / "a", tmp_path / "out"), expected) < TOLERANCE
    # The same base with its experts stacked on disk.
    stacked = stack_experts(base(name), tmp_path / "stacked")
    assert error(merged_logits(stacked, tmp_path / "a", tmp_path / "out2"), expected) < TOLERANCE


@pytest.mark.parametrize("make", [gpt_oss, llama4])
def test_adapter_of_one_expert_never_lies_across_a_turned_stack(make: Callable[..., Path], tmp_path: Path) -> None:
    """At these sizes rows of (in, out) would fit a gate's (out, in) by chance."""
    with quiet():
        base = make(tmp_path / "base", 16)
    keys = load_file(base / "model.safetensors")
    key = next(key for key in keys if key.endswith(("mlp.experts.gate_up_proj", "feed_forward.experts.gate_up_proj")))
    stem = f"base_model.model.{key.removesuffix('gate_up_proj')}1.gate_proj"
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, 32), f"{stem}.lora_B.weight": torch.randn(16, 2)}
    peft.LoraConfig(r=2, target_modules=["gate_proj"]).save_pretrained(tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="experts, in, out"):
        merge(base, tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
    assert not (tmp_path / "no").exists()


def stack_experts(folder: Path, output: Path) -> Path:
    """The checkpoint as the model holds it in memory: all experts of a layer in one 3-D tensor."""
    import shutil

    shutil.copytree(folder, output)
    state = {key: value.contiguous() for key, value in load(folder).state_dict().items()}
    assert any(value.ndim == 3 for value in state.values())
    save_file(state, output / "model.safetensors", {"format": "pt"})
    return output


def test_stacked_experts_on_disk(base: Callable[[str], Path], tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    live = train(
        base("qwen3_moe"), peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters), tmp_path / "a"
    )
    stacked = stack_experts(base("qwen3_moe"), tmp_path / "stacked")
    assert error(merged_logits(stacked, tmp_path / "a", tmp_path / "out"), logits(live)) < TOLERANCE


def test_adapter_of_a_part_of_the_model(base: Callable[[str], Path], tmp_path: Path) -> None:
    """The decoder alone was given to PEFT, as one does with a vision-language model's language part."""
    with quiet():
        model = load(base("llama"))
        part = peft.get_peft_model(model.model, peft.LoraConfig(r=4, target_modules=SOME))
        randomise(part)
        part.eval().save_pretrained(tmp_path / "a")
        model.model = part.base_model.model
    assert error(merged_logits(base("llama"), tmp_path / "a", tmp_path / "out"), logits(model)) < TOLERANCE


def test_deep_prefix_and_ambiguity(base: Callable[[str], Path], tmp_path: Path) -> None:
    train(base("llama"), peft.LoraConfig(r=4, target_modules=SOME), tmp_path / "a")
    state = load_file(base("llama") / "model.safetensors")
    deep = tmp_path / "deep"
    deep.mkdir()
    inner = {f"vlm.language.{key}": value for key, value in state.items()}
    save_file(inner, deep / "model.safetensors", {"format": "pt"})
    merge(base("llama"), tmp_path / "a", tmp_path / "plain", MergeOptions(device="cpu"))
    merge(deep, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    plain, got = load_file(tmp_path / "plain" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[f"vlm.language.{key}"], value) for key, value in plain.items())
    twice = tmp_path / "twice"
    twice.mkdir()
    other = {f"vlm.other.{key}": value.clone() for key, value in state.items()}
    save_file(inner | other, twice / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="several parts of the base"):
        merge(twice, tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
    options = ReadOptions(prefix="vlm.other")
    merge(twice, tmp_path / "a", tmp_path / "stated", MergeOptions(device="cpu", reading=options))
    got = load_file(tmp_path / "stated" / "model.safetensors")
    assert all(torch.equal(got[f"vlm.other.{key}"], value) for key, value in plain.items())
    assert all(torch.equal(got[f"vlm.language.{key}"], value) for key, value in state.items())


@pytest.mark.parametrize("fused_base", [True, False])
def test_fused_and_split_projections(fused_base: bool, base: Callable[[str], Path], tmp_path: Path) -> None:
    """An adapter of q, k, v, gate and up on a base that keeps them fused, and the other way round."""
    linears = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    train(base("llama"), peft.LoraConfig(r=4, target_modules=linears, use_dora=True), tmp_path / "a")
    merge(base("llama"), tmp_path / "a", tmp_path / "plain", MergeOptions(device="cpu"))
    state, expected = (
        load_file(base("llama") / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    if fused_base:
        folder = tmp_path / "fused"
        folder.mkdir()
        save_file(fuse(state), folder / "model.safetensors", {"format": "pt"})
        merge(folder, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
        got = load_file(tmp_path / "out" / "model.safetensors")
        expected = fuse(expected)
    else:
        adapter = load_file(tmp_path / "a" / "adapter_model.safetensors")
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["gate_up_proj"], init_lora_weights=False)
        config.save_pretrained(tmp_path / "b")
        tensors = {}
        for layer in range(2):
            module = f"base_model.model.model.layers.{layer}.mlp"
            one, two = (adapter[f"{module}.{kind}.lora_A.weight"] for kind in ("gate_proj", "up_proj"))
            b1, b2 = (adapter[f"{module}.{kind}.lora_B.weight"] for kind in ("gate_proj", "up_proj"))
            tensors[f"{module}.gate_up_proj.lora_A.weight"] = torch.cat((one, two))
            tensors[f"{module}.gate_up_proj.lora_B.weight"] = torch.block_diag(b1, b2)
        save_file(tensors, tmp_path / "b" / "adapter_model.safetensors", {"format": "pt"})
        merge(base("llama"), tmp_path / "b", tmp_path / "out", MergeOptions(device="cpu"))
        got = load_file(tmp_path / "out" / "model.safetensors")
        expected = dict(state)
        for layer in range(2):
            for kind in ("gate_proj", "up_proj"):
                key = f"model.layers.{layer}.mlp.{kind}"
                a, b = (adapter[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
                expected[f"{key}.weight"] = state[f"{key}.weight"] + b @ a
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=2e-6, rtol=0)


def test_a_dude_of_fused_projections_on_a_split_residual(base: Callable[[str], Path], tmp_path: Path) -> None:
    """None of its weights is looked at whole for evidence: what the folder says of its base is believed."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        module = f"base_model.model.model.layers.{layer}.mlp.gate_up_proj"
        shape = load_file(base("llama") / "model.safetensors")[f"model.layers.{layer}.mlp.gate_proj.weight"].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, shape[1])
        tensors[f"{module}.lora_B.weight"] = 0.01 * torch.randn(2 * shape[0], 4)
        tensors[f"{module}.lora_magnitude_vector"] = 1 + torch.rand(2 * shape[0])
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "DUDE", "format_version": 1, "r": 4, "lora_alpha": 4, "use_rslora": False,
              "base": "residual", "residual_dtype": "float32", "target_modules": ["gate_up_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    content = merge(base("llama"), folder, tmp_path / "out", MergeOptions(device="cpu")).as_json()
    assert content["adapters"][0]["base_kind"] == "residual"
    before, after = load_file(base("llama") / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(2) for kind in ("gate", "up")
    }


def fuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {k: v for k, v in state.items() if not any(f".{n}_proj." in k for n in ("q", "k", "v", "gate", "up"))}
    for layer in range(2):
        for owner, parts, fused in (("self_attn", "qkv", "qkv_proj"), ("mlp", ("gate", "up"), "gate_up_proj")):
            stem = f"model.layers.{layer}.{owner}"
            result[f"{stem}.{fused}.weight"] = torch.cat([state[f"{stem}.{part}_proj.weight"] for part in parts])
    return result


def test_tokens_are_the_ones_that_were_run() -> None:
    assert int(TOKENS.max()) < 64 and {3, 9, 30} & set(TOKENS.flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_converted_folder_is_the_same_adapter(
    case: str, pickled: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    name, kind, arguments = CASES[case]
    with quiet():
        config = getattr(peft, kind)(**arguments)
    train(base(name), config, tmp_path / "a", scale=0.03 if "OLoRA" in case else 0.1)
    if pickled:
        file = tmp_path / "a" / "adapter_model.safetensors"
        torch.save(load_file(file), tmp_path / "a" / "adapter_model.bin")
        file.unlink()
    needs_base = "DuDe" in case or case == "OLoRA with DoRA"
    if needs_base:
        with pytest.raises(InputError, match="--base"):
            convert(tmp_path / "a", tmp_path / "c")
    convert(tmp_path / "a", tmp_path / "c", ConvertOptions(base=base(name) if needs_base else None))
    assert not list((tmp_path / "c").glob("*.bin"))
    merge(base(name), tmp_path / "a", tmp_path / "one", MergeOptions(device="cpu"))
    merge(base(name), tmp_path / "c", tmp_path / "two", MergeOptions(device="cpu"))
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert [key for key, value in one.items() if not torch.equal(value, two[key])] == []
    if not needs_base:  # PEFT loads the folder, and computes the same
        with quiet():
            live = [peft.PeftModel.from_pretrained(load(base(name)), tmp_path / folder).eval() for folder in "ac"]
        assert torch.equal(logits(live[0]), logits(live[1]))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "corda"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_converted_folder_knows_what_was_given(
    init: str, dora: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """--init-adapter and --magnitudes are needed once: the safe folder holds what they told."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=SOME, init_lora_weights="pissa_niter_4", use_dora=dora)
    with quiet():
        model = peft.get_peft_model(load(base("llama")), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        randomise(model, 0.03)
        model.eval()
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(tmp_path / "a")
    options = ReadOptions(init_adapter=tmp_path / "initial")
    convert(tmp_path / "a", tmp_path / "c", ConvertOptions(base=base("llama"), reading=options))
    assert error(merged_logits(base("llama"), tmp_path / "c", tmp_path / "out"), logits(model)) < TOLERANCE
    factor(base("llama"), tmp_path / "c", tmp_path / "f")
    with quiet():
        factors = peft.PeftModel.from_pretrained(load(base("llama")), tmp_path / "f").eval()
    assert error(logits(factors), logits(model)) < TOLERANCE
    convert(tmp_path / "c", tmp_path / "again")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert [(tmp_path / "c" / name).read_bytes() for name in names] == [
        (tmp_path / "again" / name).read_bytes() for name in names
    ]
    report = verify(base("llama"), tmp_path / "c", tmp_path / "f", VerifyOptions(generated=4)).as_json()
    assert report["passed"], report["problems"]


def test_a_converted_folder_holds_the_magnitudes_that_were_given(base: Callable[[str], Path], tmp_path: Path) -> None:
    expected = converted_dude(base("llama"), tmp_path)
    options = ReadOptions(magnitudes=tmp_path / "kept")
    convert(tmp_path / "converted", tmp_path / "c", ConvertOptions(reading=options))
    assert error(merged_logits(base("llama"), tmp_path / "c", tmp_path / "out"), expected) < TOLERANCE
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base("llama")), tmp_path / "c").eval()
    assert error(logits(live), expected) < TOLERANCE


def test_a_negative_alpha_of_a_principal_adapter_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=SOME, init_lora_weights="pissa", use_dora=True)
    train(base("llama"), config, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": -8}))
    with pytest.raises(NumericsError, match="lora_alpha"):
        convert(tmp_path / "a", tmp_path / "c", ConvertOptions(base=base("llama"), base_kind="original"))
    assert not (tmp_path / "c").exists()
