"""Jobs that overlap in one process: each result is right, and torch's settings are as they were."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pico_bases import llama, load, quiet, randomise
from safetensors.torch import load_file

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.engine.devices import exact_products, one_thread

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def two_threads() -> object:
    """Torch on two threads, here and in threads that begin."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield None
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_job_that_begins_within_another_and_ends_after_it() -> None:
    """The second must not restore the one thread that it found while the first was at work."""
    inside, first_is_out = threading.Event(), threading.Event()
    seen: list[int] = []

    def second() -> None:
        with one_thread():
            inside.set()
            first_is_out.wait(30)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=second)
    with one_thread():
        assert torch.get_num_threads() == 1
        assert threads_of_a_new_thread() == 1
        thread.start()
        assert inside.wait(30)
    assert torch.get_num_threads() == 2
    assert threads_of_a_new_thread() == 1, "the second job is still at work"
    first_is_out.set()
    thread.join()
    assert seen == [1, 2]
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_precision_is_put_back_by_the_last_job() -> None:
    settings, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        first, second = exact_products(device), exact_products(device)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert settings.fp32_precision == "ieee", "the second job is still at work"
        second.__exit__(None, None, None)
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


@pytest.mark.usefixtures("two_threads")
def test_two_merges_at_once(tmp_path: Path) -> None:
    with quiet():
        base = llama(tmp_path / "base")
        live = {}
        for name in ("a", "b"):
            torch.manual_seed(ord(name))
            model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
            randomise(model)
            model.save_pretrained(tmp_path / name)
            live[name] = model.merge_and_unload().state_dict()

    def job(number: int) -> None:
        name = "ab"[number % 2]
        merge(base, tmp_path / name, tmp_path / f"out{number}", MergeOptions(device="cpu"))
        for key, value in load_file(tmp_path / f"out{number}" / "model.safetensors").items():
            torch.testing.assert_close(value, live[name][key], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, range(6)))
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
