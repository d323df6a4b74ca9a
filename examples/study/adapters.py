"""Copies the study's adapters of pairs A and B to a folder that anyone can load from.

Their cards name the public models, the data, the score, the controls, and how the models' weights were made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from blocks import write_whole
from results.sections import table

from softcot_peft import prepare_for_hub
from softcot_peft.analysis import CONTROLS as LABELS

from .final import ALL_CONTROLS
from .found import Found
from .jobs import PAIRS, Evaluation
from .made import Setting, weights_file
from .short import evaluated
from .tasks import question_text

PUBLISHED = ("A", "B")
CARD = """---
datasets:
- openai/gsm8k
language:
- en
license: apache-2.0
---
# SoftCoT for {base}, with {assistant} as assistant

The adapter of pair {pair} of the project's study of real models, seed {seed}: {thoughts} thoughts, {steps} training
steps of {batch} rows of GSM8K. {rationales}

**{verdict}**: {gain} points against the base alone, paired. It is here to be loaded, inspected and compared with:

{scores}
Greedy decoding, {asked} test questions of GSM8K, in bfloat16. The rows below SoftCoT have other vectors in the place
of the thoughts.{note}

The assistant reads what stands between `{first}` and `{last}` of the prompt, a single user turn in the base's chat
template:

```text
{prompt}
```
"""
OWN = "The rows are right answers of the base itself, one sample per training question at temperature 0.7."
HUMAN = "The rows are the data set's own answers."


def public(name: str, hub: str) -> str:
    """Return a model's Hub id if the name is that of its folder, else the name."""
    return hub if hub.rpartition("/")[2].lower().startswith(Path(name).name.lower()) else name


def scores(found: Found, pair: str, tuned: Evaluation) -> str:
    """Return the table of right answers of the adapter, of the base alone and of the controls."""
    rows = {"base alone": evaluated(found, pair, "zero-shot")[:1], "SoftCoT": [tuned]}
    rows |= {f"SoftCoT, {LABELS[each]}": evaluated(found, pair, "SoftCoT", each)[:1] for each in ALL_CONTROLS}
    known = [[name, share] for name, jobs in rows.items() if (share := found.share(jobs)) is not None]
    return table(["system", "right, % [95 % interval]"], known)


def publish(found: Found, setting: Setting, hub: Mapping[str, str], folder: Path, note: str = "") -> list[Path]:
    """Copy the first seed's adapters, and return their folders.

    Args:
        found: The results.
        setting: The models, and the store with the weights.
        hub: Hub id of each size of model, used for models whose folders have its name.
        folder: Folder of the adapters.
        note: A sentence about the models.

    Raises:
        ValueError: An adapter is not in the store.
    """
    made = []
    for pair in (each for each in PUBLISHED if each in found.final.pairs):
        tuned = evaluated(found, pair, "SoftCoT")[0]
        job = tuned.training
        if job is None or tuned not in found.store or not (trained := weights_file(job, setting).parent).is_dir():
            raise ValueError(f"The final part must be finished, with its weights, but pair {pair}'s are missing.")
        base, assistant = (public(setting.models[size], hub[size]) for size in PAIRS[pair])
        target = folder / f"gsm8k-{Path(base).name.lower()}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained / "adapter" / "adapter_model.safetensors", target / "adapter_model.safetensors")
        config = json.loads((trained / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base, "assistant_model_name_or_path": assistant}
        write_whole(target / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
        gain = found.difference(tuned, evaluated(found, pair, "zero-shot"))
        first, last = (text.strip() for text in config["assistant_prompt_between"])
        text = CARD.format(
            base=Path(base).name,
            assistant=Path(assistant).name,
            pair=pair,
            seed=job.seed,
            thoughts=job.thoughts,
            steps=job.steps,
            batch=job.batch,
            rationales=OWN if job.rationales == "own" else HUMAN,
            verdict="Its gain is beyond chance" if gain and gain.low > 0 else "It gains nothing that can be measured",
            gain=gain,
            scores=scores(found, pair, tuned),
            asked=len(found.store[tuned]["right"]),
            note=f" {note}" if note else "",
            first=first,
            last=last,
            prompt=question_text("gsm8k", {"question": "QUESTION"}),
        )
        write_whole(target / "README.md", text)
        prepare_for_hub(target)
        made.append(target)
    return made
