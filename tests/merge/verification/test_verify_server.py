"""verify --server against a real HTTP server whose answers come from transformers and PEFT's merged models."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from completions_server import Behaviour, running

from adapter_merge.api.verify_server import verify_server
from adapter_merge.cli.main import group
from adapter_merge.errors import InputError, MismatchError, UnsupportedError
from adapter_merge.verification.completions_client import ServedModel

GENERATED = 6


@dataclass
class World:
    base: Path
    adapters: dict[str, Path]
    merged: dict[str, Any]  # by PEFT's own merge, float32; "base" as well
    tokenizer: Any


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small llama with a tokenizer of bytes, and three adapters: right, other and faint."""
    import peft
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 288}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, bos_token_id=None, eos_token_id=7)
    base = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    base.save_pretrained(folder / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only)
    tokenizer.save_pretrained(folder / "base")
    adapters, merged = {}, {"base": base}
    for number, (name, size) in enumerate((("right", 0.1), ("other", 0.1), ("faint", 1e-6))):
        torch.manual_seed(number)
        said = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        live = peft.get_peft_model(copy.deepcopy(base), said)
        with torch.no_grad():
            for key, parameter in live.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, size)
        live.save_pretrained(folder / name)
        adapters[name] = folder / name
        merged[name] = live.eval().merge_and_unload()
    return World(folder / "base", adapters, merged, tokenizer)


@contextmanager
def serving(world: World, **settings: Any) -> Iterator[tuple[str, Behaviour]]:
    models = settings.pop("models", world.merged)
    behaviour = Behaviour(models, world.tokenizer, **settings)
    with running(behaviour) as url:
        yield url, behaviour


def check(world: World, url: str, model: str = "right", adapter: str = "right", **settings: Any) -> dict[str, Any]:
    key = settings.pop("api_key", None)
    served = ServedModel(url, model, key)
    return verify_server(world.base, str(world.adapters[adapter]), served, generated=GENERATED, **settings)


