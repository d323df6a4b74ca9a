"""Run the notebooks beside this file from top to bottom and store them with their outputs; `make notebooks` calls it.

Progress bars and messages of libraries are left out, so that outputs change only with what they show. Each notebook
keeps a hash of its code, which a test compares: run this again after changing a code cell.

    python examples/notebooks/execute.py
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NAMES = ("train.ipynb", "serve.ipynb")  # in this order: the second uses the adapter that the first one saves
WIDGET = "application/vnd.jupyter.widget-view+json"


def code_hash(notebook: Any) -> str:
    """Return a hash of a notebook's code cells."""
    code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = "\n\n".join(source if isinstance(source, str) else "".join(source) for source in code)
    return hashlib.sha256(text.encode()).hexdigest()


def is_kept(output: Any) -> bool:
    """Return whether an output is neither a message of a library nor a progress bar."""
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def tidy(outputs: list[Any]) -> list[Any]:
    """Join the outputs that were printed one after the other, without lines of loggers and times."""
    tidied: list[Any] = []
    for output in filter(is_kept, outputs):
        if output.output_type == "stream":
            output.text = re.sub(r"^\[\d{4}-\d\d-\d\d .*\n", "", output.text, flags=re.MULTILINE)
            if tidied and tidied[-1].output_type == "stream":
                tidied[-1].text += output.text
                continue
            if not output.text:
                continue
        elif "text/html" in output.get("data", {}):  # the times of a training
            output.data["text/html"] = re.sub(r"(\[\d+/\d+) [\d:]+,", r"\1,", output.data["text/html"])
        tidied.append(output)
    return tidied


def clean(notebook: Any) -> None:
    """Remove from outputs what differs from run to run or belongs to the machine."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {
        "kernelspec": kernel,
        "language_info": {"name": "python"},
        "softcot_peft": {"code": code_hash(notebook)},
    }


def main() -> None:
    """Run and store all notebooks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in NAMES:
        notebook = nbformat.read(HERE / name, as_version=4)
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(HERE)}}).execute()
        clean(notebook)
        nbformat.validate(notebook)
        text = nbformat.writes(notebook)
        for place in (str(HERE.resolve().parents[1]), str(Path.home())):
            if place in text:
                raise ValueError(f"{name} must not show a folder of this machine, but shows {place!r}.")
        (HERE / name).write_text(text.rstrip() + "\n", encoding="utf-8")
        print(f"ran {name}")


if __name__ == "__main__":
    main()
