"""The language of the command line: names and old names of options, usage errors, sections of help, positional OUT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_runs import make_models, run

from adapter_merge.cli.main import COMMANDS, group
from adapter_merge.cli.options.command import SECTIONS as OPTION_SECTIONS
from adapter_merge.cli.options.command import Command, Option


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("work"), "lora", "dcft checkpoint")


def all_commands() -> list[click.Command]:
    context = click.Context(group)
    found = []
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        found += list(command.commands.values()) if isinstance(command, click.Group) else [command]
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "base", "lora", "-o", "x", "--device", "gpu"],
        ["factor", "base", "lora", "-o", "x", "--rank", "abc"],
        ["extract", "base", "base", "-o", "x", "--rank", "0"],
        ["merge", "base", "lora", "-o", "x", "--min-retention", "7"],
        ["merge", "base", "a=lora", "-o", "x", "--weight", "b=2"],
        ["merge", "base", "lora"],
        ["merge", "-o", "x"],
        ["export", "base", "lora", "-o", "x", "--device", "gpu"],
        ["export", "base", "lora"],
        ["verify", "base", "lora", "x", "--tokens", "none"],
        ["restore", "x", "-o", "y", "z"],
        ["merg"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2_before_torch_is_loaded(arguments: list[str], work: Path) -> None:
    code = "import sys; from adapter_merge.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=work)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "False"
    assert done.stderr.startswith("error: ") and "hint: adapter-merge" in done.stderr and "Usage:" not in done.stderr
    assert not (work / "x").exists()


def test_old_names_still_work_and_are_not_shown(work: Path) -> None:
    old = {"--precision": "export", "--tokens": "verify", "--prompts": "factor"}
    for flag, name in old.items():
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert any(flag in parameter.opts for parameter in command.params)
        assert flag not in run(name, "--help").out
    done = run("export", work / "base", work / "lora", "-o", work / "x", "--precision", "fp64")
    assert done.code == 2 and "'--dtype'" in done.err and "--precision" not in done.err
    done = run("factor", work / "base", work / "lora", "-o", work / "x", "--prompts", work / "none.txt", "--dry-run")
    assert done.code == 1 and "none.txt" in done.err


def test_one_name_for_one_thing() -> None:
    """No two commands call the same thing by different names: --prompt, --max-tokens, --dtype, --device."""
    flags = {flag for command in all_commands() for record in [shown_flags(command)] for flag in record}
    assert not flags & {"--prompts", "--tokens", "--precision"}
    assert all("_" not in flag for flag in flags)
    for command in all_commands():
        assert isinstance(command, Command), command.name
        assert all(isinstance(parameter, Option | click.Argument) for parameter in command.params), command.name
        assert {"--json", "-q", "-v", "--log-level", "--color"} <= shown_flags(command), command.name


def shown_flags(command: click.Command) -> set[str]:
    return {
        flag
        for parameter in command.params
        if isinstance(parameter, Option) and not parameter.hidden
        for flag in parameter.opts
        if flag not in parameter.old
    }


def test_help_has_sections_and_examples_that_parse() -> None:
    for command in all_commands():
        sections = {parameter.section for parameter in command.params if isinstance(parameter, Option)}
        assert sections <= set(OPTION_SECTIONS)
    text = run("merge", "--help").out
    titles = [line.rstrip(":") for line in text.splitlines() if line and not line.startswith(" ") and line[-1] == ":"]
    assert titles[0] == "Options" and titles[-1] == "Examples" and len(titles) >= 5
    top = run("--help").out
    assert [title for title in ("Make:", "Inspect and verify:", "Deploy:", "Get started:") if title in top] != []
    for name in COMMANDS:
        assert name in top


def test_help_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys; sys.argv = ['adapter-merge', *sys.argv[1:]]\n"
        "from adapter_merge.cli.main import main\n"
        "try: main()\nfinally: print([n for n in ('torch', 'rich', 'numpy') if n in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["merge", "--help"], ["export", "--help"], ["serve", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_the_last_argument_may_be_the_output(work: Path, tmp_path: Path) -> None:
    assert run("merge", work / "base", work / "lora", tmp_path / "merged").code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run("convert", work / "lora", tmp_path / "safe").code == 0
    assert run("restore", tmp_path / "merged", "--base", work / "base", tmp_path / "again").code == 0
    assert run("delta", work / "base", f"a={work / 'lora'}", tmp_path / "delta").code == 0
    done = run("merge", work / "base", work / "lora", tmp_path / "safe", "--overwrite")
    assert done.code == 2 and "'--output'" in done.err  # an adapter that is there is never taken for the output
    assert not (tmp_path / "safe" / "model.safetensors").exists()
    done = run("restore", tmp_path / "merged", tmp_path / "one", "-o", tmp_path / "two")
    assert done.code == 2 and "twice" in done.err


def test_dry_run_of_restore_and_of_an_output_that_cannot_be(work: Path, tmp_path: Path) -> None:
    assert run("merge", work / "base", work / "lora", "-o", tmp_path / "merged").code == 0
    done = run("restore", tmp_path / "merged", "--base", work / "base", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0 and "would write" in done.out and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    for command in ("merge", "delta", "factor"):
        done = run(command, work / "base", work / "lora", "-o", tmp_path / "file" / "out", "--dry-run")
        assert done.code == 1 and "not a folder" in done.err, done.err
    done = run("restore", tmp_path / "merged", "--base", work / "base", "-o", tmp_path / "file" / "out", "--dry-run")
    assert done.code == 1 and "not a folder" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "merged"]


def test_a_folder_that_is_not_writable_is_refused_by_a_dry_run(work: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code = (  # root without its capabilities is a user like any other
        "import ctypes, sys\n"
        "header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert ctypes.CDLL(None).capset(header, none) == 0\n"
        "from adapter_merge.outputs.staging import check_output\nfrom pathlib import Path\n"
        "check_output(Path(sys.argv[1]), False)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(closed / "out")], capture_output=True, text=True)
    assert "OutputError" in done.stderr and "writable" in done.stderr, done.stderr


def test_prompts_are_texts_files_or_standard_input(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from adapter_merge.cli.options.values import stated_prompts
    from adapter_merge.errors import InputError

    (tmp_path / "two.txt").write_text("one\n\ntwo\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("three"))
    assert stated_prompts(("zero", f"@{tmp_path / 'two.txt'}", "-")) == ["zero", "one", "two", "three"]
    assert stated_prompts(()) is None
    with pytest.raises(InputError, match=r"none\.txt"):
        stated_prompts((f"@{tmp_path / 'none.txt'}",))


def test_an_error_in_json_is_the_same_as_on_stderr(work: Path) -> None:
    done = run("merge", work / "base", work / "lora", "-o", work / "x", "--device", "gpu", "--json")
    error = json.loads(done.out)["error"]
    assert (
        error["kind"] == "UsageError" and error["cause"] in done.err and error["hint"] == "adapter-merge merge --help"
    )
