"""DCFT in PEFT: train it as any other method, and merge, factor, verify or serve what save_pretrained writes.

    from adapter_merge.peft import DCFTConfig            # registers DCFT with PEFT (0.21 or newer)
    from peft import get_peft_model

    model = get_peft_model(model, DCFTConfig(kernel_size=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ...                                                  # transformers' Trainer, TRL, an own loop
    model.save_pretrained("adapter")                     # adapter-merge merge BASE adapter -o merged

PEFT's register_peft_method accepts the names of its own list of types only, so the rows of the three tables that it
fills are set here: no class or function of PEFT is changed. PeftModel.from_pretrained then reads DCFT folders too.
"""

from __future__ import annotations

from adapter_merge.errors import MissingDependencyError
from adapter_merge.files.installation import install_command

try:
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise MissingDependencyError("training DCFT needs peft", hint=install_command("verify")) from error

if not hasattr(BaseTuner, "_get_adapter_state_dict"):
    raise MissingDependencyError(
        "this PEFT saves only the types of its own list", expected="peft 0.21 or newer", hint="pip install -U peft"
    )

from .config import PEFT_TYPE, DCFTConfig
from .layer import DCFTLinear
from .model import DCFTModel

__all__ = ["DCFTConfig", "DCFTLinear", "DCFTModel"]

_TABLES = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, DCFTConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, DCFTModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, DCFTModel.prefix),
)
if any(PEFT_TYPE in table for table, _ in _TABLES):
    raise MissingDependencyError(
        "PEFT holds a method called DCFT already", expected="a PEFT without one", hint="use that method, or peft 0.21"
    )
for _table, _row in _TABLES:
    _table[PEFT_TYPE] = _row
