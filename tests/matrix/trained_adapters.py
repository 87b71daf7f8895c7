"""Trained adapters of every kind that the tests know, each on its base, made when it is first asked for.

A kind is made twice where a sabotage needs another adapter of it (another seed), and once more with another base of
the same shapes. For ONNX a kind is trained on a base that the exporters take: it has a tokenizer.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf_files
import peft
import pico
import quantised_bases
import test_formats_foreign as foreign
import torch
from artefact_files import tensors_in, write_tensor
from factor_models import dcft_adapter
from peft_cases import BASES, CASES, SOME
from peft_layer_cases import LAYER_CASES
from pico_bases import llama, quiet, train
from pico_models import save_encoder, save_encoder_dcft, save_gpt2, save_pico
from safetensors.torch import save_file

from adapter_merge.combine.delta_ops import METHODS, Settings
from adapter_merge.combine.recipe import IN_TURN, Ingredient, Recipe, make_recipe
from adapter_merge.formats.stated_settings import ReadOptions

MAIN, OTHER = 0, 1  # seeds: the adapter, and another one of its kind


@dataclass(frozen=True)
class Trained:
    """An adapter and its base, as every command takes them."""

    base: Path | None  # None: the adapter is a checkpoint that holds its base
    adapter: str | Path | Recipe
    options: ReadOptions | None = None


Make = Callable[[Path, Path, int], ReadOptions | None]  # (base, folder of the adapter, seed)


@dataclass(frozen=True)
class Kind:
    """How a kind of adapter is trained, and on which base."""

    base: str
    make: Make | None = None  # None: the checkpoint is base and adapter at once, see `checkpoint`
    checkpoint: Callable[[Path, int], None] | None = None
    recipe: Settings | None = None  # a combination of two adapters


def _peft(name: str, method: str, arguments: dict[str, Any], options: ReadOptions | None = None) -> Make:
    def make(base: Path, folder: Path, seed: int) -> ReadOptions | None:
        with quiet():
            config = getattr(peft, method)(**arguments)
        train(base, config, folder, seed=seed + 1, scale=0.03 if "OLoRA" in name else 0.1)
        return options

    return make


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Makers with a seed of their own get another one."""
    real = torch.manual_seed
    with mock.patch.object(torch, "manual_seed", lambda own: real(own + 1000 * seed)):
        yield


def _foreign(write: Callable[..., Any], options: ReadOptions | None = None, **arguments: Any) -> Make:
    def make(base: Path, folder: Path, seed: int) -> ReadOptions | None:
        with _seeded(seed):
            write(base, folder, **arguments)
        return options

    return make


def _kohya(kind: str, dora: str | None) -> Make:
    def make(base: Path, folder: Path, seed: int) -> None:
        with _seeded(seed):
            saved, _ = foreign.kohya(base, kind, dora, "lora_te_", True)
        folder.mkdir()
        save_file(saved, folder / "a.safetensors")

    return make


def _beside_plain(arguments: dict[str, Any]) -> Make:
    """A LoRA of PEFT trained on the unquantised twin of a quantised base."""

    def make(base: Path, folder: Path, seed: int) -> None:
        plain = folder.parent / "plain"
        with quiet():
            model = gguf_files.pico("llama") if any(base.glob("*.gguf")) else quantised_bases.llama(64)
            model.save_pretrained(plain)
            config = peft.LoraConfig(**arguments)
        train(plain, config, folder, seed=seed + 1)

    return make


def _dcft_folder(base: Path, folder: Path, seed: int) -> None:
    with _seeded(seed):
        dcft_adapter(base, folder)


def _dcft_classifier(family: str) -> Callable[[Path, int], None]:
    def make(folder: Path, seed: int) -> None:
        with _seeded(seed), quiet():
            pico.save_dcft_checkpoint(pico.dcft_model(family), folder)

    return make


def _classifier(family: str, **arguments: Any) -> Make:
    def make(base: Path, folder: Path, seed: int) -> None:
        from transformers import AutoModelForSequenceClassification

        with _seeded(seed), quiet():
            pico.peft_adapter(AutoModelForSequenceClassification.from_pretrained(base), family, folder, **arguments)

    return make


