"""Encoders without labels and in small precisions: against PEFT and transformers, in the layout that others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import save_encoder, save_encoder_adapter, save_gpt2, save_lora

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import InputError, UnsupportedError
from adapter_merge.export.adding import add_adapters
from adapter_merge.export.checking.verification import verify_onnx
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.engine.encoder_session import Classifier
from adapter_merge.export.exporting import export_model
from adapter_merge.export.folder.contents import read_export
from adapter_merge.verification.live_model import trained_model

pytestmark = pytest.mark.onnx
BAR = 1e-4
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(40)], "rest": [7 * i % 250 for i in range(20)]}


def batch() -> tuple[Any, Any]:
    """Four texts of mixed lengths, one of a single token, one padded on the left."""
    ids = (np.arange(4 * 30).reshape(4, 30) * 37) % 300 + 5
    mask = np.ones_like(ids)
    mask[1, 12:] = 0
    mask[2, 1:] = 0
    mask[3, :9] = 0
    return ids, mask


def live(base: Path, adapter: Path | None, name_of_class: str) -> Any:
    """transformers' model of the class, with the adapter unmerged in PEFT."""
    import transformers
    from peft import PeftModel

    model: Any = getattr(transformers, name_of_class).from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).get_base_model()
    return model.eval()


def answers(model: Any, ids: Any, mask: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))


def sentences(hidden: Any, mask: Any, how: str) -> torch.Tensor:
    """Pooling and normalisation as the papers have it, text by text, in float64."""
    rows = []
    for states, valid in zip(hidden.double(), torch.from_numpy(mask), strict=True):
        tokens = states[valid == 1]
        row = {"mean": tokens.mean(0), "max": tokens.amax(0), "cls": tokens[0], "last": tokens[-1]}[how]
        rows.append(row / row.norm())
    return torch.stack(rows)


