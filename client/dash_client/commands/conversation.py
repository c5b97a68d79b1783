"""The history of a chat session: the messages so far, and statistics of its answers. Knows no terminal and no server.

A cancelled answer stays in the history as far as it came, since the user has read it and the next message may be about
it. An answer that failed, or was cancelled before its first word, leaves neither itself nor its message behind, so
sending the message again does not repeat it in the history.
"""

from dash_client.types import ChatMessage, Generation


class Conversation:
    """The messages, in order, and statistics of the complete answers."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.seconds_to_first_token: float | None = None
        """Time to the latest answer's first text, measured by the client."""
        self._turns: list[ChatMessage] = []
        self._answers: list[Generation] = []
        self._cut_count = 0

    def prompt_with(self, message: str) -> list[ChatMessage]:
        """Returns the prompt for the next answer. Does not add the message yet."""
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*system, *self._turns, ChatMessage(role="user", content=message)]

    def add(self, message: str, answer: Generation) -> None:
        """Adds a message and its complete answer."""
        self._remember(message, answer.text)
        self._answers.append(answer)

    def add_cut(self, message: str, text: str) -> None:
        """Adds a message and its cancelled answer, unless that is empty."""
        if text:
            self._remember(message, text)
            self._cut_count += 1

    def _remember(self, message: str, text: str) -> None:
        self._turns += [ChatMessage(role="user", content=message), ChatMessage(role="assistant", content=text)]

    def reset(self) -> None:
        """Forgets the messages; keeps the system message and the statistics."""
        self._turns = []

    def describe(self) -> str:
        """Returns the statistics, one per line."""
        held = len(self._turns) // 2
        lines = [
            f"history           {held} messages with their answers{', and a system message' if self.system else ''}"
        ]
        lines.append(f"answers           {len(self._answers)} complete, {self._cut_count} cancelled")
        if not self._answers:
            return "\n".join(lines)
        usages = [answer.usage for answer in self._answers]
        lines.append(f"tokens            {sum(usage.output_token_count for usage in usages)}")
        lines.append(f"latest prompt     {usages[-1].prompt_token_count} tokens")
        seconds = sum(usage.decode_seconds for usage in usages)
        if seconds > 0:
            decoded = sum(max(usage.output_token_count - 1, 0) for usage in usages)
            lines.append(f"speed             {decoded / seconds:.1f} tokens/s")
        if self.seconds_to_first_token is not None:
            lines.append(f"latest first word {self.seconds_to_first_token * 1000:.0f} ms after sending")
        counted = [answer.depth for answer in self._answers if answer.depth.mean_cost is not None]
        if counted:
            tokens = sum(depth.decode_token_count for depth in counted)
            cost = sum((depth.mean_cost or 0.0) * depth.decode_token_count for depth in counted) / tokens
            lines.append(f"mean cost         {cost:.3f} of full depth")
        return "\n".join(lines)
