"""The package as users get it: a built wheel, one-way imports, a command line that starts fast."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("merge", "export", "serve")


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def tracked() -> list[str]:
    """The files of the repository that are here."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a fresh clone and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    done = run("-m", "build", "--outdir", str(folder / "dist"), str(folder / "source"))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


@pytest.mark.slow
def test_a_built_wheel_holds_everything(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    wanted = {
        f"adapter_merge/{name.removeprefix('merge/')}"
        for name in tracked()
        if name.split("/")[0] in FOLDERS and (name.endswith((".py", "py.typed", ".html")) or "/adapters/" in name)
    }
    assert wanted and wanted <= names, sorted(wanted - names)[:5]
    assert not [name for name in names if name.startswith(("tests", "merge/", "export/", "serve/"))]
    assert "adapter-merge = adapter_merge.cli.main:main" in entry_points
    assert "adapter_merge = adapter_merge.serve.plugin:register" in entry_points


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {name for name in tracked() if name.split("/")[0] in FOLDERS}
    assert {"LICENSE", "README.md", "pyproject.toml"} | sources <= names, sorted(sources - names)[:5]


@pytest.mark.slow
def test_the_wheel_runs_where_nothing_else_of_the_repository_is(built: Path, tmp_path: Path) -> None:
    """A fresh environment with the wheel; its dependencies are those of this one (tests/run installs them as well)."""
    (wheel,) = built.glob("*.whl")
    assert run("-m", "venv", "--without-pip", str(tmp_path / "venv")).returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    done = run("-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages") or (Path(path) / "torch").is_dir()]
    (packages / "others.pth").write_text("\n".join(others))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    code = (
        "import adapter_merge, adapter_merge.cli.main as main\n"
        "from importlib.metadata import entry_points\n"
        "entry_points(group='vllm.general_plugins')['adapter_merge'].load()\n"
        "import adapter_merge.export.cli.export, adapter_merge.export.cli.generate, adapter_merge.serve.cli.serve\n"
        "print(adapter_merge.__file__, adapter_merge.__version__)\n"
    )
    loaded = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    place, version = loaded.stdout.split()
    assert Path(place).is_relative_to(packages)
    command = tmp_path / "venv" / "bin" / "adapter-merge"
    shown = subprocess.run([command, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert version in shown.stdout
    adapter = packages / "adapter_merge" / "demo" / "adapters" / "dcft-pirate"
    seen = subprocess.run([command, "inspect", adapter], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert seen.returncode == 0 and seen.stdout.startswith("DCFT adapter"), seen.stderr


def test_the_version_is_stated_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in tracked():
        if name.split("/")[0] in FOLDERS and name.endswith(".py"):
            assert "__version__ =" not in (ROOT / name).read_text(), name
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()
    assert all("=" not in line.partition("[")[0] for line in project["optional-dependencies"]["demo"])
    released = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert released[0] == "## [Unreleased]"


def test_imports_point_one_way() -> None:
    """The contract in pyproject.toml: rooms in one order, wings above them, no cycles between rooms."""
    done = run("-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache", cwd=ROOT)
    assert done.returncode == 0 and "4 kept, 0 broken" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == "merge" else parts
            name = ".".join(("adapter_merge", *(part for part in parts if part != "__init__")))
            found[name] = file
    return found


def imported(name: str, file: Path, known: set[str]) -> set[str]:
    """The modules of this project that `file` imports when it is loaded or by a function."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{file}: {'.' * node.level}{node.module}: name the package instead"
            start = f"{package}." if node.level else ""
            module = f"{start}{node.module or ''}".rstrip(".")
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names}
    return found & known


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = modules()
    graph = {name: imported(name, file, set(files)) - {name} for name, file in files.items()}
    circles = sorted(sorted(group) for group in strongly_connected(graph) if len(group) > 1)
    assert circles == [], circles


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for following in graph[stack.pop()] - seen:
                seen.add(following)
                stack.append(following)
        reach[start] = seen
    groups: list[set[str]] = []
    for name in graph:
        group = {name} | {other for other in reach[name] if name in reach[other]}
        if group not in groups:
            groups.append(group)
    return groups


def test_only_lazy_imports_name_the_wings() -> None:
    for file in sorted((ROOT / "merge").rglob("*.py")):
        mentions = "adapter_merge.export" in file.read_text() or "adapter_merge.serve" in file.read_text()
        assert not mentions or file.relative_to(ROOT / "merge").as_posix() in (
            "api/verify.py",
            "cli/main.py",
        ), file


HEAVY = ("torch", "transformers", "peft", "onnx", "onnxruntime", "vllm", "rich", "numpy")


def loaded_after(arguments: list[str]) -> set[str]:
    code = (
        "import sys, json\n"
        f"sys.argv = ['adapter-merge', *{arguments!r}]\n"
        "from adapter_merge.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([code, sorted(m for m in sys.modules if '.' not in m)]), file=sys.stderr)\n"
    )
    done = run("-W", "ignore", "-c", code)
    code_number, modules = json.loads(done.stderr.strip().splitlines()[-1])
    assert code_number == 0, done.stderr
    return set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["merge", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_after(arguments) & set(HEAVY)


def test_inspect_reads_headers_without_torch() -> None:
    for name in ("dcft-pirate", "dude-json"):
        modules = loaded_after(["inspect", str(ROOT / "merge" / "demo" / "adapters" / name)])
        assert not modules & {"torch", "transformers", "peft", "numpy"}


@pytest.mark.slow
def test_commands_that_write_need_neither_transformers_nor_peft(tmp_path: Path) -> None:
    import pico

    base = pico.save_base(pico.pico_model("llama"), tmp_path / "base")
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter")
    for command in ("merge", "delta", "factor"):
        modules = loaded_after([command, str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / command)])
        assert "torch" in modules and not modules & {"transformers", "peft", "onnx", "vllm"}


def adapter_merge(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    return run("-c", "from adapter_merge.cli.main import main; main()", *args, env=environment)


def test_exit_codes_and_errors(tmp_path: Path) -> None:
    usage = adapter_merge("merg")
    assert usage.returncode == 2 and "Did you mean merge?" in usage.stderr
    assert adapter_merge("merge").returncode == 2
    failed = adapter_merge("merge", str(tmp_path / "none"), str(tmp_path / "none2"), "-o", str(tmp_path / "out"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ") and "expected:" in failed.stderr and "Traceback" not in failed.stderr
    assert failed.stdout == ""


@pytest.mark.slow
def test_json_is_one_object_and_the_way_works_by_hand(tmp_path: Path) -> None:
    import pico

    base = pico.save_base(pico.pico_model("qwen2"), tmp_path / "base")
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("qwen2"), tmp_path / "checkpoint")
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    seen = json.loads(adapter_merge("inspect", str(checkpoint), "--json").stdout)
    assert (seen["method"], seen["modules"], seen["problems"]) == ("DCFT", 14, [])
    assert (
        json.loads(adapter_merge("convert", str(checkpoint), "-o", adapter, "--json").stdout)["artefact"] == "adapter"
    )
    dry = json.loads(adapter_merge("merge", str(base), adapter, "-o", merged, "--dry-run", "--json").stdout)
    assert dry["dry_run"] and not Path(merged).exists()
    made = json.loads(adapter_merge("merge", str(base), adapter, "-o", merged, "--json").stdout)
    assert len(made["layers"]) == 14 and (Path(merged) / "README.md").read_text().startswith("---\n")
    proved = adapter_merge("verify", str(base), adapter, merged, "--tokens", "8")
    assert proved.returncode == 0 and proved.stdout.endswith("PASS\n"), proved.stdout + proved.stderr
    alone = adapter_merge("verify", str(checkpoint), merged, "--tokens", "8", "--json")
    assert json.loads(alone.stdout)["passed"]
    doctor = adapter_merge("doctor", "--json")
    assert json.loads(doctor.stdout)["versions"]["torch"]


@pytest.mark.model
def test_the_demo_runs_and_passes(tmp_path: Path) -> None:
    done = adapter_merge("demo", "-o", str(tmp_path / "demo"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name, entry in report["adapters"].items():
        assert entry["answers"] != report["answers"], f"{name} changes nothing"
        assert entry["merged_answers"] == entry["answers"]
        for artefact in ("merged", "factors"):
            assert entry[artefact]["greedy_equal"] == entry[artefact]["greedy_total"] > 0
    pirate, answer = report["adapters"]["dcft-pirate"]["answers"], report["adapters"]["dude-json"]["answers"]
    assert any("matey" in text.lower() or "arr" in text.lower() for text in pirate)
    assert all(text.startswith("{") for text in answer)
