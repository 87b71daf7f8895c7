"""What every format can do, and how exactly, as a table: python benchmarks/format_parity.py [FILTER]

Pico models in float32 on disk, run in float64. Each cell is max |dlogit| against the oracle, whose own effect (base
against adapter) stands beside its name: PEFT's live adapter merged by PEFT in float64 for PEFT folders, the papers' or
projects' formulas in float64 (tests/merge/formats/test_formats_foreign.py) for everything else.

    convert   the safe folder, merged              factor    the factor folder, run by PEFT
    merge     the merged model                     combine   0.7 of it and 0.3 of a LoRA, linear, merged
    delta     base plus delta, added in float64    serve     the folder that vLLM is given, run by PEFT
                                                   export    the factors that ONNX is given, on the base's weights

Tensors that were trained whole are never deltas: they are put in place for that column. A cell with a letter was
refused, with the reason below the table. What vLLM and ONNX Runtime compute is in tests/serve and tests/export.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge" / "formats"))

import peft
import peft_cases as folders  # type: ignore[import-not-found]
import test_formats_foreign as foreign  # type: ignore[import-not-found]
from pico_bases import load, logits, quiet, train  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, FactorOptions, InspectOptions, MergeOptions
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import AdapterMergeError
from adapter_merge.export.graph.adapter_source import factors_of
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter

COLUMNS = ("convert", "merge", "delta", "factor", "combine", "serve", "export")
WEIGHTS = (0.7, 0.3)
State = dict[str, Tensor]

# Rows of tests/merge/peft_cases.py that this table names; one for every method and every kind of target.
PEFT_ROWS = (
    "lora", "rank_pattern, alpha_pattern, rsLoRA", "DoRA", "PiSSA", "OLoRA", "DuDe", "AdaLoRA", "LoKr", "LoHa", "VeRA",
    "VeRA from its seed", "bias all", "lora_bias", "modules_to_save", "embedding", "head", "tokens", "Conv1D",
    "Conv1D DuDe", "a bare 2-D parameter", "experts, apart on disk", "experts, patterns", "experts of gpt-oss",
    "experts of Llama 4",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One adapter, and the float64 state dict of the model that it makes of its base."""

    name: str
    base: Path
    adapter: Path
    want: State
    options: ReadOptions | None = None


def run(base: Path, state: State | None = None) -> Tensor:
    """Logits in float64 of the model in `base`, with `state` in place of its weights."""
    model = eager(load(base, torch.float64))
    if state is not None:
        model.load_state_dict(state, strict=True)
    result: Tensor = logits(model)
    return result


def eager(model: Any) -> Any:
    """The model with experts that run one by one: the grouped product has no float64."""
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def in_peft(base: Path, folder: Path) -> Tensor:
    with quiet():
        live = peft.PeftModel.from_pretrained(eager(load(base)), str(folder)).double().eval()
    result: Tensor = logits(live)
    return result


def peft_row(name: str, place: Path) -> Row:
    kind, method, arguments = folders.CASES[name]
    base = place / "base"
    with quiet():
        folders.BASES[kind](base)
        config = getattr(peft, method)(**arguments)
    live = train(base, config, place / "adapter", scale=0.03 if "OLoRA" in name else 0.1)
    with quiet():
        state = live.double().merge_and_unload().state_dict()
    return Row(f"PEFT: {name}", base, place / "adapter", state)


def foreign_rows(place: Path) -> list[tuple[str, Callable[[Path, Path], tuple[dict[str, Tensor], ReadOptions | None]]]]:
    """(name, what writes the adapter to a path and says what its modules' weights become)."""

    def mytransformers(**arguments: Any) -> Any:
        def make(base: Path, adapter: Path) -> Any:
            options = ReadOptions(magnitude_axis="in") if arguments["generation"] == "dim0" else None
            return foreign.mytransformers(base, adapter, wrapped=False, **arguments), options

        return make

    def kohya(kind: str, dora: str | None) -> Any:
        def make(base: Path, adapter: Path) -> Any:
            saved, expected = foreign.kohya(base, kind, dora, "lora_te_", True)
            adapter.mkdir()
            save_file(saved, adapter / "a.safetensors")
            return expected, None

        return make

    return [
        ("MyTransformers DuDe, trained magnitude, residual saved",
         mytransformers(generation="trained", trainable=False)),
        ("MyTransformers DuDe, trained magnitude, residual left out",
         mytransformers(generation="trained", trainable=True)),
        ("MyTransformers DuDe before 83fcc6a, residual saved", mytransformers(generation="untrained", trainable=False)),
        ("MyTransformers DuDe, norms of columns", mytransformers(generation="dim0", trainable=False)),
        ("MyTransformers PiSSA", mytransformers(generation="untrained", trainable=False, method="pissa")),
        ("MyTransformers DoRA", mytransformers(generation="trained", trainable=True, method="dora")),
        ("kohya LoRA", kohya("lora", None)),
        ("kohya DoRA, (out, 1)", kohya("lora", "out")),
        ("kohya DoRA, (1, in)", kohya("lora", "in")),
        ("LyCORIS LoKr", kohya("lokr", None)),
        ("LyCORIS LoHa", kohya("loha", None)),
        ("LyCORIS LoKr with (out, 1) magnitudes", kohya("lokr", "out")),
        ("DCFT checkpoint, 4 x 4", foreign.dcft_checkpoint),
        ("DCFT checkpoint, 3 channels and a bias", foreign.dcft_channels),
        ("DCFT, reshape form", foreign.dcft_reshape_file),
    ]  # fmt: skip


