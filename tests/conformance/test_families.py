"""Every type of transformers' causal-LM mapping as a base, tiny and made from its config, against the plain base.

Slow; run by `make conformance`, which also writes the table in docs/support.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from conformance.families import (
    ENCODER_DECODERS,
    REFUSED,
    TYPES,
    UNBUILDABLE,
    UNCARRIED,
    build,
    is_switchable,
    shrink,
    tiny_config,
    traits,
)
from conformance.holding import attach, check_base_as_source, check_family, make_batch, make_judge
from conformance.table import Row

Report = Callable[[Row], None]
# Types with a class that reads with an encoder. The one left out has a decoder that hears: it is no encoder-decoder.
SEQ2SEQ = sorted(ENCODER_DECODERS & set(TYPES) - {"moss_transcribe_diarize"})
SWITCHABLE = sorted(filter(is_switchable, TYPES))


def class_of(model_type: str) -> str:
    """Name of the class that the mapping has for a type."""
    return str(AutoModelForCausalLM._model_mapping._model_mapping[model_type])


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in (UNBUILDABLE | REFUSED | UNCARRIED)])
def test_a_family_holds(
    model_type: str, conformance_assistant: PreTrainedModel, tmp_path: Path, report: Report
) -> None:
    base = build(model_type)
    found = traits(base, model_type)
    remarks = check_family(base, conformance_assistant, tmp_path)
    report(Row(model_type, class_of(model_type), "works", tuple(found), "; ".join(remarks)))


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in (UNBUILDABLE | REFUSED | UNCARRIED)])
def test_a_family_is_its_own_source(model_type: str) -> None:
    check_base_as_source(build(model_type))


@pytest.mark.usefixtures("conformance_assistant")
@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_that_is_no_decoder_is_refused(model_type: str, report: Report) -> None:
    base = build(model_type)
    found = traits(base, model_type)
    with pytest.raises(ValueError, match=REFUSED[model_type]) as error:
        attach(base)
    report(Row(model_type, class_of(model_type), "refused when attached", tuple(found), str(error.value)))


@pytest.mark.parametrize("model_type", UNCARRIED)
def test_a_type_that_cannot_carry_thoughts_says_so(
    model_type: str, conformance_assistant: PreTrainedModel, report: Report
) -> None:
    base, plain = build(model_type), build(model_type)
    found = traits(base, model_type)
    model = attach(base)
    batch = make_batch([0], make_judge(model, plain, conformance_assistant))
    with pytest.raises(RuntimeError, match=UNCARRIED[model_type]) as error:
        model(**batch)
    with pytest.raises(RuntimeError, match=UNCARRIED[model_type]):
        model.generate(input_ids=batch["input_ids"], max_new_tokens=1)
    report(Row(model_type, class_of(model_type), "refused in the first pass", tuple(found), str(error.value)))


@pytest.mark.parametrize("model_type", UNBUILDABLE)
def test_what_transformers_itself_cannot_build_is_still_unbuildable(model_type: str, report: Report) -> None:
    with pytest.raises((AttributeError, ValueError), match=UNBUILDABLE[model_type]) as error:
        build(model_type)
    why = f"`from_config` of its own tiny config: {type(error.value).__name__}: {error.value}"
    report(Row(model_type, class_of(model_type), "not built by transformers", (), why))


@pytest.mark.usefixtures("conformance_assistant")
@pytest.mark.parametrize("model_type", SWITCHABLE)
def test_encoders_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"decoder LM, but its type '{model_type}' is an encoder"):
        attach(build(model_type, is_decoder=False))


@pytest.mark.usefixtures("conformance_assistant")
@pytest.mark.parametrize("model_type", [name for name in SWITCHABLE if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES])
def test_masked_lms_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"decoder LM, but its type '{model_type}' is an encoder"):
        attach(AutoModelForMaskedLM.from_config(tiny_config(model_type)))


@pytest.mark.usefixtures("conformance_assistant")
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoder_decoders_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"decoder LM, but its type '{model_type}' is an encoder-decoder"):
        attach(build(model_type, AutoModelForSeq2SeqLM))


@pytest.mark.usefixtures("conformance_assistant")
@pytest.mark.parametrize("name", ["musicgen", "musicgen_melody"])
def test_models_that_write_several_codebooks_are_refused(name: str) -> None:
    config: Any = shrink(CONFIG_MAPPING[name + "_decoder"]())
    config.is_decoder = True
    with pytest.raises(ValueError, match=r"must have one input embedding, .* is a ModuleList"):
        attach(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[name]](config))


@pytest.mark.usefixtures("conformance_assistant")
def test_draft_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their config contradicts itself in transformers 5.23; all of their layers reuse what another model made.
    text_config = CONFIG_MAPPING["gemma4_text"]
    monkeypatch.setattr(text_config, "kv_sharing_modes", property(lambda self: ["reuse"] * self.num_hidden_layers))
    with pytest.raises(ValueError, match="'gemma4_assistant' is a draft model"):
        attach(build("gemma4_assistant"))