def sentence_files(folder: Path, how: str, *more: str) -> None:
    """modules.json and the pooling's settings, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", *more]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], 1))]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    settings = {f"pooling_mode_{mode}": mode == how for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "mode", "how", "setting"),
    [
        ("mpnet", "Model", "batched", "mean", "mean_tokens"),
        ("modernbert", "Model", "switchable", "cls", "cls_token"),
        ("distilbert", "Model", "switchable", "max", "max_tokens"),
        ("xlm-roberta", "MaskedLM", "merged", "last", "lasttoken"),  # the body of a model with another head
    ],
)
def test_sentence_encoder(family: str, task: str, mode: str, how: str, setting: str, tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", family, task, layers=1 if family in ("distilbert", "xlm-roberta") else 2)
    sentence_files(base, setting, "Normalize")
    first = r".*layers?\.0\..*(query|q|q_lin|Wqkv)"  # of one layer alone
    options: dict[str, Any] = {"task_type": None if task == "MaskedLM" else "FEATURE_EXTRACTION"}
    adapters = {
        "dora": save_encoder_adapter(base, tmp_path / "dora", 2, use_dora=True, target_modules=first, **options)
    }
    if mode != "merged":
        adapters["lora"] = save_encoder_adapter(base, tmp_path / "lora", 1, **options)
    out = tmp_path / "out"
    report = export_model(base, adapters, out, mode=mode)
    assert report["pooling"] == f"{how}, normalised"
    ids, mask = batch()
    own = json.loads((base / "config.json").read_text())["architectures"][0]
    session = Classifier(out, threads=1)
    held: dict[str | None, Path | None] = {None: adapters["dora"]} if mode == "merged" else {None: None, **adapters}
    expected = {}
    for name, adapter in held.items():
        hidden = answers(live(base, adapter, own).base_model, ids, mask).last_hidden_state
        expected[name] = sentences(hidden, mask, how)
        got = session.run(ids, mask, name)
        assert np.abs(got["last_hidden_state"] - hidden.numpy())[mask == 1].max() < BAR
        assert np.abs(got["sentence_embedding"] - expected[name].numpy()).max() < BAR
    if mode == "batched":
        names = ["dora", None, "lora", "dora"]
        got = session.run(ids, mask, names)["sentence_embedding"]
        mixed = torch.stack([expected[name][row] for row, name in enumerate(names)])
        assert np.abs(got - mixed.numpy()).max() < BAR
        with pytest.raises(InputError, match="takes no more"):
            add_adapters(out, {"more": adapters["lora"]})
    if mode != "merged":
        assert float((expected["lora"] - expected[None]).abs().max()) > 0.02
    assert verify_onnx(base, adapters["dora"], out, name="dora")["passed"]
    # what sentence-transformers, Optimum, transformers.js and text-embeddings-inference look for
    for file in ("onnx/model.onnx", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (out / file).is_file(), file
    plain = ort.InferenceSession(out / "onnx" / "model.onnx")
    assert [value.name for value in plain.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    body = read_export(out).options["class"]
    assert body == own.replace("ForMaskedLM", "Model")
    assert json.loads((out / "config.json").read_text())["architectures"] == [body]


def test_masked_language_model(tmp_path: Path) -> None:
    """With an adapter that was trained on it, and one that was trained on its body and names other module paths."""
    from peft import PeftModel

    base = save_encoder(tmp_path / "base", "roberta", task="MaskedLM", layers=1)
    whole = save_encoder_adapter(base, tmp_path / "whole", 1, task_type=None)
    body = save_encoder_adapter(base, tmp_path / "body", 2, task_type=None, trained_as="RobertaModel")
    export_model(base, {"whole": whole, "body": body}, tmp_path / "out", mode="switchable")
    ids, mask = batch()
    in_body = live(base, None, "RobertaForMaskedLM")
    in_body.roberta = PeftModel.from_pretrained(in_body.roberta, body).eval()
    models = {None: live(base, None, "RobertaForMaskedLM"), "whole": live(base, whole, "RobertaForMaskedLM")}
    session = Classifier(tmp_path / "out", threads=1)
    expected = {}
    for name, model in {**models, "body": in_body}.items():
        expected[name] = answers(model, ids, mask).logits.numpy()
        got = session.run(ids, mask, name)["logits"]
        assert np.abs(got - expected[name])[mask == 1].max() < BAR
    for name, folder in (("whole", whole), ("body", body)):
        assert np.abs(expected[name] - expected[None]).max() > 0.5
        report = verify_onnx(base, folder, tmp_path / "out", name=name)
        assert report["passed"] and report["logits"]["effect"] > 0.5
        other = "body" if name == "whole" else "whole"
        assert not verify_onnx(base, folder, tmp_path / "out", name=other)["passed"]
    with pytest.raises(UnsupportedError, match="belong to no layer of RobertaForMaskedLM"):  # and not the base
        trained_model(open_pair(base, body))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "file", "mode", "least"),
    [("fp16", "model_fp16.onnx", "switchable", 0.9999), ("int8", "model_quantized.onnx", "merged", 0.98)],
)
def test_small_precisions(precision: str, file: str, mode: str, least: float, tmp_path: Path) -> None:
    """A reranker: one label; and the same in 16 and 8 bits."""
    base = save_encoder(tmp_path / "base", "bert", labels=1, layers=1)
    dora = save_encoder_adapter(base, tmp_path / "dora", 1, use_dora=True)
    report = export_model(base, {"de": dora}, tmp_path / "out", mode=mode, precision=precision)
    out = tmp_path / "out"
    assert [path.name for path in (out / "onnx").iterdir()] == [file]
    ids, mask = batch()
    got = Classifier(out, threads=1).run(ids, mask, None if mode == "merged" else "de")["logits"]
    expected = answers(live(base, dora, "BertForSequenceClassification"), ids, mask).logits.numpy()
    assert got.shape == expected.shape == (4, 1)
    difference, effect = (
        report["parity"]["merged" if mode == "merged" else "de"][key] for key in ("max_difference", "effect")
    )
    assert np.abs(got - expected).max() < 0.3 * effect and difference < 0.3 * effect
    kinds = {value.type for value in ort.InferenceSession(out / "onnx" / file).get_outputs()}
    assert kinds == {"tensor(float)"}
    import onnx_ir as ir

    model = ir.load(out / "onnx" / file)
    stored = {value.dtype for value in model.graph.initializers.values() if len(value.shape or ()) == 2}
    assert {"fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}[precision] in stored
    session = ort.InferenceSession(out / "onnx" / file)
    long = {name: np.ones((1, 200), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with pytest.raises(Exception, match=r"Add|broadcast|out of data bounds"):  # the model has 140 positions
        session.run(None, long)
    del long["token_type_ids"]
    with pytest.raises(Exception, match="token_type_ids"):
        session.run(None, long)
    assert "text-ranking" in (out / "README.md").read_text()


@pytest.mark.slow
def test_gpt2_batched(tmp_path: Path, reference: Any) -> None:
    base = save_gpt2(tmp_path / "base", layers=1)
    targets = ["c_attn", "c_fc", "c_proj"]
    lora = save_lora(base, tmp_path / "lora", 1, target_modules=targets, fan_in_fan_out=True)
    dora = save_lora(base, tmp_path / "dora", 2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    export_model(base, {"lora": lora}, tmp_path / "out", mode="batched")
    add_adapters(tmp_path / "out", {"dora": dora})
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    decoder = Decoder(tmp_path / "out", threads=1)
    rows = [None, "dora", "lora"]
    ids = np.asarray([tokens] * 3, np.int64)
    cache = decoder.start(len(tokens), rows)
    steps = [decoder.step(cache, ids[:, :40]), *(decoder.step(cache, ids[:, at : at + 1]) for at in range(40, 60))]
    got = torch.from_numpy(np.concatenate(steps, 1)).double()
    for row, adapter in enumerate((None, dora, lora)):
        assert float((got[row] - reference(base, adapter, tokens)).abs().max()) < BAR
    alone = torch.from_numpy(run_all(decoder, "lora", TOKENS)).double()
    assert float((alone - got[2]).abs().max()) < BAR


def test_what_is_refused(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "deberta-v2", task="Model", layers=1)
    lora = save_encoder_adapter(base, tmp_path / "lora", 1, task_type="FEATURE_EXTRACTION")
    with pytest.raises(UnsupportedError, match="computed once for all sequences"):  # relative positions
        export_model(base, {"a": lora}, tmp_path / "out", mode="batched")
    for options, expected in (
        ({"precision": "int8", "mode": "batched"}, "batched encoder cannot be exported in int8"),
        ({"precision": "int4"}, "cannot be exported in int4"),
        ({"normalize": True}, "--normalize without"),
    ):
        with pytest.raises((UnsupportedError, InputError), match=expected):
            export_model(base, {"a": lora}, tmp_path / "out", **options)  # type: ignore[arg-type]
    sentence_files(base, "mean_sqrt_len_tokens")
    with pytest.raises(UnsupportedError, match="its pooling is not supported"):
        export_model(base, {"a": lora}, tmp_path / "out")
    (base / "modules.json").write_text(json.dumps([{"type": "models.Transformer", "path": ""}, {"type": "x.Dense"}]))
    with pytest.raises(Exception, match="not a list of modules"):
        export_model(base, {"a": lora}, tmp_path / "out")
    headed = save_encoder(tmp_path / "headed", "bert")
    trained = save_encoder_adapter(headed, tmp_path / "trained", 1)
    with pytest.raises(UnsupportedError, match="has a head"):
        export_model(headed, {"a": trained}, tmp_path / "out", pooling="mean")
    with pytest.raises(UnsupportedError, match="cannot switch"):
        export_model(headed, {"a": trained}, tmp_path / "out", mode="batched")
    with pytest.raises(InputError, match="pools nothing"):
        export_model(save_gpt2(tmp_path / "gpt2"), {}, tmp_path / "out", pooling="mean")
    assert not (tmp_path / "out").exists()
