"""A training step in two passes: prompts into a cache without gradient, then thoughts and responses with it.

The base is frozen, so no gradient comes from what stands before the thoughts: neither activations nor logits are
needed there. Knows the base's own forward and how its arguments are laid out, and nothing about adapters.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ._compat import (
    CACHE_NAME,
    CACHE_NAMES,
    cache_length,
    checkpoints,
    find_cache,
    has_hooks,
    holds_attention_alone,
    is_whole,
    rotary_switch,
)
from .backbone import evaluating
from .columns import insert, take
from .head_loss import HeadLoss, cross_entropy
from .inputs import PER_TOKEN_OUTPUTS
from .placement import IGNORED, Placement, positions, prompts

_LOGGER = logging.getLogger(__name__)
# Arguments that can be divided between the passes, or say nothing about a token.
_DIVIDED = ("input_ids", "attention_mask", "labels")
_ROUNDING = 1e-3  # relative; TF32 rounds as coarsely as float16
_LOUD = 2.0**6  # exact in every dtype; logits of some hundreds are beyond every published cap
_CHECKPOINTING = (
    "Gradient checkpointing turns two-pass training off: it keeps no cache, and a step takes about twice the time. "
    "Two passes keep no activations of prompts, so checkpointing is seldom needed. Pass "
    "`gradient_checkpointing=False` (TRL's trainers turn it on by default), or `two_pass_training=False` in the "
    "adapter's config to choose one pass."
)

Run = Callable[[dict[str, Any], "Rows | None", Tensor | None], Any]
InOnePass = Callable[[dict[str, Any], Placement, Tensor], Any]


@dataclass(frozen=True)
class Rows:
    """A batch's rows, each cut in two."""

    prompt: dict[str, Tensor]  # arguments of the first pass, over `(B, P)` tokens of prompts
    # Arguments of the second pass, over `(B, W)` placed columns: all thoughts, and what stands behind them.
    rest: dict[str, Tensor]
    labels: Tensor  # `(B, W)`
    cut: Tensor  # the placed column in which each row's rest begins, `(B,)`; at its thoughts or before
    placement: Placement  # where the thoughts stand in the caller's columns
    length: int  # the caller's columns L
    predicts: Tensor  # which columns of the rest, as `(B * W)`, predict a label, `(T,)`
    targets: Tensor  # these labels, `(T,)`
    head: HeadLoss | None = None  # computes the loss in the place of the base's head; `None`: the base does

    @property
    def shape(self) -> torch.Size:
        """`(B, W)`."""
        return self.labels.shape

    @property
    def skipped(self) -> int:
        """Columns from the rest's beginning that predict no label: those before the last of inserted thoughts."""
        return self.placement.num_thoughts - 1 if self.placement.inserted else 0

    def in_rest(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the rest has the rows of the caller's first columns, and whether it has, both `(B, length)`."""
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
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], placement.attention_mask
    start, earliest, num = placement.start, placement.earliest, placement.num_inserted
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
    prompt, rest = {"input_ids": prompt_ids}, {"input_ids": rest_ids}
    if placement.padded or placement.column is None:
        seen = torch.cat([prompt_mask, rest_mask.masked_fill(beyond, 0).to(prompt_mask)], 1)
        prompt["attention_mask"], rest["attention_mask"] = prompt_mask, seen
        if takes_positions:
            where = positions(seen)
            prompt["position_ids"], rest["position_ids"] = where.tensor_split([prompt_ids.shape[1]], 1)
    rest_labels = rest_labels.masked_fill(beyond, IGNORED)
    predicts, targets = predicted(rest_labels)  # here, where an accelerator has little left to do
    return Rows(prompt, rest, rest_labels, here.start, placement, length, predicts, targets)


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns `(B * L)` predict a label, `(T,)`, and these labels, `(T,)`, of labels `(B, L)`."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    predicts = (targets != IGNORED).nonzero()[:, 0]
    return predicts, targets[predicts]


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
        # Why two passes are not as one, if so; by whether rows of unequal prompts were moved, None: equal ones.
        self._found: dict[bool | None, str | None] = {}
        self._head_is_last: bool | None = None  # not tried yet
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

        Returns:
            The divided rows; `None` where the step has to be made in one pass, for a reason that is logged once.
        """
        obstacle = self._obstacle(inputs, placement, trained) or self._tried(
            inputs, placement, hidden, filler, in_one_pass
        )
        if obstacle is None:
            rows = divide(inputs, placement, filler, self._takes_positions)
            return self._second(inputs, rows, self._read_prompts(rows), bool(self._head_is_last))
        if obstacle not in self._said:
            self._said.add(obstacle)
            if obstacle == _CHECKPOINTING:  # its cost is a user's to weigh
                warnings.warn(_CHECKPOINTING, stacklevel=2)
            else:
                _LOGGER.info("Training steps of %s run in one pass: %s.", type(self.model).__name__, obstacle)
        return None

    def _obstacle(self, inputs: dict[str, Any], placement: Placement, trained: nn.Module) -> str | None:
        """Why a step cannot be made in two passes, as far as that can be told beforehand."""
        if CACHE_NAME not in self._names:
            return "its forward takes no cache"
        if checkpoints(self.model):
            return _CHECKPOINTING
        if any(has_hooks(module) for module in self.model.get_input_embeddings().modules()):
            return "a hook on its input embedding may depend on the length of a pass, as NEFTune's noise does"
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
    ) -> str | None:
        """Why two passes are not as one, found by trying; `None` where they are.

        Attention with a cache reads a row in pieces as it reads it whole. A model that goes on from a recurrent state
        with one token at a time, or counts positions by column, does not, and nothing in a config tells. So it is
        tried once, on the rows with the shortest and the longest prompt, and once more for each way of dividing
        prompts that differ in length. In half precision, rounding would hide differences: the trial computes in
        float32.
        """
        way = None
        if placement.padded or placement.column is None:
            way = moves(placement, inputs["input_ids"].shape[1])
        if way in self._found:
            return self._found[way]
        pick = torch.stack([placement.start.argmin(), placement.start.argmax()])
        few = {name: inputs[name][pick] for name in _DIVIDED if inputs.get(name) is not None}
        if (few["labels"][:, 1:] == IGNORED).all():
            return "the rows that would be tried have no labels"
        try:
            with torch.no_grad(), evaluating(self.model):
                if self._head_is_last is None:
                    self._head_is_last = self._try_head(few["input_ids"])
                with _in_float32(self.model):
                    agrees = self._agree(few, placement.select(pick), hidden[pick], filler, in_one_pass)
            self._found[way] = None if agrees else "its logits after a cached prompt are not those of whole rows"
        except Exception as error:  # models fail in their own ways where they were never run so
            if should_reduce_batch_size(error):  # out of memory, which says nothing about the model
                return f"memory ran out when two passes were tried ({error})"
            self._found[way] = f"it cannot go on from a cached prompt ({error})"
        return self._found[way]

    def _try_head(self, ids: Tensor) -> bool:
        """Whether the head is the last thing that the base does, so that its logits are the model's to the bit.

        What the head reads is made larger, so that a cap on the logits that a small number passes unchanged is seen.
        """
        seen: list[Tensor] = []

        def enlarge(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args:
                return None
            seen.append(args[0] * _LOUD)
            return (seen[-1], *args[1:])

        handle = self.head.register_forward_pre_hook(enlarge)
        try:
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "return_dict": True}
            output = self._run(inputs, None, None)
        finally:
            handle.remove()
        if len(seen) != 1 or output.get("logits") is None or output.get("loss") is None:
            return False
        predicts, targets = predicted(ids)
        logits = self.head(seen[0])
        loss = cross_entropy(self.head, seen[0].flatten(0, 1)[predicts], targets, logits.shape[-1]) / len(targets)
        same = logits.shape == output.logits.shape and bool((logits == output.logits).all())
        return same and bool(torch.isclose(loss, output.loss.float(), rtol=1e-4))

    def _agree(
        self, inputs: dict[str, Any], placement: Placement, hidden: Tensor, filler: int, in_one_pass: InOnePass
    ) -> bool:
        """Whether logits and loss of two passes are those of one, but for rounding."""
        rows, rest = divide(inputs, placement, filler, self._takes_positions), {**inputs, "return_dict": True}
        cache = self._read_prompts(rows)
        if not holds_attention_alone(cache) or cache_length(cache) != rows.prompt["input_ids"].shape[1]:
            return False
        rows = self._second(rest, rows, cache, stands_in=False)
        found = self._run(rest, rows, hidden)
        expected = in_one_pass({**inputs, "return_dict": True}, placement, hidden)
        index, late = rows.in_rest(rows.length)
        index = index - (rows.shape[1] - found.logits.shape[1])  # columns that predict nothing may be left out
        read = late & (index < found.logits.shape[1])
        if placement.attention_mask is not None:
            read = read & placement.attention_mask.bool()
        two = take(found.logits, index.clamp(0, found.logits.shape[1] - 1))
        pairs = (expected.loss, found.loss), (expected.logits[read], two[read])
        return all(bool((one - two).float().norm() <= _ROUNDING * one.float().norm()) for one, two in pairs)

    @torch.no_grad()
    def _read_prompts(self, rows: Rows) -> Any:
        """The cache of a pass over the prompts, which makes no logits where the base can be told so."""
        inputs = {**rows.prompt, "use_cache": True, "return_dict": True}
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=rows.cut.device)
        return find_cache(self._run(inputs, rows, None))

    def _second(self, inputs: dict[str, Any], rows: Rows, cache: Any, stands_in: bool) -> Rows:
        """Change the arguments to those of the pass over thoughts and responses, without logits that nobody sees."""
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

        There are no logits, for those of the prompts were not made. Other values of tokens before the thoughts are 0,
        and the cache, whose columns are not the caller's, is left out.
        """
        fields = {name: value for name, value in output.items() if name not in (*CACHE_NAMES, "logits")}
        if rows.head is not None:
            fields["loss"] = rows.head.loss
        for name, value in fields.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows.shape[0]:
                missing = rows.shape[1] - value.shape[1]
                if missing in (0, 1):  # 1: compared with shifted labels already
                    fields[name] = _in_line(value, rows, rows.length - missing)
        return type(output)(**fields)


