"""Logging to stderr, each record with the id of the request it belongs to.

Records never carry prompts, outputs or what else a caller sent.
"""

import logging
from contextvars import ContextVar

request_id_of_task: ContextVar[str] = ContextVar("request_id_of_task", default="-")


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_of_task.get()
        return True


def configure_logging(level: str) -> None:
    """Sends records of `level` and above to stderr."""
    handler = logging.StreamHandler()
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
