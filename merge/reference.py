"""The adapter as it was trained: a live, unmerged model to hold every artefact against.

PEFT folders run in PEFT itself. DCFT and DuDe folders of our own, which PEFT cannot read, run from their
papers' forward formulas, written here without the canonical form that the rest of the project is built on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .binding import BoundAdapter
from .combining import CombinedBound
from .dcft import RANKNUM_EPSILON, DcftModule
from .errors import MissingDependencyError, UnsupportedError
from .headers import TensorRef
from .lora import LoraModule
from .tensors import TORCH_DTYPES, read_tensor

Forward = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]  # (layer, its own forward, x) -> y


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers and PEFT without progress bars, log lines and warnings about what we check ourselves."""
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


def require(*packages: str) -> None:
    """Raise MissingDependencyError for each of `packages` that is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"running a model needs {' and '.join(missing)}", hint="pip install 'adapter-merge[verify]'"
        )


def load_model(folder: Any, config: Any = None) -> nn.Module:
    """The transformers model in `folder`, of the class that its config names, in its own dtype, in eval mode."""
    require("transformers")
    import transformers

    with quiet_libraries():
        config = config or transformers.AutoConfig.from_pretrained(folder)
        names = getattr(config, "architectures", None) or []
        kind = getattr(transformers, names[0], None) if names else None
        loader = kind or transformers.AutoModelForCausalLM
        model: nn.Module = loader.from_pretrained(folder, config=config, dtype="auto")
    return model.eval()


def trained_model(bound: BoundAdapter, dtype: torch.dtype = torch.float32, base: nn.Module | None = None) -> nn.Module:
    """The base with the adapter live in it, unmerged, computing in `dtype`; of several adapters their combination.

    The base is loaded in its own dtype first, so that PiSSA's and DuDe's residual is rounded as at training. `base`:
    another model to put it into, which is used up.
    """
    if isinstance(bound, CombinedBound):
        from .combined_reference import combined_model

        return combined_model(bound, dtype)
    model = load_model(bound.base.folder, model_config(bound)) if base is None else base
    replace_tensors(model, bound.replacements)
    if bound.adapter.format == "PEFT folder":
        return with_heads(_in_peft(model, bound).to(dtype), bound.replacements).eval()
    for item in bound.modules:
        layer = model.get_submodule(_module_path(model, item.module.name))
        if isinstance(item.module, DcftModule):
            run = _dcft_forward(item.module, dtype)
        elif isinstance(item.module, LoraModule):
            run = _dude_forward(item.module, layer, dtype)
        else:
            raise UnsupportedError(f"no reference forward for {bound.adapter.format} ({bound.adapter.method})")
        _install(layer, run)
    return with_heads(model.to(dtype), bound.replacements).eval()


def model_config(bound: BoundAdapter) -> Any:
    """The base's transformers config with as many labels as the adapter's head has."""
    require("transformers")
    import transformers

    with quiet_libraries():
        return transformers.AutoConfig.from_pretrained(bound.base.folder)


def replace_tensors(model: nn.Module, replacements: dict[str, TensorRef]) -> None:
    """Put trained heads and biases into the model."""
    state = model.state_dict()
    for name, ref in replacements.items():
        if name not in state:
            raise UnsupportedError(f"{name}: the model class {type(model).__name__} has no such tensor")
        state[name].copy_(read_tensor(ref))


@torch.no_grad()
def with_heads(model: nn.Module, heads: Mapping[str, TensorRef]) -> nn.Module:
    """The model with trained heads and biases in its own precision: a base in half precision has rounded them.

    PEFT keeps them beside the base's.
    """
    named = {_plain(name): parameter for name, parameter in model.named_parameters()}
    for name, ref in heads.items():
        if name in named and named[name].shape == ref.shape:
            named[name].copy_(read_tensor(ref))
    return model


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts into it; of a head, the copy that is in use."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if ".original_module." in plain:
        return name
    return plain.replace(".modules_to_save.default.", ".")


def _module_path(model: nn.Module, name: str) -> str:
    """The adapter's module path in this model: as it is, or with one leading component more or less."""
    paths: set[str] = {path for path, _ in model.named_modules()}
    if name in paths:
        return name
    _, _, shorter = name.partition(".")
    longer = [path for path in paths if path.partition(".")[2] == name]
    if shorter in paths:
        return shorter
    if len(longer) == 1:
        return str(longer[0])
    raise UnsupportedError(f"{name}: the model class {type(model).__name__} has no such module")


