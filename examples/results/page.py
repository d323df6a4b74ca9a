"""`docs/results.md`: what is run, in which words, and the sections one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from blocks import write_block, write_whole

from .figures import save
from .results import Results
from .sections import SECTIONS, summary
from .store import Store
from .work import Sizes

HEAD = """# Results

Written by `make report`, with all its tables and figures; do not edit.

**What this is.** A test of the mechanism on the small pair that comes with the repository (`examples/small_pair.py`):
a base that works out `12+34*5`, and an assistant that can read `twelve plus thirty four times five`. The base was
trained to use hints in digits, so that it has a use for soft thoughts. This is no claim about large models: nothing
here says how much SoftCoT helps them. It shows what the method can pass from one model to another and what not, and
what each rival does with the same base, the same problems and the same number of steps.

**The problems.** Two-step arithmetic that the base solves when it is put in digits, put instead in number **words** or
with **names** that stand for numbers, both of which the assistant has learned and the base has not, or with
**strangers**, names of which neither knows the number.

**The numbers.** Percentages are means over {seeds} seeds, each with training problems, initial weights and held-out
problems of its own. In brackets stands the wider of two 95 % intervals: Student's over the seeds, and Wilson's over
all answers. Decoding is greedy where nothing else is said.

Run with {libraries}, each job on one core.
"""


def write(store: Store, rates: Mapping[str, float], sizes: Sizes, docs: Path) -> None:
    """Write the page and its figures, and the short table into the README beside the folder, if there is one.

    Args:
        store: Holds the results of all jobs.
        rates: Learning rate of each trained system.
        sizes: How much was done.
        docs: Folder of `results.md`; the figures go into its `figures`.
    """
    results = Results(store, rates, sizes)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    parts = [HEAD.format(seeds=len(sizes.seeds), libraries=libraries)]
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    for make in SECTIONS:
        section = make(results)
        parts.append(f"## {section.title}\n\n{section.text.strip()}\n")
        for name, (draw, size, shown) in section.figures.items():
            save(draw, docs / "figures" / name, size)
            parts.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="figures/{name}-dark.png">'
                f'<img alt="{shown}" src="figures/{name}-light.png"></picture>\n'
            )
    readme = docs.parent / "README.md"
    if readme.exists():
        write_block(readme, "results", summary(results))
    write_whole(docs / "results.md", "\n".join(parts))
