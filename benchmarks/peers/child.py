"""A contender in a child process, asked in lines of JSON. Knows the lines; knows no peer.

A child prints `{"ready": "NAME AND VERSION"}` once it is. Each later line answers one from standard input.
`{"prompts": [[token ids], …], "num_tokens": N}` asks for N new tokens of each prompt, greedily and past any end of
sequence; `{"started": SECONDS, "streams": [[[SECONDS, TOKENS], …], …]}` says when they came. Seconds are of the
machine's monotonic clock, which all processes share.
"""

import json
import select
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.peers.peer_process import PeerProcess
from benchmarks.runs import Run, run_from_arrivals
from benchmarks.server_process import DEADLINE_SECONDS


class ChildContender:
    """Decodes in a process that speaks these lines. Waits until it is ready.

    Raises:
        RuntimeError: the process ended or says nothing; here or in `run`.
    """

    def __init__(self, peer: PeerProcess, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._peer = peer
        self._deadline_seconds = deadline_seconds
        with peer.awake():
            self.description: str = self._read()["ready"]

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        question = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        with self._peer.awake():
            self._write(question)
            answer = self._read()
        streams = answer["streams"]
        counts = {sum(count for _, count in arrivals) for arrivals in streams}
        if len(streams) != len(prompts) or counts != {num_tokens}:
            raise RuntimeError(f"{self._peer.name} made {sorted(counts)} tokens instead of {num_tokens}")
        return run_from_arrivals(answer["started"], streams)

    def logits(self, text: Sequence[int]) -> numpy.ndarray:
        """Returns the logits behind each token, float32 `[tokens, vocab_size]`; only llama.cpp's children know them."""
        with tempfile.TemporaryDirectory() as folder, self._peer.awake():
            file = str(Path(folder) / "logits.npy")
            self._write(json.dumps({"text": list(text), "file": file}))
            self._read()
            logits: numpy.ndarray = numpy.load(file)
            return logits

    def _write(self, line: str) -> None:
        pipe = self._peer.process.stdin
        assert pipe is not None
        try:
            pipe.write(line + "\n")
            pipe.flush()
        except BrokenPipeError:
            self._peer.has_ended(1)
            raise self._peer.failure("takes no prompts") from None

    def _read(self) -> dict[str, Any]:
        pipe = self._peer.process.stdout
        assert pipe is not None
        has_come, _, _ = select.select([pipe], [], [], self._deadline_seconds)
        line = pipe.readline() if has_come else ""
        if not line:
            self._peer.has_ended(1)
            raise self._peer.failure("did not answer")
        answer: dict[str, Any] = json.loads(line)
        return answer
