"""The report: its JSON against oracles, its page against what a browser needs, its pictures, the terminal's strips."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from factor_models import base_weights, dcft_adapter, merged_weights, peft_adapter, pico_model
from matplotlib import rc_context
from matplotlib.figure import Figure
from pico_bases import quiet
from quantised_bases import quantised
from safetensors.torch import save_file

from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.cli.main import group
from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.reporting import pictures
from adapter_merge.reporting.heatmap import BLOCKS, heat_table, level, strips
from adapter_merge.reporting.module_grid import cell_of, grid_of
from adapter_merge.reporting.report import energy_curve, gather, histogram
from adapter_merge.reporting.report_page import page, write_page, write_pictures
from adapter_merge.storage.checkpoint import read_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def dude(base: Path) -> Path:
    return peft_adapter(base, base.parent / "dude", use_dora=True, init_lora_weights="pissa")


@pytest.fixture(scope="module")
def factors(base: Path, dude: Path) -> Path:
    factor(base, dude, base.parent / "factors", FactorOptions(rank=3, end_to_end=True))
    return base.parent / "factors"


def verification(folder: Path, **changes: Any) -> Path:
    """A file with what verify prints of the merged model in folder/merged."""
    figures = {"max_difference": 3e-6, "mean_difference": 1e-7, "greedy_equal": 9, "greedy_total": 9, "effect": 2.0}
    file = folder / "verified.json"
    file.write_text(
        json.dumps(
            {
                "artefact": "merged model",
                "path": str(folder / "merged"),
                "logits": figures,
                "tolerance": 1e-4,
                "passed": True,
            }
            | changes
        )
    )
    return file


def test_the_content_is_right(base: Path, dude: Path, factors: Path) -> None:
    before, after = base_weights(base), merged_weights(base, dude)
    for content in (gather(dude, base), gather(factors)):
        assert len(content["modules"]) == 8
        assert content["row_scale"] is None if content["artefact"] == "factors" else content["row_scale"]
    adapter = gather(dude, base)
    for entry in adapter["modules"]:
        delta = after[entry["name"]] - before[entry["name"]]
        ratio = float(torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(before[entry["name"]]))
        assert entry["relative_delta"] == pytest.approx(ratio, rel=1e-4)
    found = gather(factors)
    assert found["title"] == "factors" and found["exact"] is False
    assert found["sizes"].keys() == {"base", "adapter dude", "factors"}
    errors = {entry["name"]: entry["relative_error"] for entry in found["modules"]}
    assert found["worst"] == sorted(errors, key=lambda name: -errors[name])[:5]
    assert found["energy_curve"]["chosen"] == [3, 3]
    assert [line["label"] for line in found["parity"]] == ["factors, end to end"]
    json.dumps(found, allow_nan=False)


def test_an_exact_form_shows_its_row_scales(base: Path, dude: Path, tmp_path: Path) -> None:
    factor(base, dude, tmp_path / "exact")
    found = gather(tmp_path / "exact")
    assert sum(found["row_scale"]["counts"]) == found["row_scale"]["rows"] == 2 * (48 + 24 + 96 + 48)
    assert found["row_scale"] == gather(dude, base)["row_scale"] or found["row_scale"]["deviation"] == pytest.approx(
        gather(dude, base)["row_scale"]["deviation"], rel=1e-3
    )


def test_a_plain_adapter_needs_no_base(base: Path, tmp_path: Path) -> None:
    adapter = dcft_adapter(base, tmp_path / "dcft")
    alone, beside = gather(adapter), gather(adapter, base)
    assert {entry["relative_delta"] for entry in alone["modules"]} == {None}
    for one, two in zip(alone["modules"], beside["modules"], strict=True):
        assert one["delta_norm"] == pytest.approx(two["delta_norm"], rel=1e-5)
        assert two["relative_delta"] > 0
    assert set(pictures.available(alone)) == {"change", "energy"}


def test_a_merged_model_has_a_report(base: Path, dude: Path, tmp_path: Path) -> None:
    merge(base, dude, tmp_path / "merged")
    found = gather(tmp_path / "merged", parity=[verification(tmp_path)])
    assert {"change", "parity", "size"} <= set(pictures.available(found))
    assert found["parity"][0]["max_dlogit"] == 3e-6 and found["parity"][0]["passed"] is True
    assert all(entry["relative_delta"] > 0 for entry in found["modules"])
    assert "merged model" in page(found)


def test_what_is_no_verification_is_refused(dude: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    for text in ("{}", "[1]", '{"artefact": "factors", "passed": "yes"}'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"not a (verification|JSON object)"):
            gather(dude, parity=[file])


def test_the_verdict_is_what_verify_says(base: Path, dude: Path, factors: Path, tmp_path: Path) -> None:
    """Real verifications, right and wrong, of the merged model, of another folder, and of the truncated factors."""
    merge(base, dude, tmp_path / "merged")
    unknown = gather(tmp_path / "merged")["verdict"]
    assert (unknown["level"], unknown["title"]) == ("none", "Not verified")
    right, wrong = tmp_path / "right.json", tmp_path / "wrong.json"
    right.write_text(json.dumps(verify(base, dude, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()))
    wrong.write_text(
        json.dumps(verify(base, dude, factors, VerifyOptions(prompts=["w1 w2"], generated=2, tolerance=1e-4)).as_json())
    )
    found = gather(tmp_path / "merged", parity=[right])
    assert (found["verdict"]["level"], found["verdict"]["title"]) == ("good", "Computes what was trained")
    assert found["parity"][0]["weight_error"] < 1e-5 and found["parity"][0]["weights"] == 8
    assert gather(tmp_path / "merged", parity=[wrong])["verdict"] == unknown  # says nothing of this folder
    failed = gather(factors, parity=[wrong])
    assert failed["verdict"]["level"] == "bad" and failed["parity"][1]["passed"] is False
    lost = gather(factors)["verdict"]
    assert lost["level"] == "loss" and "Keeps" in lost["title"] and "Truncated" in lost["detail"]
    both = gather(dude, base, parity=[right, wrong])  # an adapter's report counts all of its artefacts
    assert both["verdict"]["level"] == "bad" and [line["about"] for line in both["parity"]] == [True, True]
    text = page(both)
    assert both["verdict"]["title"] == "1 of 2 comparisons differ from the adapter as trained"
    assert [line["label"] for line in both["parity"]] == ["merged model merged", "factors factors"]
    assert text.index("1 of 2 comparisons differ") < text.index("Where the adapter acts") < text.index("<table")


def test_forced_contradictions_come_first(base: Path, dude: Path, tmp_path: Path) -> None:
    merge(base, dude, tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "adapter_merge.json").read_text())
    manifest["adapters"][0]["contradictions"] = ["the magnitudes are another base's"]
    (tmp_path / "merged" / "adapter_merge.json").write_text(json.dumps(manifest))
    found = gather(tmp_path / "merged", parity=[verification(tmp_path)])["verdict"]
    assert (found["level"], found["detail"]) == ("bad", "the magnitudes are another base's")


def test_numbers_agree_with_inspect(base: Path, dude: Path, tmp_path: Path) -> None:
    for adapter in (dude, dcft_adapter(base, tmp_path / "dcft")):
        seen, found = inspect(adapter, base).as_json(), gather(adapter, base)
        assert found["adapters"][0]["parameters"] == seen["parameters"]
        assert len(found["modules"]) == seen["modules"]
        assert found["sizes"]["adapter"] == seen["bytes"]
        assert {entry["rank"] for entry in found["modules"]} == {
            rank for kind in seen["targets"].values() for rank in kind["ranks"]
        }
        merge(base, adapter, tmp_path / f"merged-{adapter.name}")
        assert gather(tmp_path / f"merged-{adapter.name}")["sizes"][f"adapter {adapter.name}"] == seen["bytes"]
        assert f"{seen['parameters']:,}" in page(found)


def test_what_quantising_again_keeps_is_shown(tmp_path: Path) -> None:
    with quiet():
        quantised("nf4", tmp_path / "base", 256)
    torch.manual_seed(0)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    save_adapter(tmp_path / "lora", {
        f"{name}.lora_A.weight": 0.1 * torch.randn(2, 256), f"{name}.lora_B.weight": 0.1 * torch.randn(512, 2)
    })  # fmt: skip
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged", MergeOptions(write_as="same"))
    found = gather(tmp_path / "merged")
    kept = json.loads((tmp_path / "merged" / "adapter_merge.json").read_text())["certificate"]["retention"]
    assert found["verdict"]["level"] == "loss" and f"{100 * kept:.1f} %" in found["verdict"]["title"]
    assert "retention" in pictures.available(found) and "change kept" in page(found)
    files = (tmp_path / "base").glob("*.safetensors")
    assert found["sizes"]["base"] == sum(ref.nbytes for file in files for ref in read_weights(file).tensors)


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_exports_own_check_is_its_verdict(base: Path, dude: Path, tmp_path: Path) -> None:
    """The manifest of an export as export writes it: figures by adapter, all within their tolerance."""
    merge(base, dude, tmp_path / "merged")
    figures = {"max_difference": 2e-6, "mean_difference": 1e-7, "greedy_equal": 9, "greedy_total": 9, "effect": 2.0}
    manifest = json.loads((tmp_path / "merged" / "adapter_merge.json").read_text())
    manifest |= {
        "artefact": "ONNX model",
        "layers": {},
        "adapters": {"dude": {"source": str(dude)}},
        "parity": {"dude": figures | {"tolerance": 1e-3}},
    }
    (tmp_path / "merged" / "adapter_merge.json").write_text(json.dumps(manifest))
    found = gather(tmp_path / "merged")
    assert found["verdict"]["level"] == "good" and "2e-06" in found["verdict"]["detail"]
    assert "parity" in pictures.available(found) and "ONNX export of the adapter dude" in page(found)


def test_bars_start_at_zero_on_a_linear_axis(factors: Path) -> None:
    content = gather(factors)
    with rc_context():
        for name in ("size", "parity", "error"):
            figure = Figure()
            pictures.PICTURES[name].draw(figure, content, pictures.PAPER)
            axes = figure.axes[0]
            bars = [patch for patch in axes.patches if patch.get_width()]
            assert bool(bars) is (name == "size")
            if bars:
                assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
                assert [bar.get_width() * 1e6 for bar in bars] == pytest.approx(list(content["sizes"].values()))


def test_the_energy_curve_and_the_histogram() -> None:
    curve = energy_curve([(0.8, 0.6), (1.0,), ()], [2, None, 1])
    assert curve is not None
    assert curve["rank"] == [1, 2] and curve["weights"] == 2 and curve["chosen"] == [1, 2]
    assert curve["median"] == pytest.approx([0.82, 1.0])
    assert energy_curve([()], []) is None
    torch.manual_seed(0)
    values = 1 + 0.01 * torch.randn(10_000)
    found = histogram([values[:3000], torch.cat((values[3000:], torch.tensor([9.0, -9.0])))])
    assert found is not None
    assert sum(found["counts"]) == found["rows"] == 10_002
    assert found["edges"][0] > 0.9 and found["edges"][-1] < 1.1  # two outliers do not set the axis
    assert (found["least"], found["largest"]) == (-9, 9)
    assert histogram([torch.ones(5)]) is not None
    assert histogram([]) is None


class Page(HTMLParser):
    """Collects what a page would load, and whether its tags close."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)
            if key == "id" and value:
                self.ids.append(value)
        if tag in ("script", "link", "img", "iframe", "image"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def test_the_page_stands_alone(factors: Path, tmp_path: Path) -> None:
    content = gather(factors, parity=[verification(tmp_path)])
    text = page(json.loads(json.dumps(content)))  # from what --json prints, and nothing else
    assert len(text.encode()) < 1_000_000
    parser = Page()
    parser.feed(text)
    assert parser.loads == [] and parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert text.count("<svg ") == len(pictures.available(content)) == 5
    assert text.index('class="verdict') < text.index("<svg ")
    assert "prefers-color-scheme: dark" in text
    for picture in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture)
        assert not re.search(r"(fill|stroke): ?#(000000|0[1-6]0[2-7]0[3-8])", picture)  # no ink of its own
        for reference in re.findall(r'(?:href="|url\()#([^")]+)', picture):
            assert f'id="{reference}"' in picture
    assert page(content) == text  # the same content, the same page
    for name in content["worst"]:
        assert name in text


