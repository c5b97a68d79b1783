"""Decodes with vLLM in this process: answers every line of prompts with a line of arrival times.

Runs in vLLM's own environment, so it imports nothing of ours: `python -I vllm_child.py MODEL_FOLDER MAX_SEQUENCES
MAX_LENGTH`. `child.py` describes the lines.
"""

import json
import os
import sys
import time

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


def main() -> None:
    folder, max_sequences, max_length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = LLM(
        folder,
        dtype="bfloat16",
        max_num_seqs=max_sequences,
        max_model_len=max_length,
        skip_tokenizer_init=True,
    ).llm_engine
    print(json.dumps({"ready": f"vLLM {vllm.__version__}, torch {torch.__version__}"}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        options = SamplingParams(
            temperature=0,
            max_tokens=asked["num_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        streams: dict[str, list[tuple[float, int]]] = {str(number): [] for number in range(len(asked["prompts"]))}
        started = time.perf_counter()
        for request_id, prompt in zip(streams, asked["prompts"], strict=True):
            engine.add_request(request_id, {"prompt_token_ids": prompt}, options)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                num_tokens = len(output.outputs[0].token_ids)
                if num_tokens:
                    streams[output.request_id].append((now, num_tokens))
        print(json.dumps({"started": started, "streams": list(streams.values())}), file=answers, flush=True)


if __name__ == "__main__":
    main()
