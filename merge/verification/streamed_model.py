"""A transformers model whose weights are read from a checkpoint when a forward needs them, and then dropped.

The model is built without weights. A part of it (one decoder layer, a large embedding or head) is loaded when one of
its modules runs. This package's readers read the tensors; transformers converts their names and layouts, and its
quantiser dequantises them, so that every checkpoint that from_pretrained can load can be streamed. Loaded parts stay in
memory up to KEPT_BYTES; every forward reads the others again. The memory for an 8B model is that of its largest part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapter_merge.errors import UnsupportedError

from .live_adapter import quiet_libraries, require
from .own_quantiser import Quantiser, dense_value
from .tensor_sources import Source

KEPT_BYTES = 1 << 30
LARGE_LEAF = 64 << 20  # an embedding or head of at least this size in bytes is a part
WRAPPERS = ("base_layer", "original_module", "token_adapter")  # components that PEFT adds to a module's path
REST = ""  # the part of all modules that belong to no other part

Adjust = Callable[[], None]


def plain_path(path: str) -> str:
    """Return a module's or parameter's path without PEFT's wrappers."""
    plain = path.removeprefix("base_model.model.")
    return ".".join(part for part in plain.split(".") if part not in WRAPPERS)


def skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model that `config` names, in eval mode: parameters on the meta device, buffers computed."""
    require("transformers")
    import transformers

    with quiet_libraries(), torch.no_grad():
        names = getattr(config, "architectures", None) or []
        kind = getattr(transformers, names[0], None) if names else None
        kind = kind or transformers.AutoModelForCausalLM._model_mapping[type(config)]
        with transformers.modeling_utils.ContextManagers(kind.get_init_context(dtype, False, False, False)):
            model: Any = kind(config)
        for path, buffer in list(model.named_buffers()):
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner)._buffers[name] = torch.empty_like(buffer, device="cpu")
        model.initialize_weights()
    return model.eval()  # type: ignore[no-any-return]


def with_placeholders(model: nn.Module) -> nn.Module:
    """Return the skeleton with parameters on the CPU that take no memory.

    Their values are NaN, so that a result that depends on one is NaN. They are not on the meta device, because some
    models move their inputs to the device of the embedding, and PEFT moves its factors to that of the weight.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = nn.Parameter(torch.full((1,), torch.nan, dtype=parameter.dtype).expand(parameter.shape), False)
                empty.is_placeholder = True  # type: ignore[attr-defined]
                module._parameters[name] = empty
    return model


