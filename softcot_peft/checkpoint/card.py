"""The section of a model card that shows how to load the adapter. Independent of models."""

from __future__ import annotations

from pathlib import Path

_HEADING = "## Loading this SoftCoT adapter"


def write_usage(card: Path, base: str | None, assistant: str | None) -> None:
    """Add the loading section to a model card unless it is already there."""
    text = card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n"
    if _HEADING in text:
        return
    usage = f"""
{_HEADING}

`pip install softcot-peft`, then import it before the adapter is loaded; without the import PEFT does not know the
method and raises `KeyError: 'SOFTCOT'`.

```python
import softcot_peft  # registers the method
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base or "the base model"!r})
model = PeftModel.from_pretrained(base, "this repository or folder")
```

The frozen assistant is `{assistant}`.
"""
    card.write_text(text.rstrip("\n") + "\n" + usage, encoding="utf-8")
