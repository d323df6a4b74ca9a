"""Answers of `SoftCoTLLM`, as JSON: `answer_offline.py BASE ADAPTERS REQUESTS`, the latter two as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from softcot_peft.serving import SoftCoTLLM


def main(base: str, adapters: dict[str, str], requests: list[dict[str, Any]]) -> None:
    from vllm import SamplingParams

    llm = SoftCoTLLM(base, adapters=adapters, dtype="float32", max_model_len=256, enforce_eager=True, block_size=32)
    answers = []
    for request in requests:
        params = SamplingParams(temperature=0, max_tokens=request.pop("max_tokens"))
        answer = llm.chat if "messages" in request else llm.generate
        try:
            outputs = answer(sampling_params=params, use_tqdm=False, **request)
        except ValueError as error:
            answers.append(str(error))
            continue
        answers.append(
            [
                {"tokens": list(out.outputs[0].token_ids), "prompt": out.prompt_token_ids, "text": out.prompt}
                for out in outputs
            ]
        )
    print("REPR " + repr(llm))
    print("ANSWERS " + json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
