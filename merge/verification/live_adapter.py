"""The adapter as trained: a live, unmerged model, the reference of every comparison.

PEFT folders run in PEFT itself. Methods that PEFT does not have run by the forward formula of their paper or project,
which forward_formulas.py implements without the canonical form.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import MissingDependencyError, UnsupportedError
from adapter_merge.files.installation import install_command
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.module_paths import match_module_paths
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars, log lines and warnings of transformers and PEFT about facts that adapter-merge checks."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def require(*packages: str, extra: str = "verify") -> None:
    """Raise MissingDependencyError for each of `packages` that is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"running a model needs {' and '.join(missing)}", hint=install_command(extra))


def load_model(model: Any, config: Any = None) -> nn.Module:
    """Return the transformers model of the config's class, in the checkpoint's dtype, in eval mode.

    model: a folder, or a Checkpoint. A quantised checkpoint is loaded from its dequantised weights.
    """
    require("transformers")
    import transformers

    base = model if isinstance(model, Checkpoint) else open_base(model)
    folder = base.folder
    with quiet_libraries():
        config = config or model_config(folder)
        names = getattr(config, "architectures", None) or []
        kind = getattr(transformers, names[0], None) if names else None
        loader = kind or transformers.AutoModelForCausalLM
        if base.stored is None:
            loaded: nn.Module = loader.from_pretrained(folder, config=config, dtype="auto")
        else:
            state = {name: read_tensor(ref) for name, ref in base.tensors.items()}
            loaded = loader.from_pretrained(None, config=config, state_dict=state, dtype="auto")
    return loaded.eval()


def require_tokens(folder: Path) -> None:
    """Raise UnsupportedError for a model that needs other inputs than token ids, such as images or speech."""
    require("transformers")
    import transformers

    config = model_config(folder)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    main_input = getattr(kind, "main_input_name", "input_ids")
    if main_input != "input_ids" or not hasattr(config.get_text_config(), "vocab_size"):
        raise UnsupportedError(
            f"{folder}: logits are compared on text, and this model takes other inputs",
            expected="input_ids",
            got=str(main_input),
            hint="compare only weights: verify --weights-only, factor without --end-to-end",
        )


def adapted_model(bound: BoundAdapter, dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """Return `model` with the live, unmerged PEFT adapter, computing in `dtype`; `model` is changed in place."""
    return with_heads(_load_in_peft(model, bound).to(dtype), bound.replacements).eval()


def model_config(folder: Any) -> Any:
    """Return the transformers config in `folder`, without a quantization_config.

    Experts run one after the other (experts_implementation "eager"): transformers' default uses a kernel of torch that
    does not support float64 (transformers/integrations/moe.py, grouped_mm).
    """
    require("transformers")
    import transformers

    with quiet_libraries():
        config: Any = transformers.AutoConfig.from_pretrained(folder)
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    config._experts_implementation = "eager"
    return config


@torch.no_grad()
def with_heads(model: nn.Module, heads: Mapping[str, TensorRef]) -> nn.Module:
    """Return the model with trained heads and biases in their stored precision.

    PEFT stores them beside those of the base, and loads them in the base's dtype, which may be a half precision.
    """
    named = {_plain(name): parameter for name, parameter in model.named_parameters()}
    for name, ref in heads.items():
        if name in named and named[name].shape == ref.shape:
            named[name].copy_(read_tensor(ref))
    return model


def _plain(name: str) -> str:
    """Return a parameter's name without PEFT's wrappers; for a head, the name of the trained copy."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if ".original_module." in plain:
        return name
    return plain.replace(".modules_to_save.default.", ".")


def module_path(model: nn.Module, name: str) -> str:
    """Return the adapter's module path in this model (module_paths.py). Raises UnsupportedError where it has none."""
    path = match_module_paths([name], (path for path, _ in model.named_modules())).get(name)
    if path is not None:
        return path
    raise UnsupportedError(f"{name}: the model class {type(model).__name__} has no such module")


@torch.no_grad()
def continued(model: nn.Module, ids: Tensor, count: int, *, exact_count: bool = False) -> Tensor:
    """Return ids (B, T) followed by `count` greedy tokens; fewer where the answer ends, unless exact_count."""
    with quiet_libraries():
        result: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            min_new_tokens=count if exact_count else None,
            max_new_tokens=count,
            pad_token_id=0,
        )
    return result


def generates(model: nn.Module) -> bool:
    """Return True for a model that generates text."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


def live_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the adapted layer `name` of a live model (`adapted_model`)."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    assert isinstance(inner, nn.Module)
    return inner.get_submodule(module_path(inner, name))


def innermost(layer: nn.Module) -> nn.Module:
    """Return the model's layer inside PEFT's wrappers."""
    while True:
        inner = getattr(layer, "base_layer", None) or getattr(layer, "token_adapter", None)
        if not isinstance(inner, nn.Module):
            return layer
        layer = inner


def is_embedding(layer: nn.Module) -> bool:
    """Return True for a layer that takes token ids."""
    return isinstance(innermost(layer), nn.Embedding)


def peft_config(folder: Path, *, plain: bool) -> Any:
    """Return PEFT's config of the adapter in `folder`; with `plain`, its initialisation does not change the base.

    This is set before the config is built, because PEFT requires scipy for a config that states LoftQ.
    """
    import peft

    stated = peft.PeftConfig.from_json_file(str(folder / "adapter_config.json"))
    if plain and "init_lora_weights" in stated:
        stated["init_lora_weights"] = True
    return peft.PeftConfig.from_peft_type(**peft.PeftConfig.check_kwargs(**stated))


def _load_in_peft(model: nn.Module, bound: BoundAdapter) -> nn.Module:
    """Return the model with the adapter loaded by PEFT."""
    require("peft")
    import peft

    with quiet_libraries():
        config = peft_config(
            bound.adapter.folder, plain=bound.base_kind == "residual"
        )  # the base is already the residual
        config.inference_mode = True
        loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(bound.adapter.folder), config=config)
    return loaded
