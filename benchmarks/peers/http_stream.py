"""Streams from an OpenAI-compatible server of completions, each read by a thread, as our own client's are."""

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.peers.peer_process import PeerProcess
from benchmarks.runs import Arrivals, Run, run_from_arrivals
from benchmarks.server_process import DEADLINE_SECONDS


class HttpContender:
    """Streams of `vllm serve`, which is awake meanwhile. Waits until it is healthy.

    Raises:
        RuntimeError: the server ended, did not become healthy in time, or refused a request; here or in `run`.
    """

    def __init__(self, peer: PeerProcess, port: int, model: str) -> None:
        self._peer = peer
        self._port = port
        self._model = model
        with peer.awake():
            self._wait_until_healthy()

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        with self._peer.awake(), ThreadPoolExecutor(len(prompts)) as pool:
            started = time.perf_counter()
            streams = list(pool.map(lambda prompt: self._read(prompt, num_tokens), prompts))
        return run_from_arrivals(started, streams)

    def _read(self, prompt: list[int], num_tokens: int) -> Arrivals:
        question = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # A message may have several tokens, and only so says how many.
            "return_token_ids": True,
        }
        arrivals: list[tuple[float, int]] = []
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_SECONDS)
        try:
            connection.request("POST", "/v1/completions", json.dumps(question), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise RuntimeError(f"{self._peer.name} answered {answer.status}: {answer.read(200)!r}")
            for line in answer:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    token_ids = choices[0]["token_ids"] if choices else None
                    if token_ids:
                        arrivals.append((time.perf_counter(), len(token_ids)))
        finally:
            connection.close()
        num_come = sum(count for _, count in arrivals)
        if num_come != num_tokens:
            raise RuntimeError(f"{self._peer.name} made {num_come} tokens instead of {num_tokens}")
        return arrivals

    def _wait_until_healthy(self) -> None:
        ends_at = time.monotonic() + DEADLINE_SECONDS
        while not self._is_healthy():
            if self._peer.has_ended(0.2):
                raise self._peer.failure("did not start")
            if time.monotonic() > ends_at:
                raise self._peer.failure("was not ready in time")

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()
