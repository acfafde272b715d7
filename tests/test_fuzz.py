"""Property tests of all code that reads from outside, on a few examples; `tests/by_hand/endurance.py fuzz` tries many."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz import DAMAGE, OVERRIDES, RECIPE_BYTES, REQUESTS, try_checkpoint, try_recipe, try_request
from helpers.tiny_rewards import reward_of
from hypothesis import HealthCheck, given, settings

from dag.rewards.serve import RewardServer

few = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with RewardServer(("127.0.0.1", 0), "colourfulness", reward_of("colourfulness")) as made:
        yield made


@few
@given(RECIPE_BYTES, OVERRIDES)
def test_a_recipe_loads_or_is_refused_in_words(tmp_path: Path, content: bytes, overrides: list[str]) -> None:
    try_recipe(content, overrides, tmp_path)


@few
@given(DAMAGE)
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, damaged: tuple[str, int, bytes, Any]) -> None:
    try_checkpoint(damaged, tmp_path / "checkpoints")


@few
@given(REQUESTS)
def test_every_request_gets_an_answer(server: RewardServer, body: bytes) -> None:
    try_request(body, server)