def _dcft_beside_its_base(base: Path, folder: Path, seed: int) -> None:
    with _seeded(seed), quiet():
        save_encoder_dcft(base, folder, seed)
    shutil.rmtree(folder / "merged")


def _mytransformers(**arguments: Any) -> Make:
    axis = ReadOptions(magnitude_axis="in") if arguments["generation"] == "dim0" else None
    return _foreign(foreign.mytransformers, axis, wrapped=False, **arguments)


LORA = {"r": 4, "target_modules": SOME}
KINDS: dict[str, Kind] = {
    **{f"PEFT {name}": Kind(base, _peft(name, method, arguments)) for name, (base, method, arguments) in CASES.items()},
    **{f"PEFT {name}": Kind(LAYER_CASES[name][0], _peft(name, *LAYER_CASES[name][1:])) for name in ("HRA", "IA3")},
    "PEFT lora on bfloat16": Kind("bfloat16", _peft("lora", "LoraConfig", LORA)),
    "PEFT DoRA on bfloat16": Kind("bfloat16", _peft("DoRA", "LoraConfig", {**LORA, "use_dora": True})),
    "PEFT DuDe on bfloat16": Kind(
        "bfloat16",
        _peft(
            "DuDe",
            "LoraConfig",
            {**LORA, "use_dora": True, "init_lora_weights": "pissa"},
            ReadOptions(residual_dtype="bfloat16"),
        ),
    ),
    "PEFT lora on INT4": Kind("int4", _beside_plain(LORA)),
    "PEFT DoRA on FP8": Kind("fp8", _beside_plain({**LORA, "use_dora": True})),
    "PEFT lora on GGUF": Kind("gguf", _beside_plain(LORA)),
    "PEFT classifier of BERT": Kind("bert", _classifier("bert")),
    "PEFT DoRA classifier of RoBERTa": Kind("roberta", _classifier("roberta", use_dora=True)),
    "DCFT checkpoint": Kind("llama", _foreign(foreign.dcft_checkpoint)),
    "DCFT checkpoint, channels and bias": Kind("llama", _foreign(foreign.dcft_channels)),
    "DCFT reshape form": Kind("llama", _foreign(foreign.dcft_reshape_file)),
    "DCFT safe folder": Kind("llama", _dcft_folder),
    "DCFT checkpoint of a RoBERTa classifier": Kind("roberta", _dcft_beside_its_base),
    "DCFT checkpoint of BERT, with its base": Kind("", checkpoint=_dcft_classifier("bert")),
    "DCFT checkpoint of DeBERTa, with its base": Kind("", checkpoint=_dcft_classifier("deberta")),
    "MyTransformers DuDe": Kind("llama", _mytransformers(generation="trained", trainable=False)),
    "MyTransformers DuDe, residual left out": Kind("llama", _mytransformers(generation="trained", trainable=True)),
    "MyTransformers DuDe, untrained magnitude": Kind("llama", _mytransformers(generation="untrained", trainable=False)),
    "MyTransformers DuDe, norms of columns": Kind("llama", _mytransformers(generation="dim0", trainable=False)),
    "MyTransformers PiSSA": Kind("llama", _mytransformers(generation="untrained", trainable=False, method="pissa")),
    "MyTransformers DoRA": Kind("llama", _mytransformers(generation="trained", trainable=True, method="dora")),
    "kohya LoRA": Kind("llama", _kohya("lora", None)),
    "kohya DoRA, (out, 1)": Kind("llama", _kohya("lora", "out")),
    "kohya DoRA, (1, in)": Kind("llama", _kohya("lora", "in")),
    "LyCORIS LoKr": Kind("llama", _kohya("lokr", None)),
    "LyCORIS LoHa": Kind("llama", _kohya("loha", None)),
    "LyCORIS LoKr with magnitudes": Kind("llama", _kohya("lokr", "out")),
    **{
        f"combination, {method}": Kind(
            "llama", recipe=Settings(method, 1.0 if method in ("linear", IN_TURN) else 0.5, seed=3)
        )
        for method in (*METHODS, IN_TURN)
    },
}  # fmt: skip


def _gguf(folder: Path) -> Path:
    folder.mkdir()
    gguf_files.write(folder / "model.gguf", gguf_files.pico("llama"), "llama", gguf_files.Kind.Q8_0)
    return folder