def foreign_row(name: str, make: Any, place: Path) -> Row:
    base = place / "base"
    with quiet():
        folders.BASES["llama"](base)
    expected, options = make(base, place / "adapter")
    state = load(base, torch.float64).state_dict()
    state |= {f"{module}.weight": value for module, value in expected.items()}
    return Row(name, base, place / "adapter", state, options)


def cells(row: Row, place: Path) -> dict[str, Callable[[], Tensor]]:
    """The logits of every operation's result, and for a combination less what they should be."""
    base, adapter, options = row.base, row.adapter, row.options

    def converted() -> Tensor:
        convert(adapter, place / "safe", ConvertOptions(base=base, reading=options))
        merge(base, place / "safe", place / "from-safe", MergeOptions(device="cpu"))
        return run(place / "from-safe")

    def merged() -> Tensor:
        merge(base, adapter, place / "merged", MergeOptions(device="cpu", reading=options))
        return run(place / "merged")

    def added() -> Tensor:
        content = delta(base, adapter, place / "delta", DeltaOptions(device="cpu", reading=options)).as_json()
        state = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
        for name, value in load_file(place / "delta" / "delta.safetensors").items():
            state[name] = state[name] + value.double()
        (place / "sum").mkdir()
        (place / "sum" / "config.json").write_bytes((base / "config.json").read_bytes())
        for file in base.glob("generation_config.json"):
            (place / "sum" / file.name).write_bytes(file.read_bytes())
        for name in content["not_included"]:  # trained whole: said in the manifest, and never a difference
            state[name] = row.want[name]
        save_file(state, place / "sum" / "model.safetensors", {"format": "pt"})
        return run(place / "sum")

    def factored() -> Tensor:
        factor(base, adapter, place / "factors", FactorOptions(reading=options))
        return in_peft(base, place / "factors")

    def combined() -> Tensor:
        other = train(base, peft.LoraConfig(r=2, target_modules=other_targets(base)), place / "other", seed=5)
        with quiet():
            second = other.double().merge_and_unload().state_dict()
        stated = {k: v for k, v in vars(options).items() if v is not None} if options else None
        ingredients = [Ingredient("a", str(adapter), WEIGHTS[0], options=stated),
                       Ingredient("b", str(place / "other"), WEIGHTS[1])]  # fmt: skip
        merge(base, make_recipe(ingredients, Settings()), place / "combined", MergeOptions(device="cpu"))
        before = load(base, torch.float64).state_dict()
        want = {
            key: value + WEIGHTS[0] * (row.want[key] - value) + WEIGHTS[1] * (second[key] - value)
            for key, value in before.items()
        }
        return run(place / "combined") - run(base, want) + run(base, row.want)

    def served() -> Tensor:
        source = place / "safe" if options is not None else adapter
        found = Converter(base, Cache(place / "cache")).obtain(source)
        return in_peft(base, found.folder)

    def exported() -> Tensor:
        source = place / "safe" if options is not None else adapter
        factors = factors_of(base, source)
        state = load(base, torch.float64).state_dict()
        for name, one in factors.linears.items():
            up, down = torch.tensor(one.up).double(), torch.tensor(one.down).double()
            after = state[f"{name}.weight"]
            turned = after.shape != (up.shape[0], down.shape[1]) or type_of(base) == "gpt2"
            after = (after.T if turned else after) + up @ down
            if one.row_scale is not None:
                after = torch.tensor(one.row_scale).double()[:, None] * after
            state[f"{name}.weight"] = after.T if turned else after
        for name, value in factors.replacements.items():
            state[name] = torch.tensor(value).double()
        return run(base, state)

    results = (converted, merged, added, factored, combined, served, exported)
    return dict(zip(COLUMNS, results, strict=True))


def type_of(base: Path) -> str:
    return str(load(base).config.model_type)


def other_targets(base: Path) -> list[str]:
    return ["c_attn"] if type_of(base) == "gpt2" else ["v_proj"]


def main() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    reasons: dict[str, str] = {}
    worst = 0.0
    print(f"| adapter | effect | inspect | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    with tempfile.TemporaryDirectory() as scratch:
        made: list[tuple[str, Callable[[Path], Row]]] = [
            (f"PEFT: {name}", lambda place, name=name: peft_row(name, place))
            for name in PEFT_ROWS  # type: ignore[misc]
        ]
        made += [
            (name, lambda place, name=name, make=make: foreign_row(name, make, place))  # type: ignore[misc]
            for name, make in foreign_rows(Path(scratch))
        ]
        for number, (name, build) in enumerate(made):
            if wanted not in name:
                continue
            place = Path(scratch) / str(number)
            place.mkdir()
            row = build(place)
            want = run(row.base, row.want)
            report = inspect(row.adapter, row.base, InspectOptions(reading=row.options)).as_json()
            known = "problems!" if report["problems"] else f"{report['method']} ({report['certainty']})"
            line = [row.name, f"{float((run(row.base) - want).abs().max()):.2g}", known]
            for work in cells(row, place).values():
                try:
                    error = float((work() - want).abs().max())
                    worst = max(worst, error)
                    line.append(f"{error:.1e}")
                except AdapterMergeError as refused:
                    problem = refused.problems[0]
                    cause = problem.cause.replace(str(place), "").replace(str(row.adapter), "")
                    text = cause.split(": ", 1)[-1] if ": " in cause else cause
                    line.append(reasons.setdefault(text, chr(ord("a") + len(reasons))))
            print(f"| {' | '.join(line)} |", flush=True)
    print(f"\nworst cell {worst:.1e}\n")
    for text, letter in reasons.items():
        print(f"{letter}  {text}")


if __name__ == "__main__":
    main()
