"""`adapter-merge serve` up to the start of the server: the plan, its command line, and every refusal at once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from world import World

from adapter_merge.errors import InputError, MissingDependencyError
from adapter_merge.serve.api_server.adapter_loader import VARIABLE, Settings
from adapter_merge.serve.cli.cache import cache as cache_command
from adapter_merge.serve.cli.serve import serve
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.launch.flags import option
from adapter_merge.serve.launch.plan import Plan, make_plan
from adapter_merge.serve.launch.process import convert

pytestmark = pytest.mark.vllm


def plan_of(world: World, *adapters: str, **options: Any) -> Plan:
    return make_plan(str(world.base), adapters, **options)


def value(command: list[str], flag: str) -> list[str]:
    """What stands behind `flag`."""
    start = command.index(flag) + 1
    end = next((n for n in range(start, len(command)) if command[n].startswith("--")), len(command))
    return command[start:end]


def test_the_command_line(qwen2: World, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    names = ("lora-1", "dude-1", "dcft-2")
    plan = plan_of(qwen2, *(f"{name}={qwen2.adapters[name].raw}" for name in names), cache=cache)
    command = plan.command()
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(command, "--model") == [str(qwen2.base)]
    assert value(command, "--max-loras") == ["4"]
    assert value(command, "--max-lora-rank") == ["16"]
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(value(command, "--lora-target-modules")) == everything
    modules = [json.loads(text) for text in value(command, "--lora-modules")]
    assert [module["name"] for module in modules] == list(names)
    assert all(module["base_model_name"] == str(qwen2.base) for module in modules)
    assert all(Path(module["path"]).parent == tmp_path for module in modules)
    assert plan.environment()["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_flags_of_vllm_win(qwen2: World, tmp_path: Path) -> None:
    rest = ["--max-loras", "9", "--port=9000", "--served-model-name", "base", "--max-lora-rank", "64"]
    plan = plan_of(qwen2, f"a={qwen2.adapters['lora-2'].raw}", cache=Cache(tmp_path), vllm_flags=rest)
    command = plan.command()
    assert command.count("--max-loras") == 1
    assert value(command, "--max-loras") == ["9"]
    assert value(command, "--max-lora-rank") == ["64"]
    assert set(value(command, "--lora-target-modules")) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert json.loads(value(command, "--lora-modules")[0])["base_model_name"] == "base"
    assert plan.address() == "http://127.0.0.1:9000"


def test_an_adapter_folder(qwen2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    directory = tmp_path / "adapters"
    shutil.copytree(qwen2.adapters["dude-2"].raw, directory / "dude")
    (directory / "empty").mkdir()
    plan = plan_of(qwen2, adapter_dir=directory, cache=Cache(tmp_path / "cache"))
    extra = plan.environment()
    assert extra["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0", "names are found without the routes that load"
    assert extra["VLLM_PLUGINS"] == "another,adapter_merge"
    settings = Settings(**json.loads(extra[VARIABLE]))
    assert settings.adapter_dir == str(directory)
    assert settings.max_rank == 16
    assert list(plan.folder_adapters) == ["dude"]
    assert any(note.startswith("empty in") for note in plan.notes)
    assert len(value(plan.command(), "--lora-target-modules")) == 7
    assert "--lora-modules" not in plan.command()


def test_preload_converts_what_the_folder_holds(qwen2: World, tmp_path: Path) -> None:
    """Before the start; an adapter that cannot be converted is said, and does not keep the server from starting."""
    directory = tmp_path / "adapters"
    shutil.copytree(qwen2.adapters["dude-2"].raw, directory / "good")
    shutil.copytree(qwen2.adapters["lora-2"].raw, directory / "bad")
    tensors = load_file(directory / "bad" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, directory / "bad" / "adapter_model.safetensors")
    cache = Cache(tmp_path / "cache")
    plan = plan_of(qwen2, f"a={qwen2.adapters['lora-1'].raw}", adapter_dir=directory, preload=True, cache=cache)
    said: list[str] = []
    held = convert(plan, said.append)
    assert set(held) == {"a", "good"}
    assert sum(entry.in_use for entry in cache.entries()) == 2
    assert any(line.startswith("bad cannot be served") for line in said)
    (line,) = [line for line in said if line.startswith("good: DuDe, rank ")]
    assert "converted in" in line
    assert "; base: magnitudes follow the base's row norms" in line
    for served in held.values():
        served.release()
    assert not any(entry.in_use for entry in cache.entries())
    with pytest.raises(InputError, match="--preload needs --adapter-dir"):
        plan_of(qwen2, f"a={qwen2.adapters['lora-1'].raw}", preload=True, cache=cache)


def test_clients_may_load_from_what_is_named(qwen2: World, tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        root.mkdir()
    plan = plan_of(qwen2, loading=True, roots=roots, cache=Cache(tmp_path / "cache"))
    extra = plan.environment()
    assert extra["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert Settings(**json.loads(extra[VARIABLE])).roots == [str(root) for root in roots]
    with pytest.raises(InputError, match="needs a folder to load from"):
        plan_of(qwen2, loading=True, cache=Cache(tmp_path / "cache"))
    with pytest.raises(InputError) as caught:
        plan_of(qwen2, "a=b", roots=[tmp_path / "none"], cache=Cache(tmp_path / "cache"))
    assert "none: no such folder" in str(caught.value)
    assert "needs --allow-loading" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "shell", "host", "bound", "warns"),
    [
        ([], {}, "127.0.0.1", "this machine only", False),
        (["--host", "localhost"], {}, "localhost", "this machine only", False),
        (["--host=::1"], {}, "::1", "this machine only", False),
        (["--host", "0.0.0.0"], {}, "0.0.0.0", "every interface", True),
        (["--host", "::"], {}, "::", "every interface", True),
        (["--host", "10.1.2.3"], {}, "10.1.2.3", "10.1.2.3", True),
        (["--host", "0.0.0.0", "--api-key", "x"], {}, "0.0.0.0", "every interface", False),
        (["--host", "0.0.0.0"], {"VLLM_API_KEY": "x"}, "0.0.0.0", "every interface", False),
        (["--host", "0.0.0.0", "--api-key="], {}, "0.0.0.0", "every interface", True),
        (["--uds", "/run/x"], {}, None, "the socket /run/x", False),
    ],
)
def test_what_is_bound(
    qwen2: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    shell: dict[str, str],
    host: str | None,
    bound: str,
    warns: bool,
) -> None:
    """Loopback unless the server is opened; open without a key is warned of."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    plan = plan_of(qwen2, f"a={qwen2.adapters['lora-2'].raw}", cache=Cache(tmp_path), vllm_flags=flags)
    assert option(plan.command(), "--host") == host
    assert bound in plan.bound()
    assert len(plan.warnings()) == int(warns)
    assert plan.describe()["notes"] == plan.warnings()


