"""A process that streams made-up messages at a steady pace, to measure clients against. Knows no model.

    python -m benchmarks.paced_server 1000 2000     # messages a second, messages in a stream

Prints its port. A request whose prompt is "wait" gets two messages and then nothing. Cancelled requests are counted;
Tokenize answers with the count.
"""

import asyncio
import sys
import time

import grpc

from dash_api.v1 import common_pb2, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

_Event = generation_pb2.StreamGenerateResponse
_STARTED = _Event(
    started=generation_pb2.GenerationStarted(
        request_id="r", model="made-up", mode=common_pb2.MODE_FULL_DEPTH, policy="none", layer_count=30
    )
)
_FINISHED = _Event(finished=generation_pb2.GenerationFinished(reason=generation_pb2.FINISH_REASON_LENGTH))


class _PacedServer(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    def __init__(self, messages_per_second: float, count: int) -> None:
        self._pause = 1 / messages_per_second
        self._count = count
        self._num_cancelled = 0

    async def StreamGenerate(  # noqa: N802
        self, request: generation_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if request.parameters.text == "wait":
            await self._wait(context)
        await context.write(_STARTED)
        started = time.perf_counter()
        for number in range(self._count):
            delta = generation_pb2.GenerationDelta(text=" word", token_ids=[number])
            await context.write(_Event(delta=delta))
            ahead = started + (number + 1) * self._pause - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
        await context.write(_FINISHED)

    async def _wait(self, context: grpc.aio.ServicerContext) -> None:
        try:
            await context.write(_STARTED)
            await context.write(_Event(delta=generation_pb2.GenerationDelta(text="a", token_ids=[1])))
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self._num_cancelled += 1
            raise

    async def Tokenize(  # noqa: N802
        self, request: model_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.TokenizeResponse:
        return model_pb2.TokenizeResponse(token_ids=[self._num_cancelled])


async def main() -> None:
    server = grpc.aio.server()
    paced = _PacedServer(float(sys.argv[1]), int(sys.argv[2]))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(paced, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(paced, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
