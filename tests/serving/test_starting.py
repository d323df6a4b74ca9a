"""A server whose adapters cannot be served does not start, and says why."""

from __future__ import annotations

import shutil
from pathlib import Path

from project_files import rewrite
from served import Served, Server, skip_without_vllm

skip_without_vllm()


def test_adapters_without_the_plugin(served: Served, tmp_path: Path) -> None:
    server = Server(served, tmp_path / "log", environment={"VLLM_PLUGINS": None})
    assert "`VLLM_PLUGINS` must name 'softcot'" in server.fails()


def test_adapters_that_are_named_wrongly(served: Served, tmp_path: Path) -> None:
    assert "must have the form 'name=path'" in Server(served, tmp_path / "log", adapters="gsm8k").fails()


def test_adapter_with_the_name_of_the_base(served: Served, tmp_path: Path) -> None:
    server = Server(served, tmp_path / "log", adapters=f"tiny={served.adapters['first']}")
    assert "must name adapters differently from the base" in server.fails()


def test_adapter_for_a_base_of_another_width(served: Served, tmp_path: Path) -> None:
    folder = shutil.copytree(served.adapters["first"], tmp_path / "adapter")
    rewrite(folder, base_hidden_size=128)
    log = Server(served, tmp_path / "log", adapters=f"wide={folder}").fails()
    assert "The adapter 'wide'" in log
    assert "base hidden size 128, but this assistant has 24 and this base 64" in log


def test_adapter_whose_assistant_is_gone(served: Served, tmp_path: Path) -> None:
    folder = shutil.copytree(served.adapters["first"], tmp_path / "adapter")
    rewrite(folder, assistant_model_name_or_path=str(tmp_path / "nowhere"))
    log = Server(served, tmp_path / "log", adapters=f"lost={folder}").fails()
    assert "`assistant_model_name_or_path` must name a decoder LM" in log


def test_embeddings_that_are_not_enabled(served: Served, tmp_path: Path) -> None:
    server = Server(served, tmp_path / "log", ["--no-enable-prompt-embeds"])
    assert "`--enable-prompt-embeds` must be set" in server.fails()
