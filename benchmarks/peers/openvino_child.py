"""Decodes with OpenVINO GenAI in this process: answers every line of prompts with a line of arrival times.

Runs in OpenVINO's own environment, so it imports nothing of ours: `python -I openvino_child.py GGUF_FILE NUM_THREADS`.
`child.py` describes the lines; here each has one prompt.
"""

import json
import os
import sys
import time

import numpy
import openvino
import openvino_genai


def main() -> None:
    file, num_threads = sys.argv[1], int(sys.argv[2])
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipeline = openvino_genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=num_threads)
    print(json.dumps({"ready": f"OpenVINO GenAI {openvino_genai.__version__}"}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        (prompt,) = asked["prompts"]
        options = openvino_genai.GenerationConfig(max_new_tokens=asked["num_tokens"], ignore_eos=True, do_sample=False)
        arrivals = _Arrivals()
        started = time.perf_counter()
        ids = openvino.Tensor(numpy.array([prompt], numpy.int64))
        pipeline.generate(ids, options, arrivals)
        print(json.dumps({"started": started, "streams": [arrivals.taken]}), file=answers, flush=True)


class _Arrivals(openvino_genai.StreamerBase):
    """The times at which tokens came."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[float, int]] = []

    def write(self, tokens: int | list[int]) -> openvino_genai.StreamingStatus:
        self.taken.append((time.perf_counter(), 1 if isinstance(tokens, int) else len(tokens)))
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
