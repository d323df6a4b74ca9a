"""Publishes adapters to the Hub of hub_server.py, which HF_ENDPOINT names; prints what was seen as JSON.

Run by tests/integrations/test_hub.py in a process of its own, since huggingface_hub reads its settings when it is
imported.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import peft
import torch
from huggingface_hub import HfApi, ModelCard
from packaging.version import Version
from peft import get_peft_model
from project_files import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from softcot_peft import SoftCoTConfig

OWN = "## Words of my own\n\nTrained on a rainy day.\n"
BARE = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)  # transformers 5.24 refuses `add_adapter` before 0.22
PROMPT = "How many legs have seven dogs?"


def order(what: str, **body: str) -> list[dict[str, Any]]:
    """Ask the server for its log, a fault or a gate."""
    with urlopen(Request(f"{os.environ['HF_ENDPOINT']}/_test/{what}", json.dumps(body).encode())) as answer:
        return list(json.load(answer))


def tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Greedy tokens for a prompt."""
    batch = tokenizer(PROMPT, return_tensors="pt")
    return list(model.eval().generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist())


def config(assistant: str) -> SoftCoTConfig:
    return SoftCoTConfig(
        task_type="CAUSAL_LM", assistant_model_name_or_path=assistant, num_thought_tokens=4, init_weights=False
    )


def card(name: str) -> str:
    return str(ModelCard.load(name, ignore_metadata_errors=True))


def trainer_of(model: Any, rows: list[dict[str, Any]], folder: str, name: str) -> Trainer:
    arguments = TrainingArguments(
        folder, hub_model_id=name, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def push_with_peft(found: dict[str, Any], tokenizer: Any) -> None:
    """`PeftModel.push_to_hub`: twice on main, with the user's text between, and on a branch."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("me/base"), config("me/assistant"))
    found["pushed"] = tokens(model, tokenizer)
    order("fault", method="POST", path="preupload", kind="503")
    model.push_to_hub("me/adapter")
    found["first card"] = card("me/adapter")
    HfApi().create_tag("me/adapter", tag="v1")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-3)
    found["changed"] = tokens(model, tokenizer)
    model.push_to_hub("me/adapter", revision="next")
    own = card("me/adapter").replace("<!-- softcot-peft: usage", f"{OWN}\n<!-- softcot-peft: usage")
    HfApi().upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="me/adapter")
    model.push_to_hub("me/adapter", tags=["of-mine"])
    found["second card"] = card("me/adapter")


def push_with_trainer(found: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """`Trainer.push_to_hub`, twice, into a folder with a card by hand."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("me/base"), config("me/assistant"))
    Path("out").mkdir()
    Path("out/README.md").write_text(f"---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\n{OWN}", encoding="utf-8")
    trainer = trainer_of(model, rows, "out", "me/trained")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset="questions about legs", dataset_tags="me/legs")
    found["trainer's first card"] = card("me/trained")
    trainer.push_to_hub(dataset="questions about legs", dataset_tags="me/legs")
    found["trainer's second card"] = card("me/trained")
    found["trained"] = tokens(model, tokenizer)


def push_without_peft_model(found: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """A base with `add_adapter`, pushed by the Trainer and by itself."""
    base = AutoModelForCausalLM.from_pretrained("me/base")
    base.add_adapter(config("me/assistant"))
    trainer_of(base, rows, "bare", "me/bare-trained").push_to_hub()
    found["bare trainer's card"] = card("me/bare-trained")
    found["trained bare"] = tokens(base, tokenizer)
    base.push_to_hub("me/bare")
    found["bare card"] = card("me/bare")


def push_local(found: dict[str, Any], root: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """A base and an assistant that are folders of this machine."""
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = get_peft_model(base, config(str(root / "assistant")))
    found["local"] = tokens(model, tokenizer)
    for name, push in {
        "local": lambda: model.push_to_hub("me/local"),
        "local config": lambda: model.peft_config["default"].push_to_hub("me/local-config"),
        "local trainer": lambda: trainer_of(model, rows, "local-out", "me/local-trained").push_to_hub(),
    }.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            push()
        found[f"{name} warnings"] = [str(warning.message) for warning in caught]
    found["local card"] = card("me/local")
    model.save_pretrained("kept")
    found["kept"] = json.loads(Path("kept/adapter_config.json").read_text(encoding="utf-8"))


def run_page(page: Path) -> None:
    """The code of docs/sharing.md, in its order, with the names of the models that this Hub has."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block.replace("owner/", "me/"), page.name, "exec"), names)


def main(root: Path, output: Path) -> None:
    for name in ("base", "assistant"):
        HfApi().create_repo(f"me/{name}")
        HfApi().upload_folder(repo_id=f"me/{name}", folder_path=root / name)
    tokenizer = AutoTokenizer.from_pretrained("me/base")
    ids = tokenizer(PROMPT)["input_ids"]
    rows = [{"input_ids": ids + ids[:2], "labels": [-100] * len(ids) + ids[:2]}] * 2
    found: dict[str, Any] = {}
    push_with_peft(found, tokenizer)
    push_with_trainer(found, tokenizer, rows)
    if BARE:
        push_without_peft_model(found, tokenizer, rows)
    push_local(found, root, tokenizer, rows)
    run_page(ROOT / "docs" / "sharing.md")
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