def test_options_that_are_also_vllms(qwen2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_MERGE_CACHE", str(tmp_path / "cache"))
    arguments = [str(qwen2.base), f"a={qwen2.adapters['lora-2'].raw}", "--dry-run", "--json"]
    own = ["--host", "0.0.0.0", "--port", "9001", "--api-key", "x", "--shutdown-timeout", "7"]
    shown = CliRunner().invoke(serve, [*arguments, *own], catch_exceptions=False)
    command = json.loads(shown.stdout)["command"]
    flags = ("--host", "--port", "--api-key", "--shutdown-timeout")
    assert [option(command, flag) for flag in flags] == ["0.0.0.0", "9001", "x", "7"]
    assert CliRunner().invoke(serve, [*arguments, "--port", "1", "--", "--port=2"]).exit_code == 2
    plain = json.loads(CliRunner().invoke(serve, arguments, catch_exceptions=False).stdout)["command"]
    assert option(plain, "--shutdown-timeout") == "30"


def test_what_is_stated_of_one_adapter(qwen2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--alpha NAME=NUMBER reaches that adapter's folder alone; a name that is no adapter's is a wrong command."""
    monkeypatch.setenv("ADAPTER_MERGE_CACHE", str(tmp_path / "cache"))
    raw = qwen2.adapters["dcft-1"].raw
    arguments = [str(qwen2.base), f"a={raw}", f"b={raw}", "--dry-run", "--json"]

    def folders(*more: str) -> list[str]:
        shown = CliRunner().invoke(serve, [*arguments, *more], catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
        return [Path(adapter["folder"]).name for adapter in json.loads(shown.stdout)["adapters"].values()]

    plain = folders("--force")  # the file holds another alpha
    assert plain[0] == plain[1]
    stated = folders("--force", "--alpha", "b=16", "--", "--port", "9001")
    assert stated[0] == plain[0]
    assert stated[1] != plain[1]
    assert CliRunner().invoke(serve, [*arguments, "--alpha", "c=16"]).exit_code == 2
    assert CliRunner().invoke(serve, [*arguments, "--alpha", "b=many"]).exit_code == 2
    alone = CliRunner().invoke(serve, [str(qwen2.base), "--adapter-dir", str(tmp_path), "--alpha", "16"])
    assert alone.exit_code == 2
    assert "read_options.json" in alone.output


def test_every_problem_at_once(qwen2: World, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(
            qwen2,
            "no-equals",
            "bad/name=there",
            "a=one",
            "a=two",
            adapter_dir=tmp_path / "none",
            cache=Cache(tmp_path),
            vllm_flags=["--lora-modules", "x", "--api-server-count", "2", "--max-lora-rank", "many"],
        )
    text = str(caught.value)
    for word in (
        "no-equals",
        "bad/name",
        "given twice",
        "no such folder",
        "--lora-modules is set",
        "--api-server-count",
        "--max-lora-rank is not a number",
    ):
        assert word in text


def test_adapters_that_cannot_be_served(qwen2: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        plan_of(qwen2, f"a={tmp_path / 'none'}", f"b={tmp_path / 'empty'}", cache=Cache(tmp_path / "cache"))
    assert "none: no such folder" in str(caught.value)
    assert "empty" in str(caught.value)
    dude = f"a={qwen2.adapters['dude-1'].raw}"
    with pytest.raises(InputError, match="too small"):
        plan_of(qwen2, dude, cache=Cache(tmp_path / "cache"), vllm_flags=["--max-lora-rank", "8"])
    with pytest.raises(InputError, match="no adapters"):
        plan_of(qwen2, cache=Cache(tmp_path / "cache"))
    name = f"base={qwen2.adapters['dude-1'].raw}"
    with pytest.raises(InputError, match="name of the base"):
        plan_of(qwen2, name, cache=Cache(tmp_path), vllm_flags=["--served-model-name=base"])


def test_without_vllm(qwen2: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(MissingDependencyError, match="vLLM is not installed"):
        plan_of(qwen2, "a=b")


def test_dry_run_and_cache_commands(qwen2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_MERGE_CACHE", str(tmp_path / "cache"))
    raw = qwen2.adapters["dude-1"].raw
    arguments = [str(qwen2.base), f"a={raw}", "--dry-run"]
    shown = CliRunner().invoke(serve, [*arguments, "--json", "--", "--port", "9001"], catch_exceptions=False)
    about = json.loads(shown.stdout)
    assert about["command"][-2:] == ["--port", "9001"]
    assert about["url"] == "http://127.0.0.1:9001"
    assert about["adapters"]["a"]["method"] == "DuDe"
    assert about["adapters"]["a"]["cached"] is False
    assert not (tmp_path / "cache").exists()
    text = CliRunner().invoke(serve, arguments, catch_exceptions=False).stdout
    assert "--max-lora-rank 16" in text
    assert "a: DuDe, rank 16, would be converted" in text

    from adapter_merge.serve.conversion.served_folder import Converter

    served = Converter(qwen2.base).obtain(raw)
    assert str(served.folder) == about["adapters"]["a"]["folder"]
    for command in (serve, cache_command):
        given = [str(qwen2.base), f"a={raw}"] if command is serve else ["add", str(qwen2.base), str(raw)]
        refused = CliRunner().invoke(command, [*given, "--cache-size", "5"])
        assert refused.exit_code == 2
        assert "4GiB" in refused.output
    added = CliRunner().invoke(
        cache_command, ["add", str(qwen2.base), str(raw), "--cache-size", "4GiB", "--json"], catch_exceptions=False
    )
    (row,) = json.loads(added.stdout)["entries"]
    assert row["key"] == served.folder.name
    assert row["cached"] is True
    assert row["origin"] == served.origin
    listed = json.loads(CliRunner().invoke(cache_command, ["list", "--json"]).stdout)
    assert [entry["in_use"] for entry in listed["entries"]] == [True]
    assert "in use" in CliRunner().invoke(cache_command, ["list"]).stdout
    assert json.loads(CliRunner().invoke(cache_command, ["clear", "--json"]).stdout)["in_use"] == 1
    assert served.lease is not None
    served.lease.release()
    assert json.loads(CliRunner().invoke(cache_command, ["clear", "--json"]).stdout)["removed"] == 1


def test_options_are_read_as_vllm_reads_them() -> None:
    assert option(["--port", "1", "--x"], "--port") == "1"
    assert option(["--max_lora_rank=8"], "--max-lora-rank") == "8"
    assert option(["--port"], "--port") is None
    assert option([], "--port") is None


def test_adapters_without_names_have_their_folders(
    qwen2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_MERGE_CACHE", str(tmp_path / "cache"))
    raw = qwen2.adapters["lora-1"].raw
    for place in ("one", "two"):
        shutil.copytree(raw, tmp_path / place / "support bot")
    places = [str(tmp_path / place / "support bot") for place in ("one", "two")]
    arguments = [str(qwen2.base), *places, f"sql={raw}", "--dry-run", "--json"]
    about = json.loads(CliRunner().invoke(serve, arguments, catch_exceptions=False).stdout)
    assert {name: each["source"] for name, each in about["adapters"].items()} == {
        "support-bot": places[0],
        "support-bot-2": places[1],
        "sql": str(raw),
    }


def test_a_dry_run_lets_vllm_read_its_flags(qwen2: World, tmp_path: Path) -> None:
    arguments = [str(qwen2.base), f"a={qwen2.adapters['lora-1'].raw}", "--dry-run", "--"]
    for flags, words in (
        (["--max-modle-len", "512"], "--max-modle-len"),
        (["--max-num-seqs", "many"], "max-num-seqs"),
    ):
        refused = CliRunner().invoke(serve, [*arguments, *flags])
        assert isinstance(refused.exception, InputError)
        assert "vLLM refuses its flags" in str(refused.exception)
        assert words in str(refused.exception)
