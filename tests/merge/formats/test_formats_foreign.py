"""Files of other projects, against their formulas written out here in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pico_bases import llama, load, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.convert import convert
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterError, InputError, MismatchError, UnsupportedError
from adapter_merge.formats.detection import detect
from adapter_merge.formats.stated_settings import ReadOptions

peft = pytest.importorskip("peft", reason="PEFT must load what is written for it (extra verify)")

STEM = "model.layers.{}.{}"
MODULES = [STEM.format(layer, kind) for layer in (0, 1) for kind in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base") / "base", dtype=request.param)


@pytest.fixture(scope="module")
def base32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base32") / "base")


def check(base: Path, adapter: Path, output: Path, expected: dict[str, Tensor], options: ReadOptions | None = None,
          tolerance: float = 1e-6) -> None:  # fmt: skip
    """expected: module -> W' (out, in) float64. Rounded once to the base's dtype; everything else as it was.

    The safe folder that `convert` makes of the adapter needs no options and merges to the same bytes.
    """
    merge(base, adapter, output, MergeOptions(device="cpu", reading=options))
    safe = output.with_name(f"{output.name}-safe")
    convert(adapter, safe, ConvertOptions(base=base, reading=options))
    merge(base, safe, output.with_name(f"{output.name}-again"), MergeOptions(device="cpu"))
    report = verify(
        base, adapter, output, VerifyOptions(reading=options, generated=2)
    ).as_json()  # the live, unmerged adapter
    assert report["passed"], report["problems"]
    again = load_file(output.with_name(f"{output.name}-again") / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in load_file(output / "model.safetensors").items())
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in after.items():
        module = key.removesuffix(".weight")
        if module not in expected:
            assert torch.equal(value, before[key]), key
            continue
        exact = expected[module]
        assert float((exact - before[key].double()).norm()) > 1e-3
        ulp = torch.finfo(value.dtype).eps * exact.abs().clamp_min(1e-3)
        assert bool(((value.double() - exact).abs() <= 0.51 * ulp + tolerance).all()), key


def randoms(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 0.3).to(dtype)


# -- MyTransformers ----------------------------------------------------------------------------------------


def mytransformers(
    base: Path,
    folder: Path,
    *,
    generation: str,
    trainable: bool,
    wrapped: bool,
    method: str = "dude",
    iterations: int = 1,
) -> dict[str, Tensor]:
    """A checkpoint as its trainer writes it, and what its forward() computes with."""
    torch.manual_seed(5)
    state = load_file(base / "model.safetensors")
    rank, scaler = 3, 6.0
    scale = scaler / rank
    saved, expected = {}, {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        frozen, a, b = w0, randoms(rank, w0.shape[1]), torch.zeros(w0.shape[0], rank)
        if method in ("dude", "pissa"):
            u, s, vh = torch.linalg.svd(w0.float(), full_matrices=False)
            root = torch.diag((s[:rank] / scale).sqrt())
            b, a = u[:, :rank] @ root, root @ vh[:rank]
            frozen = (w0.float() - scale * b @ a).to(w0.dtype)
        a, b = (a + randoms(*a.shape) * 0.1).to(w0.dtype), (b + randoms(*b.shape) * 0.1).to(w0.dtype)
        direction = frozen.double() + scale * b.double() @ a.double()
        magnitude = frozen.double().norm(dim=1)
        if generation == "trained":
            magnitude = (w0.double().norm(dim=1) * (1 + 0.1 * torch.rand(w0.shape[0]))).to(w0.dtype).double()
            saved[f"{module}.origin_magnitude"] = magnitude.to(w0.dtype)
        expected[module] = direction
        if generation == "dim0":
            expected[module] = direction * (frozen.double().norm(dim=0) / direction.norm(dim=0))
        elif method != "pissa":
            expected[module] = direction * (magnitude / direction.norm(dim=1))[:, None]
        saved[f"{module}.weight_a"], saved[f"{module}.weight_b"] = a, b
        if not trainable:
            saved[f"{module}.weight"] = frozen
    if not trainable:
        saved |= {key: value for key, value in state.items() if key not in saved}
    folder.mkdir()
    torch.save({"model_state_dict": saved, "optimizer_state_dict": {}} if wrapped else saved, folder / "final.ckpt")
    arguments = {"lora_rank": rank, "lora_scaler": scaler, f"use_{method}": True, "pissa_n_iters": iterations}
    (folder / "config.json").write_text(json.dumps(arguments))
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("method", "generation"),
    [(m, g) for m in ("dude", "dora") for g in ("untrained", "trained", "dim0")] + [("pissa", "untrained")],
)
def test_mytransformers_with_its_frozen_weights(
    base: Path, tmp_path: Path, generation: str, method: str, wrapped: bool
) -> None:
    expected = mytransformers(
        base, tmp_path / "a", generation=generation, trainable=False, wrapped=wrapped, method=method
    )
    options = ReadOptions(magnitude_axis="in") if generation == "dim0" else None
    check(base, tmp_path / "a", tmp_path / "out", expected, options)
    check(base, tmp_path / "a" / "final.ckpt", tmp_path / "out2", expected, options)
    assert detect(tmp_path / "a").format == "mytransformers"


@pytest.mark.parametrize("generation", ["untrained", "trained"])
@pytest.mark.parametrize("method", ["dude", "dora"])
def test_mytransformers_without_its_frozen_weights(base32: Path, tmp_path: Path, generation: str, method: str) -> None:
    expected = mytransformers(
        base32, tmp_path / "a", generation=generation, trainable=True, wrapped=False, method=method
    )
    check(base32, tmp_path / "a", tmp_path / "out", expected, tolerance=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 8])
@pytest.mark.parametrize(("method", "generation"), [("dude", "untrained"), ("dude", "trained"), ("pissa", "untrained")])
def test_factors_of_mytransformers_with_its_frozen_weights(
    base: Path, tmp_path: Path, method: str, generation: str, iterations: int
) -> None:
    """The stated error is the real one: float32's rounding, or that of the bfloat16 residual, which no factor says."""
    adapter = tmp_path / "a"
    expected = mytransformers(
        base, adapter, generation=generation, trainable=False, wrapped=False, method=method, iterations=iterations
    )
    convert(adapter, tmp_path / "safe", ConvertOptions(base=base))
    before = load_file(base / "model.safetensors")
    rounded = before[f"{MODULES[0]}.weight"].dtype == torch.bfloat16
    for source, output in ((adapter, tmp_path / "f"), (tmp_path / "safe", tmp_path / "g")):
        content = factor(base, source, output).as_json()
        assert content["exact"] is not rounded
        assert bool(content.get("warnings")) is rounded
        with quiet():
            live = peft.PeftModel.from_pretrained(load(base), output).merge_and_unload().state_dict()
        for module, value in expected.items():
            delta = value - before[f"{module}.weight"].double()
            got = live[f"{module}.weight"].double()
            error = float((got - value).norm() / delta.norm())
            stated = content["layers"][module]["relative_error"]
            assert stated < (0.2 if rounded else 1e-5)
            assert abs(error - stated) < 0.02 * stated + 3e-6, module
    limited = factor(base, adapter, tmp_path / "limited", FactorOptions(rank=2)).as_json()
    assert limited["certificate"]["ranks"] == [2, 2]


