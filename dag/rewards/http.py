"""A reward computed by an HTTP server: one that needs another environment, or should not share this GPU."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dag.errors import RunError
from dag.recipe.reward_sections import Http as Section
from dag.rewards.registry import REWARDS
from dag.rewards.wire import decode_response, encode_request, error_of

_LONGEST_PAUSE = 30.0
# Statuses by which a server says that it cannot answer at the moment: another attempt may succeed.
_TRANSIENT = {429, 502, 503, 504}


@REWARDS.register("http")
class Http:
    """The scores of a server that speaks `dag.rewards.wire`. Failed requests are repeated, as `retries` in the section says.

    Args:
        sleep: waits between attempts; tests replace it.
    """

    def __init__(self, section: Section, device: torch.device, sleep: Callable[[float], object] = time.sleep) -> None:
        self.section, self.sleep = section, sleep

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU. Raises RunError if the server refuses or does not answer."""
        size = self.section.max_batch
        parts = [self._ask(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _ask(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        url, attempts = self.section.url, self.section.retries + 1
        body = encode_request(images, prompts)
        for attempt in range(attempts):
            if attempt > 0:
                self.sleep(min(_LONGEST_PAUSE, 2.0 ** (attempt - 1)))
            try:
                return decode_response(self._post(body), len(prompts))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error_of(error.read())}"
                if error.code not in _TRANSIENT:
                    raise RunError(f"reward http: {url} refused: {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                # Refused, reset, timed out, cut off: all of them may be a server that is being restarted.
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            except ValueError as error:
                raise RunError(f"reward http: {url} broke the protocol: {error}") from None
        raise RunError(f"reward http: {url} gave no answer in {attempts} attempts; the last: {reason}")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.section.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.section.timeout) as answer:
            return answer.read()
