"""Progress, log lines, colour, configuration, environment variables and completion."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import make_models, run

from adapter_merge.cli.main import COMMANDS
from adapter_merge.cli.printing import progress as module
from adapter_merge.cli.printing.progress import Progress, printing, working


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("work"), "lora")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE", 0.02)
    monkeypatch.setattr(module, "NEXT_LINE", 0.02)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with working("merging") as progress:
        time.sleep(0.1)
        progress.begin("merging", 1000)
        progress.advance(250)
        time.sleep(0.1)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("merging ... 0:0") and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert re.fullmatch(r"merging  25%  0.00 of 0.00 GB  0:0\d left", lines[-1]), lines
    assert len(lines) >= 4


def test_one_line_on_a_terminal_that_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", 0.02)
    monkeypatch.setattr(module, "REDRAW", 0.02)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with working("comparing") as progress:
        progress.begin("comparing", 4, "prompts")
        progress.advance(3)
        time.sleep(0.1)
        with printing():
            stream.write("a line\n")
        time.sleep(0.1)
    text = stream.getvalue()
    assert "comparing  75%  3 of 4 prompts" in text and "left" in text
    assert "\r\x1b[Ka line\n" in text and text.endswith("\r\x1b[K")
    assert text.replace("a line\n", "").count("\n") == 0


def test_nothing_is_shown_with_quiet_or_of_a_short_run(work: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(module, "FIRST_LINE", 0.0)
        with working("merging", quiet=True):
            time.sleep(0.05)
    assert stream.getvalue() == ""


def test_time_left_is_of_the_running_stage() -> None:
    progress = Progress("first", io.StringIO())
    progress.begin("second", 100)
    progress.stage_started -= 30
    progress.advance(75)
    assert progress.text() == "second  75%  0.00 of 0.00 GB  0:10 left"
    progress.advance(75)
    assert "100%" in progress.text() and "0:00 left" in progress.text()


def test_verbose_says_what_is_read_decided_and_written(work: Path, tmp_path: Path) -> None:
    pair = [work / "base", work / "lora"]
    loud = run("merge", *pair, "-o", tmp_path / "one", "-v").err
    assert "info: " in loud and "7 tensors" in loud and "LoRA, 2 modules" in loud and "used as the original" in loud
    assert str(tmp_path / "one") in loud
    assert loud == run("merge", *pair, "-o", tmp_path / "two", "--log-level", "info").err.replace("two", "one")
    assert "info:" not in run("merge", *pair, "-o", tmp_path / "three").err


@pytest.mark.slow
def test_colour_is_a_choice(work: Path) -> None:
    def colours(*arguments: object, **environment: str) -> bool:
        plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        command = [sys.executable, "-m", "adapter_merge", "inspect", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=plain | environment, cwd=work)
        return "\x1b[" in done.stdout + done.stderr

    for what in ("lora", "./nothing-here"):
        assert colours(what, "--color", "always") and colours(what, "--color", "always", NO_COLOR="1")
        assert not colours(what) and not colours(what, "--color", "never", FORCE_COLOR="1")


def test_defaults_come_from_a_file_and_the_command_line_wins(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('json = true\n[delta]\ndtype = "float16"\n[merge]\nkeep-preimage = true\nweight = ["a=0.5"]\n')
    pair = [work / "base", f"a={work / 'lora'}"]

    def options(*arguments: object) -> dict[str, object]:
        done = run(*arguments)
        assert done.code == 0, done.err
        said: dict[str, object] = json.loads(done.out)["options"]
        return said

    assert options("--config", file, "delta", *pair, "-o", tmp_path / "one")["dtype"] == "float16"
    again = ["delta", *pair, "-o", tmp_path / "two", "--dtype", "float32"]
    assert options("--config", file, *again)["dtype"] == "float32"
    made = options("--config", file, "merge", *pair, "-o", tmp_path / "three")
    assert made["keep_preimage"] is True and made["combination"]["weights"] == {"a": 0.5}  # type: ignore[index]
    home = tmp_path / "home"
    (home / "adapter-merge").mkdir(parents=True)
    file.rename(home / "adapter-merge" / "config.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    assert options("delta", *pair, "-o", tmp_path / "four")["dtype"] == "float16"
    monkeypatch.setenv("ADAPTER_MERGE_DELTA_DTYPE", "bfloat16")
    assert options("delta", *pair, "-o", tmp_path / "five")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "text", ["nonsense", "[merg]\ndevice = 'cpu'", "[merge]\nspeed = 3", "rank = 3", "[merge]\ndevice = 'gpu'"]
)
def test_a_wrong_configuration_is_a_usage_error(text: str, work: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    done = run("--config", tmp_path / "config.toml", "merge", work / "base", work / "lora", "-o", tmp_path / "out")
    assert done.code == 2 and not (tmp_path / "out").exists(), done.err


def test_a_configuration_in_the_working_directory_is_not_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.toml", "adapter-merge.toml", ".adapter-merge.toml"):
        (tmp_path / name).write_text("nonsense")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", work / "lora").code == 0


def test_environment_variables_set_options(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_MERGE_MERGE_DEVICE", "gpu")
    done = run("merge", work / "base", work / "lora", "-o", tmp_path / "out")
    assert done.code == 2 and "gpu" in done.err
    assert run("inspect", work / "lora").code == 0


def complete(words: str, folder: Path) -> list[str]:
    environment = {**os.environ, "_ADAPTER_MERGE_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    done = subprocess.run(
        [sys.executable, "-m", "adapter_merge"], capture_output=True, text=True, env=environment, cwd=folder
    )
    return done.stdout.split()


def test_commands_options_choices_and_paths_complete(work: Path) -> None:
    assert set(complete("adapter-merge ", work)) == {f"plain,{name}" for name in COMMANDS}
    assert "plain,--base-kind" in complete("adapter-merge merge --ba", work)
    assert complete("adapter-merge merge --dtype bf", work) == ["plain,bfloat16"]
    for words in ("adapter-merge merge ", "adapter-merge merge base lo", "adapter-merge inspect ./",
                  "adapter-merge serve ba", "adapter-merge verify a b c",
                  "adapter-merge inspect x --base b", "adapter-merge merge a b -o o"):  # fmt: skip
        kinds = {item.split(",")[0] for item in complete(words, work)}
        assert kinds <= {"file", "dir"} and kinds, (words, kinds)  # the shell completes the path itself
    assert complete("adapter-merge export base de=lo", work) == ["plain,de=lora/"]
    assert complete(f"adapter-merge export base de={work}/", work) == [
        f"plain,de={work}/{n}/" for n in ("base", "lora")
    ]
    assert complete("adapter-merge merge --base-kind re", work) == ["plain,residual"]


def test_completion_is_installed_where_the_shell_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for shell, place in (
        ("bash", ".local/share/bash-completion/completions/adapter-merge"),
        ("zsh", ".zfunc/_adapter-merge"),
        ("fish", ".config/fish/completions/adapter-merge.fish"),
    ):
        done = run("completion", shell, "--install")
        assert done.code == 0 and str(tmp_path / place) in done.err
        assert (tmp_path / place).read_text().strip() == run("completion", shell).out.strip()
    script = tmp_path / ".local/share/bash-completion/completions/adapter-merge"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