def live_layer(model: nn.Module, name: str) -> nn.Module:
    """The adapted layer `name` of a live model (`trained_model`)."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    assert isinstance(inner, nn.Module)
    return inner.get_submodule(_module_path(inner, name))


def is_embedding(layer: nn.Module) -> bool:
    """True for a layer that takes token ids."""
    get_base_layer = getattr(layer, "get_base_layer", None)
    inner = get_base_layer() if callable(get_base_layer) else layer
    return isinstance(inner, nn.Embedding)


def _in_peft(model: nn.Module, bound: BoundAdapter) -> nn.Module:
    require("peft")
    import peft

    with quiet_libraries():
        config = peft.PeftConfig.from_pretrained(str(bound.adapter.folder))
        if bound.base_kind == "residual":
            config.init_lora_weights = True  # the base is what PEFT would compute
        config.inference_mode = True
        loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(bound.adapter.folder), config=config)
    return loaded


def _install(layer: nn.Module, run: Forward) -> None:
    plain = layer.forward
    layer.forward = lambda x: run(layer, plain, x)


def _dcft_forward(module: DcftModule, dtype: torch.dtype) -> Forward:
    """y = plain(x) + (x Delta) alpha / (ranknum + 1e-5), Delta = conv_transpose2d(A^T B^T, C) of shape (in, out)."""
    image = read_tensor(module.a).to(dtype).mT @ read_tensor(module.b).to(dtype).mT  # (in/k0, out/k1), of each channel
    number = module.ranknum if isinstance(module.ranknum, float) else float(read_tensor(module.ranknum).reshape(-1)[0])
    bias = None if module.bias is None else read_tensor(module.bias).to(dtype)
    image = image.reshape(1, module.c.shape[0], *image.shape[-2:])
    delta = torch.nn.functional.conv_transpose2d(image, read_tensor(module.c).to(dtype), bias, stride=module.stride)[
        0, 0
    ]
    scale = module.alpha / (number + RANKNUM_EPSILON)

    def run(layer: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return plain(x) + (x @ delta) * scale

    return run


def _dude_forward(module: LoraModule, layer: nn.Module, dtype: torch.dtype) -> Forward:
    """y = m / rownorm(W_f + s B A) * (x W_f^T + s x A^T B^T) + bias, with W_f = round(W0 - s B0 A0)."""
    a, b = read_tensor(module.a).to(dtype), read_tensor(module.b).to(dtype)
    turned = type(layer).__name__ == "Conv1D"
    assert isinstance(layer.weight, Tensor)
    frozen = layer.weight.detach().to(dtype)
    frozen = frozen.T if turned else frozen
    if module.initial is not None:
        assert module.initial.a is not None and module.initial.b is not None and module.initial.dtype is not None
        a0, b0 = read_tensor(module.initial.a).to(dtype), read_tensor(module.initial.b).to(dtype)
        frozen = (frozen - module.scale * (b0 @ a0)).to(TORCH_DTYPES[module.initial.dtype]).to(dtype)
    norm = torch.linalg.vector_norm(frozen + module.scale * (b @ a), dim=1)
    magnitude = norm if module.magnitude is None else read_tensor(module.magnitude).to(dtype)
    scale = magnitude / norm

    def run(layer: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y: Tensor = scale * (x @ frozen.T + module.scale * (x @ a.T) @ b.T)
        bias = layer.bias
        return y + bias if isinstance(bias, Tensor) else y

    return run
