"""GrowingCache against DynamicCache: the same states after any sequence of operations."""

from __future__ import annotations

from cache_machine import CacheMachine
from hypothesis import settings

TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