def test_factors_of_mytransformers_on_another_base(base32: Path, tmp_path: Path) -> None:
    mytransformers(base32, tmp_path / "a", generation="trained", trainable=False, wrapped=False)
    state = load_file(base32 / "model.safetensors")
    other = {key: value + 0.01 * torch.randn_like(value) for key, value in state.items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="is not this base"):
        factor(tmp_path / "other", tmp_path / "a", tmp_path / "no")
    with pytest.raises(InputError, match="without the base"):
        factor(None, tmp_path / "a", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_mytransformers_that_cannot_be_known(base32: Path, tmp_path: Path) -> None:
    mytransformers(base32, tmp_path / "a", generation="trained", trainable=True, wrapped=False, iterations=8)
    with pytest.raises(UnsupportedError, match="randomised"):
        merge(base32, tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(AdapterError, match="lora_scaler is missing or wrong") as error:
        merge(base32, tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
    assert "the variant is named only" in str(error.value) and "has a magnitude" not in str(error.value)
    assert not (tmp_path / "no").exists()


# -- DCFT --------------------------------------------------------------------------------------------------


def dcft_checkpoint(base: Path, folder: Path) -> tuple[dict[str, Tensor], None]:
    """The reference's own form, kernel 4 x 4, and W' of its modules in float64."""
    torch.manual_seed(9)
    saved, expected = dict(load_file(base / "model.safetensors")), {}
    for module in MODULES:
        w0 = saved[f"{module}.weight"]
        a, b, kernel = randoms(1, w0.shape[1] // 4), randoms(w0.shape[0] // 4, 1), randoms(1, 1, 4, 4)
        image = (a.double().T @ b.double().T)[None, None]
        dense = torch.nn.functional.conv_transpose2d(image, kernel.double(), stride=4)[0, 0]
        expected[module] = w0.double() + dense.T * 8 / (4 + 1e-5)
        saved |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.lora_C": kernel}
        saved[f"{module}.ranknum"] = torch.tensor([4.0])
    save_dcft(base, folder, saved)
    return expected, None


def dcft_channels(base: Path, folder: Path) -> tuple[dict[str, Tensor], None]:
    """Three channels and the deconvolution's bias."""
    torch.manual_seed(9)
    saved, expected = dict(load_file(base / "model.safetensors")), {}
    for module in MODULES:
        w0 = saved[f"{module}.weight"]
        a, b = randoms(3, 2, w0.shape[1] // 4), randoms(3, w0.shape[0] // 4, 2)
        kernel, constant = randoms(3, 1, 4, 4), randoms(1)
        image = torch.stack([one.double().T @ two.double().T for one, two in zip(a, b, strict=True)])[None]
        dense = torch.nn.functional.conv_transpose2d(image, kernel.double(), constant.double(), stride=4)[0, 0]
        expected[module] = w0.double() + dense.T * 8 / (4 + 1e-5)
        saved |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.lora_C.weight": kernel}
        saved |= {f"{module}.lora_C.bias": constant, f"{module}.ranknum": torch.tensor([4.0])}
    save_dcft(base, folder, saved)
    return expected, None


def dcft_reshape_file(base: Path, folder: Path) -> tuple[dict[str, Tensor], None]:
    """The third-party form, with its bias."""
    torch.manual_seed(6)
    state, saved, expected = load_file(base / "model.safetensors"), {}, {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        out, inner = w0.shape
        b, a, c, constant = randoms(inner // 4, 2), randoms(2, out // 4), randoms(1, 1, 4, 4), randoms(1)
        image = (b.double() @ a.double())[None, None]
        image = torch.nn.functional.conv_transpose2d(image, c.double(), constant.double(), stride=4)
        expected[module] = w0.double() + image[0, 0].reshape(out, inner)
        saved |= {f"{module}.B": b, f"{module}.A": a, f"{module}.deconv.weight": c, f"{module}.deconv.bias": constant}
    folder.mkdir()
    torch.save(saved, folder / "model.pt")
    return expected, None


def save_dcft(base: Path, folder: Path, saved: dict[str, Tensor]) -> None:
    folder.mkdir()
    torch.save(saved, folder / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "lora_alpha": 8, "apply_lora": True}))


@pytest.mark.parametrize("bias", [True, False])
def test_dcft_reshape_form(base: Path, tmp_path: Path, bias: bool) -> None:
    torch.manual_seed(6)
    state = load_file(base / "model.safetensors")
    saved, expected = {}, {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        out, inner = w0.shape
        d, k = 4, 2
        b, a, c, constant = randoms(inner // d, k), randoms(k, out // d), randoms(1, 1, d, d), randoms(1)
        image = (b.double() @ a.double())[None, None]
        image = torch.nn.functional.conv_transpose2d(image, c.double(), constant.double() if bias else None, stride=d)
        expected[module] = w0.double() + image[0, 0].reshape(out, inner)
        saved |= {f"{module}.B": b, f"{module}.A": a, f"{module}.deconv.weight": c, f"{module}.base_layer": w0}
        if bias:
            saved[f"{module}.deconv.bias"] = constant
    torch.save(saved, tmp_path / "model.pt")
    assert detect(tmp_path / "model.pt").format == "dcft-reshape"
    check(base, tmp_path / "model.pt", tmp_path / "out", expected, tolerance=3e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (8, 8), (64, 16), (16, 64), (15, 10), (7, 5), (96, 64)])
@pytest.mark.parametrize("rank", [1, 2])
def test_reshaped_factors_are_the_reshape(shape: tuple[int, int], rank: int) -> None:
    from adapter_merge.methods.dcft_reshape import reshaped_factors

    torch.manual_seed(0)
    left, right = torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1]).double()
    up, down = reshaped_factors(left, right)
    torch.testing.assert_close(up @ down, (left @ right).reshape(shape[::-1]))


def test_dcft_with_one_kernel_for_all(base32: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = load_file(base32 / "model.safetensors")
    kernel, saved, expected = randoms(1, 1, 4, 4), dict(state), {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        a, b = randoms(1, w0.shape[1] // 4), randoms(w0.shape[0] // 4, 1)
        image = torch.nn.functional.conv_transpose2d(
            (a.double().T @ b.double().T)[None, None], kernel.double(), stride=4
        )
        expected[module] = w0.double() + image[0, 0].T * 8 / (4 + 1e-5)
        saved |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.ranknum": torch.tensor([4.0])}
    saved["lora_C"] = kernel
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save(saved, folder / "pytorch_model.bin")
    config = json.loads((base32 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "lora_alpha": 8, "apply_lora": True}))
    check(base32, folder, tmp_path / "out", expected, tolerance=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stride", [(4, 4), (2, 4)])
def test_dcft_of_several_channels_and_with_a_bias(
    base32: Path, tmp_path: Path, channels: int, bias: bool, stride: tuple[int, int]
) -> None:
    """The oracle is torch's own conv_transpose2d of an image with that many channels, in float64."""
    torch.manual_seed(9)
    state = load_file(base32 / "model.safetensors")
    saved, expected = dict(state), {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        n0, n1 = (w0.shape[1] - 4) // stride[0] + 1, (w0.shape[0] - 4) // stride[1] + 1
        a, b, kernel = randoms(channels, 2, n0), randoms(channels, n1, 2), randoms(channels, 1, 4, 4)
        constant = randoms(1)
        image = torch.stack([one.double().T @ two.double().T for one, two in zip(a, b, strict=True)])
        dense = torch.nn.functional.conv_transpose2d(
            image[None], kernel.double(), constant.double() if bias else None, stride=stride
        )[0, 0]
        expected[module] = w0.double() + dense.T * 8 / (4 + 1e-5)
        saved |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.ranknum": torch.tensor([4.0])}
        if channels == 1 and not bias:  # as the reference has it
            saved |= {f"{module}.lora_A": a[0], f"{module}.lora_B": b[0], f"{module}.lora_C": kernel}
        else:  # as torch.nn.ConvTranspose2d saves it
            saved[f"{module}.lora_C.weight"] = kernel
        if bias:
            saved[f"{module}.lora_C.bias"] = constant
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save(saved, folder / "pytorch_model.bin")
    config = json.loads((base32 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "lora_alpha": 8, "apply_lora": True}))
    check(base32, folder, tmp_path / "out", expected, tolerance=6e-6)
    convert(folder, tmp_path / "safe", ConvertOptions(base=base32))
    check(base32, tmp_path / "safe", tmp_path / "out2", expected, tolerance=6e-6)
    content = factor(None, tmp_path / "safe", tmp_path / "factors").as_json()
    assert content["certificate"]["max_relative_error"] < 1e-6
    assert content["certificate"]["ranks"][1] <= channels * 2 * 4 + bias
    check(base32, tmp_path / "factors", tmp_path / "out3", expected, tolerance=6e-6)
    report = verify(base32, folder, tmp_path / "out", VerifyOptions(generated=4)).as_json()
    assert report["passed"], report["problems"]


@pytest.mark.parametrize("channels", [2, 3])
def test_dcft_reshape_form_of_several_channels(base32: Path, tmp_path: Path, channels: int) -> None:
    torch.manual_seed(6)
    state = load_file(base32 / "model.safetensors")
    saved, expected = {}, {}
    for module in MODULES:
        w0 = state[f"{module}.weight"]
        out, inner = w0.shape
        b, a = randoms(channels, inner // 4, 2), randoms(channels, 2, out // 4)
        c, constant = randoms(channels, 1, 4, 4), randoms(1)
        image = (b.double() @ a.double())[None]
        image = torch.nn.functional.conv_transpose2d(image, c.double(), constant.double(), stride=4)
        expected[module] = w0.double() + image[0, 0].reshape(out, inner)
        saved |= {f"{module}.B": b, f"{module}.A": a, f"{module}.deconv.weight": c, f"{module}.deconv.bias": constant}
    torch.save(saved, tmp_path / "model.pt")
    check(base32, tmp_path / "model.pt", tmp_path / "out", expected, tolerance=5e-6)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 2, 4, 4), (4, 4)])
def test_dcft_of_channels_that_do_not_fit(base32: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    saved = dict(load_file(base32 / "model.safetensors"))
    q = MODULES[0]
    saved |= {f"{q}.lora_A": randoms(1, 8), f"{q}.lora_B": randoms(8, 1), f"{q}.ranknum": torch.tensor([4.0])}
    saved[f"{q}.lora_C"] = randoms(*shape)
    torch.save(saved, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"lora_alpha": 8, "apply_lora": True}))
    with pytest.raises(AdapterError, match="do not fit"):
        merge(None, tmp_path, tmp_path / "out", MergeOptions(device="cpu"))
    assert not (tmp_path / "out").exists()


# -- kohya and LyCORIS ---------------------------------------------------------------------------------------


def kohya(
    base: Path, kind: str, dora: str | None, prefix: str, alpha: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(8)
    state = load_file(base / "model.safetensors")
    saved, expected = {}, {}
    for module in MODULES:
        w0 = state[f"{module}.weight"].double()
        out, inner = w0.shape
        name = prefix + module.replace(".", "_") if prefix else module
        scale = 6.0 / 3 if alpha else 1.0
        if kind == "lora":
            parts = {"lora_down.weight": randoms(3, inner), "lora_up.weight": randoms(out, 3)}
            delta = parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()
        elif kind == "loha":
            parts = {"hada_w1_a": randoms(out, 3), "hada_w1_b": randoms(3, inner),
                     "hada_w2_a": randoms(out, 3), "hada_w2_b": randoms(3, inner)}  # fmt: skip
            one, two = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
            delta = one * two
        elif kind == "lokr":
            parts = {"lokr_w1": randoms(4, 4), "lokr_w2_a": randoms(out // 4, 3), "lokr_w2_b": randoms(3, inner // 4)}
            delta = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double())
        else:  # both full: the scale is 1
            parts = {"lokr_w1": randoms(4, 4), "lokr_w2": randoms(out // 4, inner // 4)}
            delta, scale = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2"].double()), 1.0
        if alpha:
            parts["alpha"] = torch.tensor(6.0)
        after = w0 + scale * delta
        if dora is not None:
            dim = 1 if dora == "out" else 0
            scales = w0.norm(dim=dim, keepdim=True) * (1 + 0.2 * torch.rand(after.norm(dim=dim, keepdim=True).shape))
            parts["dora_scale"] = scales.float()
            after = after * (parts["dora_scale"].double() / after.norm(dim=dim, keepdim=True))
        expected[module] = after
        saved |= {f"{name}.{role}": tensor.contiguous() for role, tensor in parts.items()}
    return saved, expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-full"])
@pytest.mark.parametrize("dora", [None, "out", "in"])
def test_kohya_and_lycoris(base: Path, tmp_path: Path, kind: str, dora: str | None) -> None:
    for prefix, alpha in (("lora_te_", True), ("lycoris_", False), ("", True)):
        saved, expected = kohya(base, kind, dora, prefix, alpha)
        file = tmp_path / f"{prefix or 'dotted'}.safetensors"
        save_file(saved, file)
        check(base, file, tmp_path / f"out-{prefix}", expected, tolerance=3e-6)
        assert detect(file).format == "kohya"
        assert detect(file).certainty == ("certain" if prefix else "likely")


def test_kohya_names_need_a_base(base32: Path, tmp_path: Path) -> None:
    saved, expected = kohya(base32, "lora", None, "lora_te_", True)
    file = tmp_path / "a.safetensors"
    save_file(saved, file)
    for write in (convert, lambda file, output: factor(None, file, output).as_json()):
        with pytest.raises(InputError, match="underscores"):
            write(file, tmp_path / "no")
        assert not (tmp_path / "no").exists()
    convert(file, tmp_path / "safe", ConvertOptions(base=base32))
    factor(None, tmp_path / "safe", tmp_path / "factors")
    check(base32, tmp_path / "factors", tmp_path / "out", expected, tolerance=3e-6)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-full"])
def test_kohya_converted_folder_in_peft(base32: Path, tmp_path: Path, kind: str) -> None:
    """A LoRA becomes a folder that PEFT itself loads; LyCORIS' methods a folder that PEFT refuses."""
    saved, expected = kohya(base32, kind, None, "lora_te_", True)
    save_file(saved, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "safe", ConvertOptions(base=base32))
    with quiet():
        if kind != "lora":
            with pytest.raises((ValueError, KeyError)):
                peft.PeftModel.from_pretrained(load(base32), tmp_path / "safe")
            return
        live = peft.PeftModel.from_pretrained(load(base32), tmp_path / "safe").merge_and_unload().state_dict()
    for module, value in expected.items():
        torch.testing.assert_close(live[f"{module}.weight"].double(), value, atol=3e-6, rtol=0)


def test_kohya_with_several_ranks_and_some_magnitudes(base32: Path, tmp_path: Path) -> None:
    """No PEFT folder says that only some modules have magnitudes; ours does."""
    saved, expected = kohya(base32, "lora", "out", "lora_te_", True)
    plain, expected_plain = kohya(base32, "lora", None, "lora_te_", True)
    mixed = {key: value for key, value in saved.items() if "layers_0" in key}
    mixed |= {key: value for key, value in plain.items() if "layers_1" in key}
    q = f"lora_te_{MODULES[0].replace('.', '_')}"
    down, up = mixed[f"{q}.lora_down.weight"], mixed[f"{q}.lora_up.weight"]
    mixed[f"{q}.lora_down.weight"] = torch.cat((down, torch.zeros(2, down.shape[1])))
    mixed[f"{q}.lora_up.weight"] = torch.cat((up, torch.zeros(up.shape[0], 2)), dim=1).contiguous()
    mixed[f"{q}.alpha"] = torch.tensor(10.0)  # the same scale at rank 5
    expected = {name: (expected if ".0." in name else expected_plain)[name] for name in expected}
    save_file(mixed, tmp_path / "a.safetensors")
    check(base32, tmp_path / "a.safetensors", tmp_path / "out", expected, tolerance=3e-6)


def test_kohya_of_an_image_model_is_refused(base32: Path, tmp_path: Path) -> None:
    saved, _ = kohya(base32, "lora", None, "lora_unet_", True)
    save_file(saved, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="image model"):
        merge(base32, tmp_path / "a.safetensors", tmp_path / "no", MergeOptions(device="cpu"))


def test_flat_magnitude_of_a_square_weight_is_not_guessed(base32: Path, tmp_path: Path) -> None:
    saved, expected = kohya(base32, "lora", "in", "lora_te_", True)
    flat = {key: value.reshape(-1) if key.endswith("dora_scale") else value for key, value in saved.items()}
    file = tmp_path / "a.safetensors"
    save_file(flat, file)
    with pytest.raises(AdapterError, match="--magnitude-axis"):
        merge(base32, file, tmp_path / "no", MergeOptions(device="cpu"))
    check(base32, file, tmp_path / "out", expected, ReadOptions(magnitude_axis="in"), tolerance=3e-6)


def test_stated_format(base32: Path, tmp_path: Path) -> None:
    saved, expected = kohya(base32, "lora", None, "", True)
    file = tmp_path / "a.safetensors"
    save_file(saved, file)
    check(base32, file, tmp_path / "out", expected, ReadOptions(format="kohya"), tolerance=3e-6)
    with pytest.raises(InputError):
        merge(base32, file, tmp_path / "no", MergeOptions(device="cpu", reading=ReadOptions(format="gguf")))
    with pytest.raises(AdapterError):
        merge(base32, file, tmp_path / "no", MergeOptions(device="cpu", reading=ReadOptions(format="mytransformers")))
