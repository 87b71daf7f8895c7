"""The real command, the real OpenAI server and a real client over the loopback interface.

Adapters arrive as their training saved them (DCFT, DuDe, PEFT DoRA and LoRA folders); every answer is compared with
the merged Hugging Face model's.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server import GREEDY, client_of, wait_until
from world import Running, prompts

from adapter_merge.serve.api_server.adapter_loader import LOOK_SECONDS

pytestmark = pytest.mark.vllm

COUNT = 8


def test_chat_with_three_adapters_and_the_base(running: Running) -> None:
    with client_of(running.server) as client:
        listed = [model.id for model in client.models.list()]
        assert listed == ["base", "lora-1", "dcft-1", "dude-1", "dora-2", "dude-2", "lora-2"]
        for name in ("lora-1", "dcft-1", "dude-1", "base"):
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "What is a low-rank adapter?"}],
                max_tokens=COUNT,
                temperature=0,
                extra_body=GREEDY,
            )
            prompt = answer.prompt_token_ids
            assert len(prompt) > 20
            assert answer.choices[0].token_ids == running.tokens(None if name == "base" else name, prompt)


def test_a_name_of_the_folder_is_loaded_on_the_first_request(running: Running) -> None:
    (prompt,) = prompts(1, 14, seed=5)
    for name in ("dora-2", "dude-2"):
        assert running.server.complete(name, prompt, COUNT) == (200, running.tokens(name, prompt))
    with client_of(running.server) as client:
        assert {"dora-2", "dude-2"} <= {model.id for model in client.models.list()}


def test_load_and_unload_a_raw_folder(running: Running) -> None:
    (prompt,) = prompts(1, 14, seed=6)
    raw = running.world.adapters["dora-1"].raw
    assert running.server.complete("extra", prompt, COUNT)[0] == 404
    assert running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(raw))[0] == 200
    assert running.server.complete("extra", prompt, COUNT) == (200, running.tokens("dora-1", prompt))
    # Another adapter under the same name: nothing of the old one may answer, from the prefix cache either.
    other = running.world.adapters["dcft-2"].raw
    assert running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(other))[0] == 400
    status, _ = running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(other), load_inplace=True)
    assert status == 200
    assert running.server.complete("extra", prompt, COUNT) == (200, running.tokens("dcft-2", prompt))
    assert running.server.post("unload_lora_adapter", lora_name="extra")[0] == 200
    assert running.server.complete("extra", prompt, COUNT)[0] == 404


def test_what_a_folder_states_is_read(running: Running) -> None:
    """A DCFT that lost its alpha: refused, then served as read_options.json says, and again as it says later."""
    (prompt,) = prompts(1, 14, seed=9)
    folder = running.directory / "stated"
    shutil.copytree(running.world.adapters["dcft-1"].raw, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("lora_alpha")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    status, body = running.server.complete("stated", prompt, COUNT)
    assert status == 400
    assert "lora_alpha" in str(body)
    (folder / "read_options.json").write_text(json.dumps({"alpha": 32}))
    assert running.server.complete("stated", prompt, COUNT) == (200, running.tokens("dcft-1", prompt))
    (folder / "read_options.json").write_text(json.dumps({"alpha": 0.001}))
    time.sleep(LOOK_SECONDS)  # an edit of a small file is seen within this time
    assert running.server.complete("stated", prompt, COUNT) == (200, running.tokens(None, prompt))
    (folder / "read_options.json").write_text(json.dumps({"alpha": "none"}))
    time.sleep(LOOK_SECONDS)
    assert running.server.complete("stated", prompt, COUNT)[0] == 400
    shutil.rmtree(folder)


def test_a_replaced_folder_is_never_served_stale(running: Running) -> None:
    (prompt,) = prompts(1, 150, seed=7)
    folder = running.directory / "moving"
    for name in ("lora-2", "dude-1", "dora-1", "lora-2"):
        new = running.directory / ".new"
        shutil.copytree(running.world.adapters[name].raw, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        assert running.server.complete("moving", prompt, COUNT) == (200, running.tokens(name, prompt)), name
    # In place, file by file: the config of one and the weights of another never make an adapter.
    raw = running.world.adapters["dude-1"].raw
    shutil.copyfile(raw / "adapter_config.json", folder / "adapter_config.json")
    time.sleep(LOOK_SECONDS)
    assert running.server.complete("moving", prompt, COUNT)[0] == 400
    shutil.copyfile(raw / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    assert running.server.complete("moving", prompt, COUNT) == (200, running.tokens("dude-1", prompt))
    shutil.rmtree(folder)
    assert running.server.complete("moving", prompt, COUNT)[0] == 404


def test_requests_under_way_keep_the_adapter_they_began_with(running: Running) -> None:
    """Replaced in the middle of long answers: these end as they began, the next ones are the new adapter's."""
    several = prompts(4, 20, seed=9)
    folder = running.directory / "live"
    shutil.copytree(running.world.adapters["dude-1"].raw, folder)
    assert running.server.complete("live", several[0], 1)[0] == 200
    with ThreadPoolExecutor(8) as pool:
        long = [pool.submit(running.server.complete, "live", prompt, 400) for prompt in several[:2]]
        # A request that comes after the replacement gets the new adapter.
        wait_until(
            lambda: running.server.count_requests("running") + sum(future.done() for future in long) >= len(long)
        )
        new = running.directory / ".new"
        shutil.copytree(running.world.adapters["dora-1"].raw, new)
        folder.rename(running.directory / ".old")
        new.rename(folder)
        short = [pool.submit(running.server.complete, "live", prompt, 40) for prompt in several]
        others = [pool.submit(running.server.complete, name, several[0], 40) for name in ("lora-1", "base")]
        for future, prompt in zip(long, several, strict=False):
            assert future.result() == (200, running.world.expected("dude-1", prompt, 400)[0])
        for future, prompt in zip(short, several, strict=True):
            assert future.result() == (200, running.world.expected("dora-1", prompt, 40)[0])
        for future, name in zip(others, ("lora-1", None), strict=True):
            assert future.result() == (200, running.world.expected(name, several[0], 40)[0])
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", ".hidden", "a\\b", "lora-2/", "/etc", "a\0b"])
def test_names_that_could_leave_the_folder_are_refused(running: Running, name: str) -> None:
    shutil.copytree(running.world.adapters["lora-2"].raw, running.directory.parent / "secret", dirs_exist_ok=True)
    assert running.server.complete(name, [5, 6], COUNT)[0] in (400, 404)
    raw = str(running.world.adapters["lora-2"].raw)
    assert running.server.post("load_lora_adapter", lora_name=name, lora_path=raw)[0] == 400


def test_links_that_leave_the_folder_are_refused(running: Running, tmp_path: Path) -> None:
    raw = running.world.adapters["lora-2"].raw
    whole = running.directory / "linked"
    whole.symlink_to(raw)
    assert running.server.complete("linked", [5, 6], COUNT)[0] == 400
    part = running.directory / "part"
    part.mkdir()
    shutil.copyfile(raw / "adapter_config.json", part / "adapter_config.json")
    (part / "adapter_model.safetensors").symlink_to(raw / "adapter_model.safetensors")
    status, body = running.server.complete("part", [5, 6], COUNT)
    assert status == 400
    assert "leaves the adapter folder" in body
    within = running.directory / "within"
    within.symlink_to(running.directory / "lora-2")
    prompt = [7, 8, 9]
    assert running.server.complete("within", prompt, COUNT) == (200, running.tokens("lora-2", prompt))
