"""`SoftCoTConfig`: the configuration of an adapter. Validates each field and the combination of fields."""

from __future__ import annotations

import inspect
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftType, TaskType

from .checkpoint.card import write_card
from .checkpoint.untrusted import has_only_pickle, pickle_message
from .checkpoint.upload import prepare_copy
from .config_checks import check_types, check_values


@dataclass
class SoftCoTConfig(PeftConfig):
    """Configuration of a SoftCoT adapter (arXiv 2502.12134).

    Args:
        assistant_model_name_or_path: Hub id or folder of the frozen assistant LM, or a name registered with
            [`use_assistant`]. Required by the source `"assistant"`.
        assistant_revision: Commit, tag or branch of the assistant. Saving writes the resolved commit.
        num_thought_tokens: N, the number of soft thoughts in training and when a text is scored. The paper trains with
            32.
        inference_num_thought_tokens: N in `generate` and in forward passes without labels, with automatic placement.
            `None`: as in training. The paper uses 4. Forward passes with labels, in training or eval mode, always use
            `num_thought_tokens`.
        thought_token: Token of the base's vocabulary that marks thought positions in a prompt. `None`: automatic
            placement only.
        placement: `"prompt_end"`: thoughts are placed at the end of the prompt, unless the prompt contains a run of
            `thought_token`. `"thought_token"`: for adapters trained with the run in the prompt; prompts without a run
            are rejected.
        response_marker: Literal text that introduces the response in every prompt and training text, such as
            `"Answer:"`. Thoughts are placed before its last occurrence, and labels before them are ignored, so that
            whole texts can be labelled. It is searched before the first label; if it is not there, in the whole row.
            A run of `thought_token` takes precedence. `None`: no marker.
        assistant_prompt: Template of what the assistant reads, with `{prompt}` and optionally `{num_thought_tokens}`.
            It is rendered with the assistant's chat template if there is one. `None`: the prompt only.
        assistant_prefix: What the assistant's own turn begins with, before the thought positions; may contain
            `{num_thought_tokens}`. The paper's prompts have one (section 3 of arXiv 2502.12134).
        assistant_prompt_between: Two literal texts, each of which occurs once in every prompt: the assistant reads
            what stands between them, such as the question alone, as in the paper (section 3).
        assistant_thought_token: Token at the thought positions of the assistant's input. `None`: the assistant's unk
            token, else its eos token, else its pad token.
        assistant_shares_tokenizer: `True`: the assistant reads the prompt's ids. `False`: prompts are decoded and
            tokenized for the assistant. `None`: `True` if both tokenizers have the same vocabulary, and no
            `assistant_prompt`, `assistant_prefix` or `assistant_prompt_between` changes the text.
        tokenizer_name_or_path: Hub id or folder of the base's tokenizer if it is not with the base.
        assistant_dtype: Dtype to load the assistant in, such as `"bfloat16"`. `"auto"`: the checkpoint's dtype.
        thought_source: Name of the thought source that reads the prompt: `"assistant"` (arXiv 2502.12134, section 3);
            `"base"`, the base itself, without a second model (Self-SoftCoT, ACL 2026, long paper 1496, abstract); or a
            name registered with [`~softcot_peft.sources.register_source`].
        projection: Name of the module that maps the source's states to soft thoughts. `"linear"`: one layer (section 3
            of arXiv 2502.12134); `"mlp"`: two, with a GELU between them; `"per_position"`: a layer for each thought
            position (the position-aware independent projection of Self-SoftCoT's abstract); or a name registered with
            [`~softcot_peft.sources.register_projection`].
        projection_init: `"default"`: the default initialisation of linear layers. `"identity"`: thoughts begin as the
            source's states, which must be as wide as the base's embeddings. `"zero"`: thoughts begin as zero vectors.
            Self-SoftCoT begins with one of these two. `"matched"`: as `"default"`, scaled so that thoughts begin with
            the norm of the base's token embeddings.
        init_weights: `True`: the default initialisation of a linear layer. `False`: random values large enough for
            tests to see an effect.
        two_pass_training: Whether training steps run the prompts without gradient into a KV cache, and only thoughts
            and responses with gradient, if the base supports it. Loss and gradients are the same, in half the time;
            `logits` of the output is `None`. `False`: always one pass, with logits.
        num_chains: K, the number of chains of SoftCoT++ (arXiv 2505.11484, abstract). Each is another run of thoughts
            for the same prompt: training averages the loss over all, and `generate` answers once for each.
        chain_init: What stands at the assistant's thought positions in each chain. `"trained"`: an embedding of its
            own, trained with the projection: the specialized initial tokens of that abstract. `"fixed"`: the embedding
            of a token, as in the published code. `None`: as `"trained"` if there are several chains, else
            `assistant_thought_token`.
        chain_token_ids: Ids of the assistant's tokens whose embeddings the chains begin with, K of them: the initial
            tokens of that abstract. `None`: spread evenly over its vocabulary.
        contrastive_weight: Weight of the term that keeps the chains apart (the contrastive learning of that abstract),
            relative to the mean loss of the chains. The paper adds the term to their sum, which is a weight of 1 / K.
        assistant_hidden_size: Width of the assistant's last hidden states. Written on save, checked on load.
        base_hidden_size: Width of the base's input embeddings. Written on save, checked on load.
        softcot_peft_version: Version of this package that saved the adapter.
        interrupted_save: Not a field. Present in `adapter_config.json` if version 0.1.0 was killed while saving.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has an invalid value, or two fields contradict each other.

    Example:
        >>> from softcot_peft import SoftCoTConfig
        >>> config = SoftCoTConfig(assistant_model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct", task_type="CAUSAL_LM")
        >>> config.num_thought_tokens
        32
    """

    assistant_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the frozen assistant LM."}
    )
    assistant_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the assistant."})
    num_thought_tokens: int = field(default=32, metadata={"help": "Number of soft thoughts in training."})
    inference_num_thought_tokens: int | None = field(
        default=None, metadata={"help": "Number of soft thoughts in generation; None: as in training."}
    )
    thought_token: str | None = field(
        default=None, metadata={"help": "Token of the base's vocabulary that marks thought positions."}
    )
    placement: Literal["prompt_end", "thought_token"] = field(
        default="prompt_end", metadata={"help": "Where thoughts are placed: 'prompt_end' or 'thought_token'."}
    )
    response_marker: str | None = field(
        default=None, metadata={"help": "Text before whose last occurrence in a row thoughts are placed."}
    )
    assistant_prompt: str | None = field(
        default=None, metadata={"help": "Template of what the assistant reads, with {prompt}."}
    )
    assistant_prefix: str | None = field(
        default=None, metadata={"help": "What the assistant's own turn begins with, before the thought positions."}
    )
    assistant_prompt_between: list[str] | None = field(
        default=None, metadata={"help": "Two texts between which the assistant reads the base's prompts."}
    )
    assistant_thought_token: str | None = field(
        default=None, metadata={"help": "Token at the thought positions of the assistant's input."}
    )
    assistant_shares_tokenizer: bool | None = field(
        default=None, metadata={"help": "Whether the assistant can read the base's ids; None: compare."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The base's tokenizer if it is not with the base."}
    )
    assistant_dtype: str = field(default="auto", metadata={"help": "Dtype to load the assistant in."})
    thought_source: str = field(default="assistant", metadata={"help": "Name of the source that reads the prompt."})
    projection: str = field(
        default="linear", metadata={"help": "Name of the module that maps states to soft thoughts."}
    )
    projection_init: Literal["default", "identity", "zero", "matched"] = field(
        default="default", metadata={"help": "Initialisation: 'default', 'identity', 'zero' or 'matched'."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether to use the default initialisation."})
    two_pass_training: bool = field(
        default=True, metadata={"help": "Whether training runs prompts without gradient, if the base supports it."}
    )
    num_chains: int = field(default=1, metadata={"help": "Number of chains (SoftCoT++)."})
    chain_init: Literal["trained", "fixed"] | None = field(
        default=None, metadata={"help": "The chains' embeddings in the assistant: 'trained' or 'fixed'."}
    )
    chain_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids of the assistant's tokens that the chains begin with."}
    )
    contrastive_weight: float = field(
        default=0.01, metadata={"help": "Weight of the loss term that keeps chains apart."}
    )
    assistant_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the assistant's last hidden states. Written on save."}
    )
    base_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the base's input embeddings. Written on save."}
    )
    softcot_peft_version: str | None = field(
        default=None, metadata={"help": "Version of softcot-peft that saved the adapter. Written on save."}
    )

    # PEFT reads this from every config. The layer is found with `get_input_embeddings()`. If it were named here, PEFT
    # would save the whole embedding matrix. Not a field, so that it is not written to adapter_config.json.
    target_modules: ClassVar[None] = None

    interrupted_save: InitVar[bool] = False

    def __post_init__(self, interrupted_save: bool) -> None:
        if interrupted_save:
            raise ValueError(
                "`adapter_config.json` must be an adapter's config, got the mark of a save by softcot-peft 0.1.0 that "
                "was killed. Move the files of the folder's `.softcot-staged` up into the folder, which finishes the "
                "save, or save the adapter again."
            )
        super().__post_init__()
        self.peft_type = PeftType["SOFTCOT"]
        self.assistant_dtype = str(self.assistant_dtype).removeprefix("torch.")
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(
                f"`task_type` must be 'CAUSAL_LM' or None, got {str(self.task_type)!r}: soft thoughts "
                "require a causal language model. Set `task_type='CAUSAL_LM'`."
            )
        check_types(self)
        check_values(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load `adapter_config.json`. Rejects adapters whose weights are a pickle.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the adapter.
            subfolder: Folder within the repository or folder.
            **kwargs: Passed to [`~peft.PeftConfig.from_pretrained`].

        Raises:
            ValueError: There is no config, the weights are a pickle without a safetensors file next to it, or fields
                of the config are passed, which PEFT would ignore.
        """
        name = str(pretrained_model_name_or_path)
        hub = inspect.signature(hf_hub_download).parameters
        if overrides := [key for key in kwargs if key in cls.__annotations__ and key not in hub]:
            raise ValueError(
                f"`from_pretrained` must get no fields of the adapter's config, got {overrides}, which PEFT ignores. "
                f"Change a loaded config instead: `config = SoftCoTConfig.from_pretrained({name!r})`, set "
                f"`config.{overrides[0]}`, and pass `config=config` to `PeftModel.from_pretrained`."
            )
        config: PeftConfig = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        if has_only_pickle(name, subfolder, kwargs):
            raise ValueError(pickle_message(name))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json`, and complete the model card next to it.

        Args:
            save_directory: Folder of the adapter. Created if it does not exist.
            **kwargs: Passed to [`~peft.PeftConfig.save_pretrained`].
        """
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory))

    def _upload_modified_files(  # type: ignore[override]  # passes on what it does not know
        self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        # The last method that `push_to_hub` calls, after it has written the repository's card over the saved one.
        prepare_copy(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
