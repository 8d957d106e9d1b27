"""Shared by the library's tests: the same random numbers in every run and in every order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