def test_names_cannot_break_out_of_the_page(factors: Path) -> None:
    content = gather(factors)
    content["title"] = "<script>alert(1)</script>"
    content["modules"][0]["name"] = "<b>0.x</b>"
    content["base"] = {"name": "a<i>b"}
    content["sizes"] = {"<img src=x>": 5, "b": 7}
    text = page(content)
    assert "<script" not in text and "<b>0" not in text and "<i>" not in text and "<img" not in text


def test_the_page_replaces_nothing_halfway(factors: Path, tmp_path: Path) -> None:
    content = gather(factors)
    write_page(content, tmp_path / "deep" / "report.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterMergeError):
        write_page(content, tmp_path / "file" / "report.html")


def test_pictures_are_drawn_for_a_card(factors: Path, tmp_path: Path) -> None:
    files = write_pictures(gather(factors), tmp_path / "png")
    assert [file.stem for file in files] == ["change", "error", "energy", "parity", "size"]
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG") and 3_000 < len(data) < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("layers, kinds", [(1, 1), (126, 16), (3, 2)])
def test_pictures_of_small_and_large_models_fit(layers: int, kinds: int, factors: Path) -> None:
    content = gather(factors)
    content["modules"] = [
        {"name": f"model.layers.{layer}.kind{kind}", "relative_delta": 0.01 * (1 + layer), "relative_error": 0.02}
        for layer in range(layers)
        for kind in range(kinds)
    ] + [{"name": "lm_head", "relative_delta": 0.0, "relative_error": 0.3}]
    text = page(content)
    assert len(text.encode()) < 1_000_000
    assert "model.layers.0.kind0" in text


def test_modules_find_their_place() -> None:
    assert (cell_of("model.layers.3.self_attn.q_proj.weight").layer, cell_of("h.0.attn.c_attn").kind) == (
        3,
        "attn.c_attn",
    )
    assert cell_of("lm_head").layer is None
    assert cell_of("0.dense").layer == 0
    grid = grid_of(
        ["m.0.attention.output.dense", "m.0.output.dense", "m.1.output.dense", "m.1.intermediate.dense", "head"]
    )
    assert grid.layers == (0, 1, None)
    assert [grid.short(kind) for kind in grid.kinds] == [
        "attention.output.dense", "output.dense", "intermediate.dense", "head"
    ]  # fmt: skip


def test_strips_of_blocks() -> None:
    values = {f"m.{layer}.a": 0.01 * 2**layer for layer in range(8)} | {"m.2.b": 0.0, "head": 0.01}
    lines = {name: (text, low, high) for name, text, low, high in strips(values)}
    assert lines["a"] == (BLOCKS, pytest.approx(0.01), pytest.approx(1.28))
    assert lines["b"][0] == "··▁·····"
    assert lines["head"][0] == BLOCKS[0]
    assert level(1.0, 1.0, 1.0) == 4
    assert level(float("nan"), 1, 2) == 0
    assert heat_table(values).row_count == 3


def test_the_command(base: Path, dude: Path, factors: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    page_file, folder = tmp_path / "r.html", tmp_path / "png"
    result = runner.invoke(group, ["report", str(factors), "-o", str(page_file), "--pictures", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert page_file.read_text() == page(content)
    assert len(list(folder.iterdir())) == 5
    again = runner.invoke(group, ["report", str(factors), "-o", str(page_file)])
    assert isinstance(again.exception, AdapterMergeError)
    table = runner.invoke(group, ["report", str(dude), "--base", str(base)])
    assert table.exit_code == 0 and "down_proj" in table.stdout and any(block in table.stdout for block in BLOCKS)


def test_inspect_draws_the_heat_map(base: Path, dude: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(group, ["inspect", str(dude), "--base", str(base), "--heat-map"])
    assert shown.exit_code == 0, shown.output
    assert "|dW| / |W|" in shown.stdout and any(block in shown.stdout for block in BLOCKS)
    told = runner.invoke(group, ["inspect", str(dude), "--base", str(base), "--heat-map", "--json"])
    found = {entry["name"]: entry["relative_delta"] for entry in gather(dude, base)["modules"]}
    assert json.loads(told.stdout)["change"] == pytest.approx(found, rel=1e-4)
    plain = dcft_adapter(base, tmp_path / "dcft")
    assert "|dW|" in runner.invoke(group, ["inspect", str(plain), "--heat-map"]).stdout


def test_the_factor_command_takes_everything(base: Path, dude: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\n")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 " * 40)
    out = tmp_path / "out"
    arguments = ["factor", str(base), str(dude), "-o", str(out), "--budget", "0.05", "--scale", "exact"]
    arguments += ["--calibrate", str(tmp_path / "text.txt"), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--max-error", "2"]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert "lora+row_scale" in result.stdout and "end to end" in result.stdout
    content = json.loads((out / "adapter_merge.json").read_text())
    assert content["options"]["budget"] == 0.05 and content["options"]["scale"] == "exact"
    assert content["certificate"]["end_to_end"]["texts"] == 1
