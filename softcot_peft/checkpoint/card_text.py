"""The text blocks of a model card that this package writes."""

from __future__ import annotations

import json

from .card_facts import CardFacts
from .local_names import PREFIX

_PLACE = "this repository or folder"  # where the repository is unknown
_BASE = "the base model"


def note(facts: CardFacts) -> str:
    """Return the lines under the title: what to install and import, and what happens without."""
    base = f" for [{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    return f"""\
A [SoftCoT](https://arxiv.org/abs/2502.12134) adapter{base}.

**Import `softcot_peft` before you load it.** Without the import, PEFT raises `KeyError: 'SOFTCOT'`.

```bash
pip install softcot-peft
```

```py
import softcot_peft  # registers the method with PEFT
```"""


def usage(facts: CardFacts) -> str:
    """Return the section on models, `PeftModel`, pipelines and servers."""
    parts = [_models(facts), _peft_model(facts), _pipeline(facts), _server(facts)]
    return "## How to use\n\n" + "\n\n".join(part for part in parts if part)


def _models(facts: CardFacts) -> str:
    def row(role: str, name: str, revision: str | None) -> str:
        return f"| {role} | {name} | {f'`{revision}`' if revision else ''} |"

    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "a local folder of the author's"
    if facts.assistant is None:
        named = {"assistant": "a local folder of the author's", "base": "none: the base reads the prompt"}
        reader = named.get(facts.source, f"thought source `{facts.source}`")
    elif facts.assistant.startswith(PREFIX):
        reader = f"a local folder of the author's, `{facts.assistant}`"
    elif facts.assistant_is_given:
        reader = f"passed with `use_assistant`, as `{facts.assistant}`"
    else:
        reader = f"[{facts.assistant}](https://huggingface.co/{facts.assistant})"
    rows = [row("base", base, facts.base_revision), row("assistant", reader, facts.assistant_revision)]
    return "\n".join(["| | model | revision |", "| --- | --- | --- |", *rows])


def _register(facts: CardFacts) -> str:
    if not facts.assistant_is_given:
        return ""
    return f'softcot_peft.use_assistant(assistant, assistant_tokenizer, name="{facts.assistant}")  # load them first\n'


def _base_arguments(facts: CardFacts) -> str:
    revision = f", revision={facts.base_revision!r}" if facts.base_revision else ""
    return f"{facts.base or _BASE!r}{revision}".replace("'", '"')


def _adapter_arguments(facts: CardFacts) -> str:
    subfolder = f', subfolder="{facts.subfolder}"' if facts.subfolder else ""
    return f'"{facts.repo_id or _PLACE}"{subfolder}'


def _peft_model(facts: CardFacts) -> str:
    base = _base_arguments(facts)
    return f"""\
### PeftModel

```python
import softcot_peft  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{_register(facts)}tokenizer = AutoTokenizer.from_pretrained({base})
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {_adapter_arguments(facts)})
batch = tokenizer({json.dumps(facts.prompt, ensure_ascii=False)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))
```"""


def _pipeline(facts: CardFacts) -> str:
    arguments = _base_arguments(facts)
    subfolder = f', adapter_kwargs={{"subfolder": "{facts.subfolder}"}}' if facts.subfolder else ""
    return f"""\
### Pipeline

```python
import softcot_peft  # registers the method with PEFT
from transformers import pipeline

{_register(facts)}pipe = pipeline("text-generation", model={arguments})
pipe.model.load_adapter("{facts.repo_id or _PLACE}"{subfolder})
print(pipe({json.dumps(facts.prompt, ensure_ascii=False)}, max_new_tokens=64)[0]["generated_text"])
```"""


def _server(facts: CardFacts) -> str:
    if facts.source != "assistant" or facts.num_chains > 1 or facts.assistant_is_given:
        return ""  # the server has no way to run these
    revision = f" --revision {facts.base_revision}" if facts.base_revision else ""
    return f"""\
### Server

The vLLM plugin imports the package itself. Requests choose the adapter with `"model": "thoughts"`.

```bash
pip install "softcot-peft[vllm]"
export VLLM_PLUGINS=softcot SOFTCOT_ADAPTERS="thoughts={facts.repo_id or "REPOSITORY-OR-FOLDER"}"
vllm serve {facts.base or "BASE"}{revision} --enable-prompt-embeds
```"""