WAYS = {
    "prompt_logprobs": {},
    "echo": {"extensions": False, "refuses_unknown": True},
    "generated": {"extensions": False, "echo": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_right_adapter_passes_and_every_other_answer_fails(world: World, way: str) -> None:
    with serving(world, **WAYS[way]) as (url, _):
        report = check(world, url)
        found = report["log_probabilities"]
        assert (report["verdict"], report["passed"], report["way"]) == ("PASS", True, way), report
        assert found["difference"]["max"] < 1e-4 < 0.1 < found["effect"]["max"]
        assert found["compared"] > (4 * GENERATED if way != "generated" else GENERATED)
        assert report["greedy"]["equal"] == report["greedy"]["total"] > 0
        ignored = check(world, url, "base")
        assert (ignored["verdict"], ignored["passed"]) == ("FAIL", False)
        if way != "generated":  # there the first token that differs ends what can be compared
            assert "ignores the adapter" in ignored["problems"][0]
            assert ignored["log_probabilities"]["from_base"]["max"] < 1e-4
        other = check(world, url, "other")
        assert other["verdict"] == "FAIL"
        assert not any("ignores" in problem for problem in other["problems"])


@pytest.mark.slow
def test_swapped_names_and_a_scaled_adapter_fail(world: World) -> None:
    scaled = copy.deepcopy(world.merged["right"])
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            plain = dict(world.merged["base"].named_parameters())[name]
            parameter.add_(parameter - plain, alpha=0.02)
    swapped = {"right": world.merged["other"], "other": world.merged["right"], "scaled": scaled}
    with serving(world, models=swapped) as (url, _):
        assert check(world, url, "right", "right")["verdict"] == "FAIL"
        assert check(world, url, "other", "other")["verdict"] == "FAIL"
        assert check(world, url, "scaled", "right")["verdict"] == "FAIL"
        assert check(world, url, "other", "right")["verdict"] == "PASS"


def test_an_adapter_whose_effect_is_within_the_tolerance_never_passes(world: World) -> None:
    with serving(world) as (url, _):
        for model in ("faint", "base"):
            report = check(world, url, model, "faint")
            assert (report["verdict"], report["passed"]) == ("INCONCLUSIVE", False), report
        wide = check(world, url, "right", "right", tolerance=100.0)
        assert wide["verdict"] == "INCONCLUSIVE"


@pytest.mark.slow(first=False)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_server_is_held_to_a_bound_that_is_measured(world: World, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    halves = {name: copy.deepcopy(model).to(wanted) for name, model in world.merged.items()}
    with serving(world, models=halves) as (url, _):
        report = check(world, url, dtype=dtype)
        assert report["verdict"] == "PASS", report
        assert 1e-4 < report["log_probabilities"]["difference"]["max"] <= report["tolerance"]["max"]
        assert check(world, url, "base", dtype=dtype)["verdict"] == "FAIL"
        assert check(world, url, "other", dtype=dtype)["verdict"] == "FAIL"
        strict = check(world, url)  # float32, the base's own: too tight for this server, and the note says why
        assert strict["verdict"] == "FAIL"
        assert any("--dtype" in note for note in strict["notes"])


def test_a_server_that_leaves_the_end_of_the_answer_out(world: World) -> None:
    """The base's end-of-sequence token becomes the adapter's first choice: the server stops there at once."""
    with serving(world, drops_end=True) as (url, _):
        assert check(world, url)["verdict"] == "PASS"
    ends = copy.deepcopy(world.merged["right"])
    first = int(
        ends(input_ids=torch.tensor([world.tokenizer("Tell me about the sea.")["input_ids"]])).logits[0, -1].argmax()
    )
    ends.config.eos_token_id = first
    with serving(world, models={"right": ends}, drops_end=True) as (url, _):
        report = check(world, url, prompts=["Tell me about the sea."])
        assert report["verdict"] == "FAIL"  # the adapter as trained goes on there
        assert any("greedy" in problem for problem in report["problems"])


def test_a_server_that_cuts_an_answer_short_fails(world: World) -> None:
    with serving(world, cuts_last=True) as (url, _):
        report = check(world, url)
    assert report["verdict"] == "FAIL"
    assert any("greedy" in problem for problem in report["problems"])


def test_values_that_are_shifted_by_little_fail(world: World) -> None:
    with serving(world, shift=3e-4) as (url, _):
        report = check(world, url)
        assert report["verdict"] == "FAIL"
        assert report["log_probabilities"]["difference"]["mean"] == pytest.approx(3e-4, rel=0.05)


def test_the_key_is_sent_and_told_to_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", str(world.base), str(world.adapters["right"]), "--model", "right", "--tokens", "4"]
    with serving(world, key="a-secret") as (url, behaviour):
        for given in ({}, {"api_key": "wrong"}):
            with pytest.raises(InputError, match="API key"):
                check(world, url, **given)
        assert check(world, url, api_key="a-secret")["passed"]
        monkeypatch.setenv("ADAPTER_MERGE_API_KEY", "a-secret")
        result = CliRunner().invoke(group, [*arguments, "--server", url + "/v1/", "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["passed"]
        assert "a-secret" not in result.output
        assert {entry.get("Authorization") for entry in behaviour.headers[-3:]} == {"Bearer a-secret"}
    assert "a-secret" not in repr(ServedModel("http://localhost", "right", "a-secret"))


def test_what_is_no_such_server_is_said(world: World) -> None:
    with serving(world) as (url, _):
        with pytest.raises(InputError, match="offers no model 'nobody'") as raised:
            check(world, url, "nobody")
        assert raised.value.problems[0].expected == "one of: base, right, other, faint"
    with serving(world, chat_only=True) as (url, _), pytest.raises(UnsupportedError, match="only chat"):
        check(world, url)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="cannot be reached"):
            check(world, f"http://127.0.0.1:{closed.getsockname()[1]}")
    for address in (
        "localhost:8000",
        "file:///etc/passwd",
        "ftp://host",
        "http://",
        "http://user:pw@host",
        "http://h:x",
    ):
        with pytest.raises(InputError, match="not the address of a server"):
            check(world, address)


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "not a JSON object"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "not a JSON object"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
            "redirects to another address",
        ),
        (b"HTTP/1.1 500 Internal\r\nContent-Length: 4\r\n\r\n\x1b[2J", "the server failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{", "not a JSON object"),
        (b"", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.0\r\n", "closed the connection"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data": 7}', "not a list of models"),
    ],
)
def test_answers_that_no_completions_server_gives(world: World, raw: bytes, cause: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(raw)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InputError, match=cause) as raised:
            check(world, f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "\x1b" not in str(raised.value)


def test_another_tokenizer_is_an_error(world: World) -> None:
    class Longer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [9, *world.tokenizer(text)["input_ids"]]}

        decode = staticmethod(world.tokenizer.decode)

    for extensions in (True, False):
        behaviour = Behaviour(world.merged, Longer(), extensions=extensions)
        with running(behaviour) as url, pytest.raises(MismatchError, match="tokenizes text differently"):
            check(world, url)


def test_options_that_have_no_part_in_it_are_refused(world: World) -> None:
    pair = [str(world.base), str(world.adapters["right"])]
    for wrong in (
        ["--server", "http://127.0.0.1:9"],
        ["--server", "http://127.0.0.1:9", "--model", "right", "--weights-only"],
        ["--server", "http://127.0.0.1:9", "--model", "right", "--trained"],
        ["--model", "right"],
    ):
        result = CliRunner().invoke(group, ["verify", *pair, *wrong])
        assert result.exit_code == 2, result.output
