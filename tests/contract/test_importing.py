"""Importing the package registers the method and changes nothing else."""

from __future__ import annotations

import subprocess
import sys

from softcot_peft import SoftCoTConfig

_IMPORT = """
import sys, types
import peft, peft.peft_model, transformers, transformers.modeling_utils, transformers.integrations.peft
import accelerate, torch, huggingface_hub, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Cache
OURS = "softcot_peft"
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "transformers", "accelerate", "torch", "huggingface_hub", "safetensors"):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type):
                    found.update({(name, key, inner): v for inner, v in list(vars(value).items())})
    return found
before = snapshot()
import softcot_peft
after = snapshot()
changed = [k for k in before if k[-1] not in ("__abstractmethods__", "_abc_impl") and after.get(k) is not before[k]]
added = [k for k, v in after.items() if k not in before and (getattr(v, "__module__", "") or "").startswith(OURS)]
print(sorted(map(str, changed + added)))
"""


def test_importing_the_package_changes_nothing_in_other_libraries() -> None:
    found = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"


def test_the_enum_and_the_registries_alone_know_the_method() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SOFTCOT] is SoftCoTConfig
