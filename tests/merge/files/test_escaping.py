"""Names and settings of other people's files in cards, code, YAML and on the terminal."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from merge_models import base_tensors, write_base, write_lora
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions
from adapter_merge.cli.main import group
from adapter_merge.errors import AdapterMergeError, OutputError
from adapter_merge.files.escaping import code_fence, plain_text, terminal_text

CONTROLS = ["a\nb", "a\x1b[31mb", "a\x07", "a\rb", "a\u2028b", "a\u202eb", "a\x9bb", "a\x7f"]
MARKUP = "a\"b' `c` ```d $(id) <script>x</script> [l](javascript:y) | e {{f}} é 漢"
JOBS = {
    "merge": lambda base, adapter, out: merge(base, adapter, out),
    "factor": lambda base, adapter, out: factor(base, adapter, out, FactorOptions(device="cpu")),
    "convert": lambda base, adapter, out: convert(adapter, out),
}


def pair(
    folder: Path, base_name: str = "base", adapter_name: str = "adapter", stated: str = "base"
) -> tuple[Path, Path]:
    tensors = base_tensors(layers=1)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "_name_or_path": stated}
    base = write_base(folder / base_name, tensors, 1, config)
    return base, write_lora(folder / adapter_name, tensors, config={"base_model_name_or_path": stated})


@pytest.mark.parametrize("text", CONTROLS)
@pytest.mark.parametrize("where", ["out", "adapter", "base", "_name_or_path", "base_model_name_or_path", "tensor"])
def test_names_that_would_steer_a_terminal_are_refused(where: str, text: str, tmp_path: Path) -> None:
    named = {"base": {"base_name": text}, "adapter": {"adapter_name": text}}.get(where, {})
    base, adapter = pair(tmp_path, **named)
    out = tmp_path / (text if where == "out" else "result")
    if where == "tensor":
        tensors = load_file(base / "model.safetensors")
        save_file(tensors | {text: tensors["model.norm.weight"].clone()}, base / "model.safetensors")
    elif where.startswith(("_", "base_")):
        file = base / "config.json" if where == "_name_or_path" else adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {where: text}))
    with pytest.raises(AdapterMergeError, match=r"control character|printable text") as caught:
        merge(base, adapter, out)
    assert not out.exists() and text not in str(caught.value)
    assert isinstance(caught.value, OutputError) == (where == "out")


@pytest.mark.parametrize("job", JOBS)
def test_markup_in_names_stays_text_in_the_card(job: str, tmp_path: Path) -> None:
    """/ ends a name in a path, and no name here has one."""
    name = MARKUP.replace("/", "")
    base, adapter = pair(tmp_path, name, f"{name} 2", MARKUP)
    out = tmp_path / f"{name} 3"
    JOBS[job](base, adapter, out)
    text = (out / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert isinstance(yaml.safe_load(front), dict)
    fence, code, outside = "", [], []
    for line in body.splitlines():
        if not fence and (start := re.match("(`{3,})(python|bash)?$", line)):
            fence = start[1]
            code.append((start[2], []))
        elif fence and line == fence:
            fence = ""
        elif fence:
            code[-1][1].append(line)
        else:
            outside.append(line)
    assert not fence
    for markup in (r"(?<!\\)<", r"(?<!\\)\[", r"(?<!\\)`{3}"):
        assert not re.search(markup, "\n".join(outside)), markup
    for language, lines in code:
        if language == "python":
            strings = [node.value for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Constant)]
            assert set(strings) <= {MARKUP, base.name, out.name}
        else:
            words = [shlex.split(line, comments=True) for line in lines]
            named = {MARKUP, out.name, f"mine={out.name}"}
            assert all(named & set(line) or "generate" in line for line in words)


def test_markup_on_the_terminal(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, adapter_name="x[bold]y[/]", stated="org [red]z[/] [link=http://a]b[/link]")
    done = CliRunner().invoke(group, ["inspect", str(adapter), "--base", str(base)])
    assert done.exit_code == 0 and "x[bold]y[/]" in done.output
    assert "org [red]z[/] [link=http://a]b[/link]" in done.output
    assert inspect(adapter, base).problems == ()


def test_terminal_text() -> None:
    assert terminal_text("a\nb\tc é 漢") == "a\nb\tc é 漢"
    assert terminal_text("\x1b[2J\r\x9b1m\u202e") == r"\x1b[2J\r\x9b1m\u202e"


def test_markdown_and_fences() -> None:
    assert plain_text("a\n# b | <c>") == r"a \# b \| \<c\>"
    assert code_fence("a", "b ```` c") == "`````"
