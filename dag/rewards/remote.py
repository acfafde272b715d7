"""A reward behind HTTP: one that cannot live in this environment, or should not share its GPU."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dag.errors import RunError
from dag.rewards.registry import REWARDS
from dag.rewards.wire import decode_response, encode_request, error_of

_LONGEST_PAUSE = 30.0
# The server is there but not yet, or no longer, able: worth another attempt.
_TRANSIENT = {429, 502, 503, 504}


@REWARDS.register("http")
class Remote:
    """Scores by a server that speaks `dag.rewards.wire`; an outage shorter than the retries goes unnoticed.

    Args:
        url:       where to POST.
        timeout:   seconds for one answer.
        retries:   attempts after a failed one, with pauses of 1, 2, 4, ... at most 30 seconds.
        max_batch: pictures per request.
        sleep:     waits between attempts.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 6,
        max_batch: int = 16,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.url, self.timeout, self.retries, self.max_batch, self.sleep = url, timeout, retries, max_batch, sleep

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU. Raises RunError if the server refuses or stays away."""
        starts = range(0, len(images), self.max_batch)
        parts = [
            self._ask(images[start : start + self.max_batch], prompts[start : start + self.max_batch])
            for start in starts
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _ask(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        body = encode_request(images, prompts)
        for attempt in range(self.retries + 1):
            if attempt > 0:
                self.sleep(min(_LONGEST_PAUSE, 2.0 ** (attempt - 1)))
            try:
                return decode_response(self._post(body), len(prompts))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error_of(error.read())}"
                if error.code not in _TRANSIENT:
                    raise RunError(f"reward http: {self.url} refused: {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                # Refused, reset, timed out, cut off: all of them may be a server that is being restarted.
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            except ValueError as error:
                raise RunError(f"reward http: {self.url} answered otherwise than agreed: {error}") from None
        raise RunError(f"reward http: {self.url} gave no answer in {self.retries + 1} attempts; the last: {reason}")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()
