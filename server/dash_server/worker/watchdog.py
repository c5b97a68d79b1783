"""Kills a worker that does not respond any more. Knows messages; knows no requests."""

import asyncio
import logging
import time
from collections.abc import Callable

from dash_server.worker.messages import Ping
from dash_server.worker.starter import Worker

logger = logging.getLogger(__name__)

_MAX_PING_SECONDS = 1.0


async def kill_when_silent(worker: Worker, heard_at: Callable[[], float], timeout: float) -> None:
    """Pings the worker while it is silent, and kills it after `timeout` seconds. Its death is then handled like any
    other.

    Args:
        heard_at: returns when its last message came, by the monotonic clock.
    """
    interval = min(_MAX_PING_SECONDS, timeout / 4)
    silence, looked_at = 0.0, time.monotonic()
    while True:
        await asyncio.sleep(min(interval, max(timeout - silence, interval / 10)))
        now = time.monotonic()
        # While this process was stopped itself, it could not have heard anything.
        since_look = min(now - looked_at, 2 * interval)
        silence = min(silence + since_look, now - heard_at())
        looked_at = now
        if silence >= timeout:
            logger.error(
                "%s has said nothing for %.1f s (DASH_WORKER_TIMEOUT_SECONDS) and is killed", worker.name, silence
            )
            worker.kill()
            return
        if silence >= interval:
            worker.send(Ping())
