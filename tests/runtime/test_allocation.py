from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fitune.runtime.training.allocation import use_expandable_segments


@pytest.fixture
def settings() -> Iterator[str]:
    before = torch._C._accelerator_getAllocatorSettings()
    yield "garbage_collection_threshold:0.8"
    torch._C._accelerator_setAllocatorSettings(before)


def test_expandable_segments_are_added_to_what_the_user_has_set(settings: str) -> None:
    torch._C._accelerator_setAllocatorSettings(settings)
    use_expandable_segments()
    assert torch._C._accelerator_getAllocatorSettings() == f"{settings},expandable_segments:True"


def test_expandable_segments_need_no_other_setting() -> None:
    use_expandable_segments()
    assert torch._C._accelerator_getAllocatorSettings().endswith("expandable_segments:True")
