"""A training step in two passes: prompts into a cache without gradient, then thoughts and responses with it.

The base is frozen, so no gradient comes from what stands before the thoughts: neither activations nor logits are
needed there. Knows the base's own forward and how its arguments are laid out, and nothing about adapters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ._compat import (
    CACHE_NAME,
    CACHE_NAMES,
    cache_length,
    checkpoints,
    find_cache,
    holds_attention_alone,
    is_whole,
    rotary_switch,
)
from .columns import insert, take
from .head_loss import HeadLoss
from .inputs import PER_TOKEN_OUTPUTS
from .late_logits import LateLogits
from .placement import IGNORED, Placement, positions, prompts

_LOGGER = logging.getLogger(__name__)
# Arguments that can be divided between the passes, or say nothing about a token.
_DIVIDED = ("input_ids", "attention_mask", "labels")
_ROUNDING, _ROUNDING_OF_HALVES = 1e-3, 0.1  # relative; TF32 rounds as coarsely as float16

Run = Callable[[dict[str, Any], "Rows", Tensor | None], Any]
InOnePass = Callable[[dict[str, Any], Placement, Tensor], Any]


@dataclass(frozen=True)
class Rows:
    """A batch's rows, each cut in two.

    Args:
        prompt: Arguments of the first pass, over `(B, P)` tokens of prompts.
        rest: Arguments of the second pass, over `(B, W)` placed columns: all thoughts, and what stands behind them.
        labels: `(B, W)`.
        whole_prompts: Arguments of a pass over all of the prompts in the caller's columns.
        cut: The placed column in which each row's rest begins, `(B,)`; at its thoughts or before.
        placement: Where the thoughts stand in the caller's columns.
        length: The caller's columns L.
        predicts: Which columns of the rest, as `(B * W)`, predict a label, `(T,)`.
        targets: These labels, `(T,)`.
        head: Computes the loss in the place of the base's head; `None`: the base does.
    """

    prompt: dict[str, Tensor]
    rest: dict[str, Tensor]
    labels: Tensor
    whole_prompts: dict[str, Tensor]
    cut: Tensor
    placement: Placement
    length: int
    predicts: Tensor
    targets: Tensor
    head: HeadLoss | None = None

    @property
    def shape(self) -> torch.Size:
        """`(B, W)`."""
        return self.labels.shape

    @property
    def skipped(self) -> int:
        """Columns from the rest's beginning that predict no label: those before the last of inserted thoughts."""
        return self.placement.num_thoughts - 1 if self.placement.inserted else 0

    def in_rest(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the rest has the row of each of the caller's first columns, and which have none for being earlier.

        Args:
            length: How many columns.

        Returns:
            Indices `(B, length)`, meaningless where there is none, and whether there is one, `(B, length)`.
        """
        start, num = self.placement.start[:, None], self.placement.num_inserted
        columns = torch.arange(length, device=start.device)
        late = columns >= start - int(num > 0)  # of inserted thoughts, the last one's row is the last prompt token's
        return columns + num * late - self.cut[:, None], late


def moves(placement: Placement, length: int) -> bool:
    """Whether rows of L columns are cut at their own thoughts: the fewer columns.

    One with gradient counts for four: it goes forward and back, mostly gets logits, and is kept in between.
    """
    return placement.latest + 4 * placement.reach <= placement.earliest + 4 * (length - placement.earliest)


def divide(inputs: dict[str, Any], placement: Placement, filler: int, takes_positions: bool) -> Rows:
    """Divide a batch where its thoughts begin: each row at its own, or all at the earliest, whichever is less work.

    Rows that are cut at their own thoughts are moved, so that the cuts stand under each other: the prompts are padded
    on the left, the rest on the right.

    Args:
        inputs: The caller's `input_ids`, `labels` and, if any, `attention_mask`, each `(B, L)`, padded on either side.
        placement: Where the thoughts stand.
        filler: Id under inserted thought positions.
        takes_positions: Whether the base wants to be told the positions of padded rows.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], placement.attention_mask
    start, earliest, latest, num = placement.start, placement.earliest, placement.latest, placement.num_inserted
    length = ids.shape[1]
    here, width = placement, placement.reach + num
    if not moves(placement, length):
        here = replace(placement, start=torch.full_like(start, earliest), latest=earliest)
        width = length - earliest + num
    prompt_ids, prompt_mask = prompts(ids, here)
    attended = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    placed = [
        insert(values, start, num, fill, placement.column) if num else values
        for values, fill in ((ids, filler), (labels, IGNORED), (attended, 1))
    ]
    columns = torch.arange(width, device=ids.device) + here.start[:, None]  # (B, W)
    beyond = columns >= length + num
    rest_ids, rest_labels, rest_mask = (take(values, columns.clamp(max=length + num - 1)) for values in placed)
    prompt, rest, whole = {"input_ids": prompt_ids}, {"input_ids": rest_ids}, {"input_ids": ids[:, :latest]}
    if placement.padded or placement.column is None:
        seen = torch.cat([prompt_mask, rest_mask.masked_fill(beyond, 0).to(prompt_mask)], 1)
        prompt["attention_mask"], rest["attention_mask"] = prompt_mask, seen
        whole["attention_mask"] = attended[:, :latest]
        if takes_positions:
            where = positions(seen)
            prompt["position_ids"], rest["position_ids"] = where.tensor_split([prompt_ids.shape[1]], 1)
            whole["position_ids"] = positions(attended)[:, :latest]
    rest_labels = rest_labels.masked_fill(beyond, IGNORED)
    targets = nn.functional.pad(rest_labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    predicts = (targets != IGNORED).nonzero()[:, 0]  # here, where an accelerator has little left to do
    return Rows(prompt, rest, rest_labels, whole, here.start, placement, length, predicts, targets[predicts])


class TwoPasses:
    """Divides the training steps of one base where it can be done.

    Args:
        model: The base.
        names: Names of its forward's arguments.
        takes_positions: Whether it wants to be told the positions of padded rows.
        run: Calls the base's forward past the hooks: its arguments, the rows that they are of, and the assistant's
            hidden states where it is the second pass, to its outputs.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...], takes_positions: bool, run: Run) -> None:
        self.model = model
        self._names = names
        self._takes_positions = takes_positions
        self._run = run
        self.head = model.get_output_embeddings()
        # Whether the head's place can be taken, or None where two passes are not as one; by whether rows of unequal
        # prompts were moved, None: equal ones.
        self._found: dict[bool | None, bool | None] = {}
        self._said: set[str] = set()

    def begin(
        self,
        inputs: dict[str, Any],
        placement: Placement,
        hidden: Tensor,
        filler: int,
        trained: nn.Module,
        in_one_pass: InOnePass,
    ) -> Rows | None:
        """Run the prompts, and change the arguments to those of the second pass.

        Args:
            inputs: The arguments of a training step, in the caller's columns; changed in place.
            placement: Where the thoughts stand.
            hidden: The assistant's hidden states `(B, N, H_assistant)`.
            filler: Id under inserted thought positions.
            trained: The one module of the base that may be trained.
            in_one_pass: Makes the step otherwise: its arguments, placement and hidden states to the outputs in the
                caller's columns.

        Returns:
            The divided rows; `None` where the step has to be made in one pass, for a reason that is logged once.
        """
        obstacle = self._obstacle(inputs, placement, trained)
        if obstacle is None:
            stands_in = self._tried(inputs, placement, hidden, filler, in_one_pass)
            if stands_in is not None:
                rows = divide(inputs, placement, filler, self._takes_positions)
                return self._second(inputs, rows, self._read_prompts(rows), stands_in)
            obstacle = "its logits after a cached prompt are not those of whole rows"
        if obstacle not in self._said:
            self._said.add(obstacle)
            _LOGGER.info("Training steps of %s run in one pass: %s.", type(self.model).__name__, obstacle)
        return None

    def _obstacle(self, inputs: dict[str, Any], placement: Placement, trained: nn.Module) -> str | None:
        """Why a step cannot be made in two passes, as far as that can be told beforehand."""
        if CACHE_NAME not in self._names:
            return "its forward takes no cache"
        if checkpoints(self.model):
            return "gradient checkpointing makes no cache"
        if placement.latest < placement.num_thoughts:  # masks after a cache are tables of rest by all columns
            return "prompts are shorter than the thoughts"
        own = set(trained.parameters())
        if any(weight.requires_grad and weight not in own for weight in self.model.parameters()):
            return "weights of the base are trained, so that prompts have gradients too"
        if not all(is_whole(weight) for weight in self.model.parameters()):
            return "its weights are sharded or offloaded, and brought in once a step"
        for name, value in inputs.items():
            if name not in _DIVIDED and isinstance(value, Tensor) and value.dim() > 1:
                return f"`{name}` is given"
        keep = inputs.get("logits_to_keep")  # a number or a tensor of columns
        if inputs.get("input_ids") is None or isinstance(keep, Tensor) or keep or inputs.get("use_cache"):
            return "`inputs_embeds`, `logits_to_keep` or `use_cache` is given"
        config = self.model.config.get_text_config(decoder=True)
        for name, wanted in {**dict.fromkeys(PER_TOKEN_OUTPUTS, False), "return_dict": True}.items():
            given = inputs.get(name)
            if bool(getattr(config, name, wanted) if given is None else given) is not wanted:
                return f"`{name}` is {not wanted}"
        switch = rotary_switch(config)
        if switch is not None and inputs["input_ids"].shape[1] + placement.num_inserted > switch:
            return f"its rotary frequencies change with rows longer than {switch}"
        return None

    def _tried(
        self, inputs: dict[str, Any], placement: Placement, hidden: Tensor, filler: int, in_one_pass: InOnePass
    ) -> bool | None:
        """Whether the place of the head can be taken in the second pass; `None`: two passes are not as one.

        Attention with a cache reads a row in pieces as it reads it whole. A model that goes on from a recurrent state
        with one token at a time, or counts positions by column, does not, and nothing in a config tells. So it is
        tried once, on the rows with the shortest and the longest prompt, and once more for each way of dividing
        prompts that differ in length. A base that does something with its logits, or has a loss of its own, is found
        out in the same way, and computes both itself. Rounding is allowed for; other differences are as large as the
        logits are.
        """
        way = None
        if placement.padded or placement.column is None:
            way = moves(placement, inputs["input_ids"].shape[1])
        if way not in self._found:
            pick = torch.stack([placement.start.argmin(), placement.start.argmax()])
            few = {name: inputs[name][pick] for name in _DIVIDED if inputs.get(name) is not None}
            with torch.no_grad(), _evaluating(self.model):
                here = placement.select(pick)
                agrees = (
                    stands_in
                    for stands_in in (True, False)
                    if self._agree(few, here, hidden[pick], filler, in_one_pass, stands_in)
                )
                self._found[way] = next(agrees, None)
        return self._found[way]

    def _agree(
        self,
        inputs: dict[str, Any],
        placement: Placement,
        hidden: Tensor,
        filler: int,
        in_one_pass: InOnePass,
        stands_in: bool,
    ) -> bool:
        rows, two = divide(inputs, placement, filler, self._takes_positions), {**inputs, "return_dict": True}
        try:
            cache = self._read_prompts(rows)
            if not holds_attention_alone(cache) or cache_length(cache) != rows.prompt["input_ids"].shape[1]:
                return False
            rows = self._second(two, rows, cache, stands_in)
            found = self.end(self._run(two, rows, hidden), rows)
        except Exception as error:  # models fail in their own ways where they were never run so
            what = "do without its head" if stands_in else "go on from a cached prompt"
            _LOGGER.info("%s cannot %s: %s", type(self.model).__name__, what, error)
            return False
        expected = in_one_pass({**inputs, "return_dict": True}, placement, hidden)
        attended = slice(None) if placement.attention_mask is None else placement.attention_mask.bool()
        tolerance = _ROUNDING if expected.logits.dtype in (torch.float32, torch.float64) else _ROUNDING_OF_HALVES
        return all(
            bool((one - two).float().norm() <= tolerance * one.float().norm())
            for one, two in (
                (expected.loss, found.loss),
                (expected.logits[attended], found.logits.whole()[attended]),
            )
        )

    @torch.no_grad()
    def _read_prompts(self, rows: Rows) -> Any:
        """The cache of a pass over the prompts, which makes no logits where the base can be told so."""
        inputs = {**rows.prompt, "use_cache": True, "return_dict": True}
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=rows.cut.device)
        return find_cache(self._run(inputs, rows, None))

    def _second(self, inputs: dict[str, Any], rows: Rows, cache: Any, stands_in: bool) -> Rows:
        """Arguments of the pass over thoughts and responses, which makes no logits that nobody sees.

        Args:
            inputs: Those of the step; changed in place.
            rows: What they are divided into.
            cache: It holds the prompts.
            stands_in: Whether the place of the head is taken, if it is the base's own.

        Returns:
            The rows, with what stands in for the head.
        """
        labels: Tensor | None = rows.labels
        common = (*self._names, *PER_TOKEN_OUTPUTS, "return_dict", "num_items_in_batch")
        # A head of a trainer's own in the forward (TRL's) has arguments of its own, and may not know ours.
        known = all(name in common for name, value in inputs.items() if value is not None)
        if stands_in and known and self._computes_usual_loss():
            number = inputs.pop("num_items_in_batch", None)
            vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
            rows = replace(rows, head=HeadLoss(self.head, rows.predicts, rows.targets, number, vocabulary))
            labels = None
        elif rows.skipped and known and "logits_to_keep" in self._names:
            # Columns by name: a slice of several rows is no matrix, and would be multiplied row by row.
            inputs["logits_to_keep"] = torch.arange(rows.skipped, rows.shape[1], device=rows.labels.device)
            labels = rows.labels[:, rows.skipped :].contiguous()
        inputs.pop("attention_mask", None)
        inputs.update(rows.rest, labels=labels, use_cache=True, **{CACHE_NAME: cache})
        return rows

    def _computes_usual_loss(self) -> bool:
        """Whether head and loss are those that the base came with; a trainer may have put others in their place."""
        own = self.model.get_output_embeddings() is self.head
        return own and getattr(self.model, "loss_function", None) is ForCausalLMLoss

    def end(self, output: Any, rows: Rows) -> Any:
        """Put the outputs of the second pass in line with the caller's tokens.

        Logits are those of all tokens, made when they are read. Other values of tokens before the thoughts are 0, and
        the cache, whose columns are not the caller's, is left out.

        Args:
            output: A `ModelOutput` of the base.
            rows: What `begin` returned.
        """
        fields = {name: value for name, value in output.items() if name not in CACHE_NAMES}
        if rows.head is not None:
            fields["loss"] = rows.head.loss
        for name, value in fields.items():
            if name == "logits":
                shape = (*rows.shape[:1], rows.length, value.shape[2])
                fields[name] = LateLogits.of(value, shape, functools.partial(self._whole_logits, rows, value))
            elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows.shape[0]:
                missing = rows.shape[1] - value.shape[1]
                if missing in (0, 1):  # 1: compared with shifted labels already
                    fields[name] = _in_line(value, rows, rows.length - missing)
        return type(output)(**fields)

    def _whole_logits(self, rows: Rows, logits: Tensor) -> Tensor:
        """Logits of all tokens `(B, L, V)`, from those of the second pass, `(B, W or W - rows.skipped, V)`, if any."""
        with torch.no_grad():
            read = self._run({**rows.whole_prompts, "use_cache": False, "return_dict": True}, rows, None).logits
        if rows.head is not None:
            logits = rows.head.logits().to(logits)
        index, late = rows.in_rest(rows.length)
        index = (index - (rows.shape[1] - logits.shape[1])).clamp(max=logits.shape[1] - 1) + read.shape[1]
        columns = torch.arange(rows.length, device=index.device)
        return take(torch.cat([read.to(logits), logits], 1), index.where(late, columns))


def _in_line(values: Tensor, rows: Rows, length: int) -> Tensor:
    """Values of the rest `(B, W, ...)` in the caller's columns `(B, length, ...)`, with 0 before the thoughts."""
    index, late = rows.in_rest(length)
    found = take(values, index.clamp(0, values.shape[1] - 1))
    none = ~late | (index >= values.shape[1])
    return found.masked_fill(none.to(found.device).view(*none.shape, *[1] * (values.dim() - 2)), 0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