class PartLoader:
    """Loads the parameters of a model from a checkpoint, one part at a time.

    sources: functions that read the stored tensors, by name. quantiser: dequantises them while transformers loads them;
    None: `sources` returns dense tensors.
    """

    def __init__(
        self, config: Any, sources: Mapping[str, Source], dtype: torch.dtype, quantiser: Quantiser | None = None
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.model = cast(Any, skeleton(config, dtype))
        self.config = config
        self.sources = sources
        self.dtype = dtype
        self.parts = _parts(self.model)
        self._quantiser = quantiser
        if quantiser is not None:
            with quiet_libraries():
                quantiser.preprocess_model(model=self.model, dtype=dtype, device_map={"": "cpu"})
        state = self.model.state_dict()
        self._mapping = get_model_conversion_mapping(self.model, None, quantiser)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        self._keys: dict[str, list[str]] = {}
        present = set()
        for key in sources:
            name = rename_source_key(key, renamings, converters, prefix, state)[0]
            if name not in state and key in state:
                name = rename_source_key(key, [], [], prefix, state)[0]
            if name in state:
                self._keys.setdefault(self.part_of(name), []).append(key)
                present.add(name)
        tied: dict[str, str] = self.model.all_tied_weights_keys
        self._tied = {name: source for name, source in tied.items() if name not in present}

    def part_of(self, path: str) -> str:
        """Return the part of the module or parameter at a plain path."""
        while path:
            if path in self.parts:
                return path
            path = path.rpartition(".")[0]
        return REST

    @torch.no_grad()
    def load(self, part: str) -> dict[str, Tensor]:
        """Read every stored parameter and buffer of the part, by its name in the model."""
        names = [name for name in self.model.state_dict() if self.part_of(name) == part]
        tied = {name: self._tied[name] for name in names if name in self._tied}
        keys = [key for part_name in {part, *map(self.part_of, tied.values())} for key in self._keys.get(part_name, ())]
        if tied:  # from the parts of tied weights, only those weights are read
            wanted = {*names, *tied.values()}
            keys = [key for key in keys if key in self._keys.get(part, ()) or self._target(key) in wanted]
        before = dict(self._slots([*names, *tied.values()]))
        converted = self._convert(keys)
        result = {name: converted[tied.get(name, name)] for name in names if tied.get(name, name) in converted}
        for owner, name, value in before.values():
            _put(owner, name, value)
        return result

    def _target(self, key: str) -> str:
        from transformers.core_model_loading import rename_source_key

        state = self.model.state_dict()
        name: str = rename_source_key(key, [], [], self.model.base_model_prefix, state)[0]
        return name

    def _slots(self, names: list[str]) -> Iterator[tuple[str, tuple[nn.Module, str, Tensor]]]:
        for path in names:
            owner, _, name = path.rpartition(".")
            module = self.model.get_submodule(owner)
            yield path, (module, name, getattr(module, name))

    def _convert(self, keys: list[str]) -> dict[str, Tensor]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tensors = {key: self.sources[key]() for key in keys}
        missing = set(self.model.state_dict())
        with quiet_libraries():
            info, _ = convert_and_load_state_dict_in_model(
                model=self.model,
                state_dict=tensors,
                load_config=LoadStateDictConfig(
                    dtype=self.dtype, weight_mapping=self._mapping, hf_quantizer=self._quantiser
                ),
            )
        if info.conversion_errors or info.error_msgs:
            raise UnsupportedError(f"transformers cannot load this checkpoint: {next(iter(info.conversion_errors))}")
        loaded = missing - set(info.missing_keys) - {name for name, *_ in info.mismatched_keys}
        slots = self._slots(sorted(loaded))
        return {path: dense_value(module, value, self.dtype) for path, (module, _, value) in slots}


def _put(owner: nn.Module, name: str, value: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
    else:
        owner._buffers[name] = value


def _parts(model: nn.Module) -> set[str]:
    """Return the plain paths of the parts: elements of outermost module lists, large embeddings and heads."""
    paths: set[str] = set()
    lists: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters()):
            lists.append(path)
            paths |= {f"{path}.{index}" for index in range(len(module))}
        elif isinstance(module, nn.Linear | nn.Embedding) and module.weight.nbytes >= LARGE_LEAF:
            paths.add(path)
    return paths


class StreamedModel:
    """A model whose placeholders are replaced by the parameters of `loader` when a forward needs them.

    model: the result of `with_placeholders`, to which PEFT may have added an adapter; other parameters stay. adjust:
    functions to call once a part is loaded, by the plain path of a module in the part.
    """

    def __init__(self, model: nn.Module, loader: PartLoader, adjust: Mapping[str, Adjust] | None = None) -> None:
        gc.collect()  # frees earlier models, which refer to themselves through their hooks
        self.model = model
        self._loader = loader
        self._adjust: dict[str, list[Adjust]] = {}
        for path, run in (adjust or {}).items():
            self._adjust.setdefault(loader.part_of(path), []).append(run)
        self._slots: dict[str, list[tuple[nn.Module, str, nn.Parameter, str]]] = {}
        for prefix, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if hasattr(parameter, "is_placeholder"):
                    plain = plain_path(f"{prefix}.{name}" if prefix else name)
                    self._slots.setdefault(loader.part_of(plain), []).append((module, name, parameter, plain))
                else:
                    parameter.data = (
                        parameter.data.to(loader.dtype) if parameter.is_floating_point() else parameter.data
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(loader.dtype)
            part = loader.part_of(plain_path(prefix))
            if part != REST:
                module.register_forward_pre_hook(lambda *_, part=part: self.hold(part))
        self._held: dict[str, int] = {}
        self._temporary: str | None = None
        self.hold(REST)

    @torch.no_grad()
    def hold(self, part: str) -> None:
        """Load the part's weights; drop the part that was loaded last, unless it stays in memory."""
        if part in self._held or part == self._temporary:
            return
        if self._temporary is not None:
            self._drop(self._temporary)
            self._temporary = None
        values = self._loader.load(part)
        size = sum(value.nbytes for value in values.values())
        for module, name, empty, plain in self._slots.get(part, ()):
            value = values.get(plain)
            if value is not None and value.shape == empty.shape:  # a head that the checkpoint lacks stays NaN
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for path, module in self.model.named_modules():
            for name in module._buffers:
                saved = values.get(plain_path(f"{path}.{name}"))
                if saved is not None:
                    module._buffers[name] = saved
        for run in self._adjust.get(part, ()):
            run()
        if part == REST or sum(self._held.values()) + size <= KEPT_BYTES:
            self._held[part] = size
        else:
            self._temporary = part

    def hold_module(self, path: str) -> None:
        """Load the weights of the module at `path`."""
        self.hold(self._loader.part_of(plain_path(path)))

    @torch.no_grad()
    def hold_all(self) -> None:
        """Load every weight permanently."""
        for part in self._slots:
            self.hold(part)
            self._held.setdefault(part, 0)
            self._temporary = None

    def _drop(self, part: str) -> None:
        for module, name, empty, _ in self._slots.get(part, ()):
            module._parameters[name] = empty
