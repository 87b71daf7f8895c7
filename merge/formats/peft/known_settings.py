"""The keys of PEFT's config classes (0.21), by peft_type: read, without effect on the weights, or refused when set.

Sources: peft.config, peft.tuners.{lora,adalora,lokr,loha,vera,trainable_tokens}.config. Keys of older releases:
enable_lora and merge_weights (before 0.3). lora_dtype, lorap_lr_ratio and lorap_emb_lr are ms-swift's additions: the
dtype of the factors (known from the tensors) and learning rates.
"""

from __future__ import annotations

from adapter_merge.formats.known_settings import KnownSettings

_BASIC_READ = ("peft_type", "base_model_name_or_path", "modules_to_save")
_BASIC_IGNORED = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ),  # targeting.py compares these with the tensors
)
_LORA_IGNORED = (
    *("lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "merge_weights"),
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),  # init_lora_weights states whether they were used
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
)
_LORA_REFUSED = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (its delta depends on the prompt)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
    "enable_lora": "LoRA of some parts of a fused layer",
}
_LORA_ONLY = {
    "use_dora": "DoRA with AdaLoRA",
    "use_rslora": "rsLoRA with AdaLoRA",
    "alpha_pattern": "alpha_pattern with AdaLoRA",
    "target_parameters": "target_parameters with AdaLoRA",
    "trainable_token_indices": "trained tokens with AdaLoRA",
    "ensure_weight_tying": "tied embeddings with AdaLoRA",
}
_ADALORA_IGNORED = (
    *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("rank_pattern", "init_lora_weights"),  # the ranks, known from the tensors; A and B start at random
)
_LYCORIS_READ = ("r", "alpha", "rank_pattern", "alpha_pattern")
_LYCORIS_IGNORED = ("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")


def _make_settings(*read: str, ignored: tuple[str, ...] = (), refused: dict[str, str] | None = None) -> KnownSettings:
    return KnownSettings(
        frozenset((*_BASIC_READ, *read)), frozenset((*_BASIC_IGNORED, *ignored)), refused if refused is not None else {}
    )


BIASES = (None, "none", "all", "lora_only")  # which biases were trained: they are among the tensors

PEFT_SETTINGS = {
    "LORA": _make_settings(
        *("r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern"),
        *("bias", "fan_in_fan_out", "target_parameters", "trainable_token_indices", "ensure_weight_tying", "lora_bias"),
        ignored=_LORA_IGNORED,
        refused=_LORA_REFUSED,
    ),
    "ADALORA": _make_settings(
        *("init_r", "lora_alpha", "bias", "fan_in_fan_out"),
        ignored=(*_LORA_IGNORED, *_ADALORA_IGNORED, "lora_bias"),
        refused=_LORA_REFUSED | _LORA_ONLY,
    ),
    "LOKR": _make_settings(
        *_LYCORIS_READ,
        ignored=(*_LYCORIS_IGNORED, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    ),
    "LOHA": _make_settings(*_LYCORIS_READ, ignored=_LYCORIS_IGNORED),
    "VERA": _make_settings(
        *("r", "projection_prng_key", "bias", "fan_in_fan_out"),
        ignored=("save_projection", "vera_dropout", "d_initial", "init_weights"),
    ),
    "TRAINABLE_TOKENS": _make_settings("token_indices", ignored=("init_weights",)),
}