def _in_line(values: Tensor, rows: Rows, length: int) -> Tensor:
    """Values of the rest `(B, W, ...)` in the caller's columns `(B, length, ...)`, with 0 before the thoughts."""
    index, late = rows.in_rest(length)
    found = take(values, index.clamp(0, values.shape[1] - 1))
    none = ~late | (index >= values.shape[1])
    return found.masked_fill(none.to(found.device).view(*none.shape, *[1] * (values.dim() - 2)), 0)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """A model that computes in float32, but for its head, so that rounding hides no difference between two ways.

    Weights in half precision are cast a layer at a time, while it runs; layers are what a list holds, and use each
    other's weights only inside. Quantised ones that have a dtype to compute in (bitsandbytes 0.50) compute in float32;
    others stay as coarse as they are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart: set[Tensor] = {*embedding.parameters(), *head.parameters()}
    narrow, kept = {}, {}

    def weights(module: nn.Module) -> Iterator[Tensor]:
        return (weight for weight in module.parameters(recurse=module in layers) if weight not in apart)

    def widen(module: nn.Module, args: Any) -> None:
        for weight in weights(module):
            if weight.dtype in (torch.bfloat16, torch.float16):
                narrow[weight], weight.data = weight.data, weight.data.float()

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for weight in weights(module):
            weight.data = narrow.pop(weight, weight.data)

    def to_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = getattr(module, "weight", args[0]).dtype
        return (args[0].to(dtype) if dtype.is_floating_point else args[0], *args[1:])

    handles = [
        embedding.register_forward_hook(lambda module, args, output: output.float()),
        head.register_forward_pre_hook(to_head),
    ]
    layers = {layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module}
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    for module in model.modules():
        if module not in inside:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            kept[module], module.compute_dtype = module.compute_dtype, torch.float32  # type: ignore[assignment]
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in narrow.items():  # what was running when something raised
            weight.data = data
        for module, dtype in kept.items():
            module.compute_dtype = dtype
