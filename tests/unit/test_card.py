"""The model card of an adapter, however it is saved: what it says, and the user's text, which it keeps."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import is_local, public_name
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from project_files import rewrite
from tiny_pair import Pair
from transformers import Trainer, TrainingArguments

from softcot_peft import SoftCoTConfig, prepare_for_hub

OWN = "# Mine\n\nTrained on a rainy day.\n\n## Words of my own\n\n```python\nprint('kept')\n```\n"
NAMES = {"base_model_name_or_path": "org/base", "assistant_model_name_or_path": "org/assistant"}


def config(**changes: Any) -> SoftCoTConfig:
    return SoftCoTConfig(**{"task_type": "CAUSAL_LM", **NAMES, "assistant_revision": "c" * 40, **changes})


def read(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def write(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")


def outside_of_marks(text: str) -> str:
    """What of a card's text is the user's."""
    text = re.sub(r"<!-- softcot-peft: (\w+),.*?<!-- end of \1 -->\n*", "", text, flags=re.DOTALL)
    return re.sub(r"### Framework versions\n+(- PEFT .*\n)+\Z", "", text)  # added by PEFT


# What it says


def test_it_names_models_tags_and_uses(tmp_path: Path) -> None:
    config().save_pretrained(str(tmp_path))
    card = read(tmp_path)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "softcot", "transformers"],
        "base_model": "org/base",
        "softcot": {
            "thought_source": "assistant",
            "assistant": "org/assistant",
            "assistant_revision": "c" * 40,
            "num_thought_tokens": 32,
        },
    }
    first = [line for line in card.text.splitlines() if line][:12]
    assert "import softcot_peft  # registers the method with PEFT" in first
    assert "pip install softcot-peft" in first
    assert any("KeyError: 'SOFTCOT'" in line for line in first)
    for line in (
        'base = AutoModelForCausalLM.from_pretrained("org/base")',
        'pipe.model.load_adapter("this repository or folder")',
        "vllm serve org/base --enable-prompt-embeds",
        f"| assistant | [org/assistant](https://huggingface.co/org/assistant) | `{'c' * 40}` |",
    ):
        assert line in card.text.splitlines()


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"placement": "thought_token", "thought_token": "<t>", "inference_num_thought_tokens": 2}, "{}<t><t>"),
        ({"response_marker": "\nAnswer:"}, "{}\\nAnswer:"),
        ({"assistant_prompt_between": ["Question: ", "\n"]}, "Question: {}\\n"),
    ],
)
def test_its_prompts_have_what_the_adapter_requires(tmp_path: Path, changes: dict[str, Any], prompt: str) -> None:
    config(**changes).save_pretrained(str(tmp_path))
    assert read(tmp_path).text.count(json.dumps("x")[0] + prompt.format("How many legs have seven dogs?") + '"') == 2


def test_what_a_server_rejects_is_not_advised(tmp_path: Path) -> None:
    for name, changes in {
        "base": {"thought_source": "base", "assistant_model_name_or_path": None, "assistant_revision": None},
        "chains": {"num_chains": 2},
    }.items():
        config(**changes).save_pretrained(str(tmp_path / name))
        assert "vllm" not in read(tmp_path / name).text
    assert "| assistant | none: the base reads the prompt |" in read(tmp_path / "base").text


def test_a_template_that_nobody_filled_in_is_replaced(pair: Pair, tmp_path: Path) -> None:
    pair.model().save_pretrained(tmp_path)
    text = read(tmp_path).text
    assert text.startswith("# SoftCoT adapter\n")
    assert "More Information Needed" not in text
    assert text.rstrip().splitlines()[-1].startswith("- PEFT ")


# The user's text


@pytest.mark.parametrize("text", [OWN, f"---\nlicense: mit\ntags:\n- mine\n---\n{OWN}", "Words without a title.\n"])
def test_a_card_written_by_hand_is_kept(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    for _ in range(3):
        config().save_pretrained(str(tmp_path))
    card, before = read(tmp_path), ModelCard(text)
    assert outside_of_marks(card.text).split() == before.text.split()
    assert card.data.get("license") == before.data.get("license")
    assert set(before.data.get("tags") or ()) <= set(card.data.tags)
    assert card.text.splitlines()[0] == before.text.splitlines()[0] or not before.text.startswith("#")
    assert card.text.count("## How to use") == 1


def test_saving_twice_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.save_pretrained(tmp_path)
    write(tmp_path, str(read(tmp_path)).replace("<!-- softcot-peft: usage", f"{OWN}\n<!-- softcot-peft: usage"))
    before = str(read(tmp_path))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert str(read(tmp_path)) == before


def test_a_template_that_was_filled_in_is_kept(pair: Pair, tmp_path: Path) -> None:
    text = str(ModelCard.from_template(ModelCardData(), model_description="It thinks about dogs."))
    write(tmp_path, text)
    pair.model().save_pretrained(tmp_path)
    assert "It thinks about dogs." in read(tmp_path).text


def test_the_section_of_earlier_versions_is_replaced(tmp_path: Path) -> None:
    section = (
        "\n## Loading this SoftCoT adapter\n\n`pip install softcot-peft`, then import it.\n\n```python\nimport "
        "softcot_peft\n```\n\nThe frozen assistant is `/home/me/assistant`.\n"
    )
    write(tmp_path, f"---\nlibrary_name: peft\n---\n{OWN}{section}\n## After\n")
    config().save_pretrained(str(tmp_path))
    text = read(tmp_path).text
    assert "/home/me" not in text
    assert "## Loading this SoftCoT adapter" not in text
    assert outside_of_marks(text).split() == f"{OWN}## After".split()


def trainer_of(model: Any, pair: Pair, folder: Path) -> Trainer:
    (ids,) = pair.rows(["Seven?"])
    rows = [{"input_ids": ids + ids, "labels": [-100] * len(ids) + ids}]
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True)
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")  # PEFT, offline
@pytest.mark.filterwarnings("ignore:`assistant_model_name_or_path` must be a Hub id:UserWarning")
@pytest.mark.parametrize("kind", ["PeftModel", "bare", "loaded"])
def test_the_trainer_s_card_keeps_text_and_tags(pair: Pair, tmp_path: Path, kind: str) -> None:
    model = pair.model()
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.peft_config["default"].assistant_model_name_or_path = "org/assistant"
    if kind == "bare":
        model = pair.load_base()
        model.add_adapter(pair.config())
        model.peft_config["default"].base_model_name_or_path = "org/base"
    elif kind == "loaded":
        model.save_pretrained(tmp_path / "first")
        local = rewrite(tmp_path / "first", assistant_model_name_or_path=str(pair.assistant))
        model = PeftModel.from_pretrained(pair.load_base(), local, is_trainable=True)
    write(tmp_path, f"---\nlicense: mit\n---\n{OWN}")
    trainer = trainer_of(model, pair, tmp_path)
    for _ in range(2):  # as `push_to_hub` does
        trainer.save_model()
        trainer.create_model_card(model_name="x", dataset="questions about legs", tags="by-trainer")
    card = read(tmp_path)
    assert outside_of_marks(card.text).split() == OWN.split()
    assert card.text.count("on the questions about legs dataset") == 1
    assert card.text.count("## How to use") == 1
    assert card.data.license == "mit"
    assert {"softcot", "by-trainer"} <= set(card.data.tags)
    assert card.data.library_name == "peft"


# Folders of this machine


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("org/name", False),
        ("gpt2", False),
        ("my assistant", False),
        ("local:assistant", False),
        (None, False),
        ("/models/assistant", True),
        ("./assistant", True),
        ("../assistant", True),
        ("~/assistant", True),
        ("C:\\models\\assistant", True),
        ("C:/models", True),
        ("models/small/assistant", True),
    ],
)
def test_names_that_can_only_be_folders(name: str | None, local: bool) -> None:
    assert is_local(name) is local
    if local:
        assert re.fullmatch(r"local:[\w.-]+", public_name(str(name)))


def test_a_folder_in_the_working_directory_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("org/name")
    Path("org/name").mkdir(parents=True)
    assert is_local("org/name")
    assert public_name("org/name") == "local:name"


def test_a_folder_that_is_prepared_names_no_local_folder_and_says_what_to_set(pair: Pair, tmp_path: Path) -> None:
    model = pair.model(tokenizer_name_or_path=str(pair.base))
    model.add_adapter("other", pair.config())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="must be a Hub id") as caught:
        prepare_for_hub(tmp_path, repo_id="me/adapter")
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    for field in ("base_model_name_or_path", "assistant_model_name_or_path", "tokenizer_name_or_path"):
        assert f"`model.peft_config['default'].{field} = 'owner/name'`" in texts[0]
    assert "use_assistant(model, tokenizer, name='local:assistant')" in texts[0]
    assert "model.peft_config['other']" in texts[1]
    root = str(pair.base.parent)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and root.encode() in path.read_bytes()] == []
    assert 'load_adapter("me/adapter", adapter_kwargs={"subfolder": "other"})' in read(tmp_path / "other").text
    with pytest.warns(UserWarning, match="got 'local:assistant', a name given to `use_assistant`") as caught:
        prepare_for_hub(tmp_path)  # nothing is left to hide, but nobody else can load it yet
    assert not any("local folder" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore:`base_model_name_or_path` must be a Hub id:UserWarning")
def test_a_trainer_s_folder_with_an_adapter_of_another_name_names_no_folder(pair: Pair, tmp_path: Path) -> None:
    """PEFT then saves into a subfolder, with a card of its own above it."""
    model = get_peft_model(pair.load_base(), pair.config(), adapter_name="other")
    trainer = trainer_of(model, pair, tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    root = str(pair.base.parent).encode()
    assert root not in (tmp_path / "README.md").read_bytes()
    assert root not in (tmp_path / "other/README.md").read_bytes()
    assert root not in (tmp_path / "other/adapter_config.json").read_bytes()


def test_an_assistant_that_was_given_is_a_warning(pair: Pair, tmp_path: Path) -> None:
    """It has no commit, unlike one on the Hub; the card says how to give it."""
    config(assistant_model_name_or_path="my-assistant", assistant_revision=None).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=r"got 'my-assistant', a name given to `use_assistant`"):
        prepare_for_hub(tmp_path)
    text = read(tmp_path).text
    assert text.count('softcot_peft.use_assistant(assistant, assistant_tokenizer, name="my-assistant")') == 2
    assert "vllm" not in text


def test_metadata_that_are_no_yaml_are_an_error_that_says_so(tmp_path: Path) -> None:
    write(tmp_path, "---\nlicense: [mit\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"(?s)README\.md' must begin with YAML .* Correct the metadata"):
        config().save_pretrained(str(tmp_path))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must hold a SoftCoT adapter"):
        prepare_for_hub(tmp_path)


def test_saving_keeps_the_folders_and_warns_of_nothing(pair: Pair, tmp_path: Path) -> None:
    pair.model().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert stored["assistant_model_name_or_path"] == str(pair.assistant)
    assert str(pair.base.parent) not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_saved_model_is_still_pickled(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.save_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").exists()
