"""The public interface: its names, its options and results, and the examples in its docstrings."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pico
import pytest

import adapter_merge as am

JOBS = {
    am.ConvertOptions: am.convert,
    am.DeltaOptions: am.delta,
    am.ExtractOptions: am.extract,
    am.FactorOptions: am.factor,
    am.InspectOptions: am.inspect,
    am.MergeOptions: am.merge,
    am.RestoreOptions: am.restore,
    am.VerifyOptions: am.verify,
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and a LoRA, to work in."""
    pico.save_base(pico.pico_model("llama"), tmp_path / "base")
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_public_name_is_there_and_typed() -> None:
    assert set(am.__all__) - {"__version__"} == set(am._MODULES)
    assert all(getattr(am, name) is not None for name in am.__all__)
    static = next(node for node in ast.parse(inspect.getsource(am)).body if isinstance(node, ast.If))
    typed = {
        (str(node.module).removeprefix("adapter_merge."), alias.name)
        for node in static.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(module, name) for name, module in am._MODULES.items()}
    with pytest.raises(AttributeError, match="nothing"):
        am.nothing  # noqa: B018


def test_the_package_loads_nothing_heavy_and_runs_as_a_module() -> None:
    code = "import sys, adapter_merge; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    run = [sys.executable, "-m", "adapter_merge", "--version"]
    assert am.__version__ in subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("options", JOBS, ids=lambda options: options.__name__)
def test_every_option_has_its_default_and_is_read(options: type) -> None:
    """A job takes its options as one value; its module reads every field of it."""
    job = JOBS[options]
    assert inspect.signature(job).parameters["options"].default == options()
    read = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[job.__module__])))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    assert {item.name for item in fields(options)} <= read


def test_the_examples_run(folders: Path) -> None:
    examples = 0
    jobs = ("merge", "delta", "factor", "convert", "extract", "restore", "verify", "inspect", "load_adapter")
    public = {name: getattr(am, name) for name in am.__all__}
    for name in (*jobs, *sorted(public.keys() - {*jobs, "__version__"})):
        for test in doctest.DocTestFinder(recurse=False).find(public[name], name, globs=dict(public)):
            runner = doctest.DocTestRunner(verbose=False)
            assert runner.run(test).failed == 0, name
            assert test.examples or name.endswith("Error"), f"{name} has no example"
            examples += len(test.examples)
    assert examples >= 30


def test_results_say_what_the_manifest_says(folders: Path) -> None:
    result = am.merge("base", "adapter", "merged")
    assert (result.artefact, result.dry_run, result.part) == ("merged model", False, None)
    assert result.output == Path("merged") and result.files.keys() == result.as_json()["files"].keys()
    (entry,) = result.adapters
    assert entry.method == "LoRA" and entry.modules == len(result.weights) > 0
    assert am.merge("base", "adapter", "other", am.MergeOptions(dry_run=True)).nbytes
    assert not Path("other").exists()
    report = am.verify("base", "adapter", "merged", am.VerifyOptions(generated=4))
    assert report.passed and not report.problems and report.logits is not None
    assert report.logits.greedy_equal == report.logits.greedy_total
    assert report.relative_errors.keys() == result.weights.keys()
    seen = am.inspect("adapter", "base")
    assert seen.fits and seen.method == "LoRA" and seen.modules == len(result.weights)
    assert am.inspect("base").problems and am.inspect("base").method is None
    with pytest.raises(am.InputError):
        am.merge("nowhere", "adapter", "out")
