"""The documents: a site without warnings, links that lead somewhere, examples that run, options that exist."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import click
import pytest
import yaml
from factor_models import dcft_adapter, peft_adapter, pico_model

import adapter_merge as am
from adapter_merge.cli.main import COMMANDS, group

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
TEXTS = [ROOT / "README.md", *(file for file in sorted(DOCS.rglob("*.md")) if file.parent.name != "reference")]
# Options in the texts that belong to other programs.
FOREIGN = {
    "--tensor-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend", "--private_key",
    "--signature", "--save-trainable", "--enable-mixed-moe-lora-format", "--head", "--address", "--quantization",
}  # fmt: skip


def options_of(name: str) -> set[str]:
    """Every option of a command and its sub-commands."""
    command = group.get_command(click.Context(group), name)
    assert command is not None
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {"--help"} | {
        option
        for one in commands
        for parameter in one.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


OPTIONS = {name: options_of(name) for name in COMMANDS}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    paths = [path for path in sys.path if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING" not in built.stderr and "not included in the" not in built.stderr, built.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'class="highlight"' in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)  # nothing from another host


def test_the_generated_reference_is_current() -> None:
    """`python docs/generate.py` writes both pages anew."""
    for file, text in runpy.run_path(str(DOCS / "generate.py"))["pages"]().items():
        assert file.read_text() == text, f"{file}: run python docs/generate.py"


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert "pip install -c constraints.txt '.[demo]' && .venv/bin/adapter-merge demo" in text
    assert "    bash tests/run\n" in text


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_files(name: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing, missing


def test_the_figure_is_an_image() -> None:
    figure = ElementTree.parse(DOCS / "figures" / "adapter-to-server.svg").getroot()
    assert figure.tag.endswith("svg") and figure.get("role") == "img"


def test_citation_and_issue_forms_are_well_formed() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert all(reference["authors"] and reference["title"] for reference in citation["references"])
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml"]
    assert len(forms) == 3
    for file in forms:
        form = yaml.safe_load(file.read_text())
        assert form["name"] and form["description"] and all(field["attributes"]["label"] for field in form["body"])


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """Command and options of every adapter-merge line in the blocks of code."""
    found = []
    for line in re.findall(r"^ {4}.*?adapter-merge +(.+)$", text, flags=re.MULTILINE):
        words = line.split(" # ")[0].split("   ")[0]
        try:
            parts = shlex.split(words.split(" -- ")[0])
        except ValueError:  # an apostrophe in prose
            continue
        if parts and parts[0] in COMMANDS:
            found.append((parts[0], [part.split("=")[0] for part in parts if re.match(r"--?[a-z]", part)]))
    return found


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_and_options_exist(file: Path) -> None:
    text = file.read_text()
    for command, options in commands_in(text):
        unknown = set(options) - OPTIONS[command] - FOREIGN
        assert not unknown, f"{command}: {unknown}"
    for name in re.findall(r"`adapter-merge ([a-z]+)", text):
        assert name in COMMANDS
    every = set().union(*OPTIONS.values()) | FOREIGN
    unknown = {
        option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)
    }
    assert not unknown - every, unknown - every


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands_in(file.read_text())) for file in TEXTS) > 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, adapter and other, as the examples name them."""
    folder = tmp_path_factory.mktemp("examples")
    base = pico_model(folder / "base")
    peft_adapter(base, folder / "adapter", use_dora=True, init_lora_weights="pissa")
    dcft_adapter(base, folder / "other")
    (folder / "recipe.yaml").write_bytes((EXAMPLES / "recipe.yaml").read_bytes())
    return folder


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda file: file.name)
def test_pages_show_the_examples_as_they_are(example: Path) -> None:
    body = re.sub(r'^""".*?"""\n\n', "", example.read_text(), flags=re.DOTALL)
    shown = [file for file in DOCS.rglob("*.md") if f"\n{body}```\n" in file.read_text()]
    assert DOCS / "reference" / "examples.md" in shown


def test_the_manifests_keys_are_explained(models: Path, tmp_path: Path) -> None:
    base, adapter = models / "base", models / "adapter"
    made = [
        am.merge(base, adapter, tmp_path / "merged").as_json(),
        am.delta(base, adapter, tmp_path / "deltas").as_json(),
        am.factor(base, adapter, tmp_path / "factors", am.FactorOptions(rank=2)).as_json(),
        am.convert(adapter, tmp_path / "safe", am.ConvertOptions(base=base)).as_json(),
        am.extract(base, tmp_path / "merged", tmp_path / "extracted").as_json(),
    ]
    explained = set(re.findall(r"`(\w+)`", (DOCS / "reference" / "manifest.md").read_text()))
    for content in made:
        layer = next(iter(content.get("layers", {}).values()), {})
        keys = {*content, *(key for key, value in layer.items() if value is not None), *content.get("certificate", {})}
        assert keys <= explained, (content["artefact"], keys - explained)


PRINTED = {
    "combine.py": "",
    "errors.py": "not-there: no such folder",
    "factor.py": "at most 0.5",
    "inspect_adapter.py": "DuDe 8 weights",
    "merge_and_verify.py": "merged 8 weights changed",
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_run(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out
    if name == "combine.py":
        assert am.inspect("adapter", "combined").problems  # a combination is no base for its own ingredients