_MORE_BASES: dict[str, Callable[[Path], Path]] = {
    "bfloat16": lambda folder: llama(folder, dtype=torch.bfloat16),
    "int4": lambda folder: quantised_bases.quantised("W4A16", folder, 64)[0],
    "fp8": lambda folder: quantised_bases.quantised("FP8_DYNAMIC", folder, 64)[0],
    "gguf": _gguf,
    "bert": lambda folder: pico.save_base(pico.pico_model("bert"), folder),
    "roberta": lambda folder: pico.save_base(pico.pico_model("roberta"), folder, shard="1GB"),
}

_ONNX_BASES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: save_pico(folder, "llama"),
    "tied": lambda folder: save_pico(folder, "llama", tie_word_embeddings=True),
    "biased": lambda folder: save_pico(folder, "llama", attention_bias=True),
    "gpt2": save_gpt2,
    "bert": lambda folder: save_encoder(folder, "bert"),
    "roberta": lambda folder: save_encoder(folder, "roberta"),
}


class Trainer:
    """Makes bases and adapters below one folder, each once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._made: dict[tuple[Any, ...], Any] = {}
        self._count = 0

    def _once(self, make: Callable[[Path], Any], *key: Any) -> Any:
        if key not in self._made:
            self._count += 1
            folder = self.place / str(self._count)
            folder.mkdir(parents=True)
            self._made[key] = make(folder)
        return self._made[key]

    def base(self, name: str, onnx: bool = False) -> Path:
        """The base of this name; KeyError for one that is not exported to ONNX here."""
        makers = _ONNX_BASES if onnx else BASES | _MORE_BASES
        write = makers[name]

        def make(folder: Path) -> Path:
            with quiet():
                return write(folder / "base")

        found: Path = self._once(make, "base", name, onnx)
        return found

    def trained(self, name: str, seed: int = MAIN, onnx: bool = False) -> Trained:
        """The adapter of this kind and seed."""
        kind = KINDS[name]

        def make(folder: Path) -> Trained:
            if kind.checkpoint is not None:
                kind.checkpoint(folder / "checkpoint", seed)
                return Trained(None, folder / "checkpoint")
            base = self.base(kind.base, onnx)
            if kind.recipe is not None:
                return Trained(base, self._recipe(kind.recipe, seed, onnx))
            assert kind.make is not None
            options = kind.make(base, folder / "adapter", seed)
            return Trained(base, folder / "adapter", options)

        found: Trained = self._once(make, "adapter", name, seed, onnx)
        return found

    def on_other_base(self, name: str, onnx: bool = False) -> Trained:
        """The adapter of MAIN on a base that is not its own: the same model, every weight a little different."""
        trained = self.trained(name, MAIN, onnx)
        if trained.base is None:
            source = Path(str(trained.adapter))
            return Trained(None, self._once(lambda folder: shaken(source, folder / "checkpoint"), "other", source))
        source = trained.base
        other = self._once(lambda folder: shaken(source, folder / "other-base"), "other", source)
        return Trained(other, trained.adapter, trained.options)

    def _recipe(self, settings: Settings, seed: int, onnx: bool) -> Recipe:
        parts = {name: self.trained(f"PEFT {name}", seed, onnx).adapter for name in ("lora", "DoRA")}
        weights = {"lora": 0.7, "DoRA": 0.4} if settings.method != IN_TURN else {"lora": 1.0, "DoRA": 1.0}
        return make_recipe([Ingredient(name, str(path), weights[name]) for name, path in parts.items()], settings)


def shaken(folder: Path, copy: Path) -> Path:
    """A copy of a model folder, every base weight moved by a hundredth of its size."""
    shutil.copytree(folder, copy)
    source = torch.Generator().manual_seed(random.Random("another base").randrange(1 << 30))
    for place, value in tensors_in(copy).items():
        if ".lora_" in place.name or place.name.endswith("ranknum"):
            continue
        noise = torch.randn(value.shape, generator=source) * value.float().std().nan_to_num() * 0.01
        write_tensor(copy, place, (value + noise).to(value.dtype))
    return copy


def on_onnx(name: str) -> bool:
    """True for a kind whose base is exported to ONNX here."""
    return KINDS[name].checkpoint is None and KINDS[name].base in _ONNX_BASES
