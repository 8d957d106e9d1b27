"""Imports without the garbage collector: once, and it is on again."""

import gc
import sys

import pytest

from mora_repro import imported


@pytest.fixture(autouse=True)
def as_before():
    yield
    gc.unfreeze()
    sys.modules.pop("colorsys", None)


def test_the_first_import_alone_sets_what_is_there_aside_and_the_collector_is_on_again():
    sys.modules.pop("colorsys", None)
    gc.unfreeze()
    module = imported("colorsys")
    assert gc.isenabled() and gc.get_freeze_count() > 0 and module.rgb_to_hsv
    gc.unfreeze()  # a run in the same process must not set the last run's model aside
    assert imported("colorsys") is module and gc.get_freeze_count() == 0


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError):
        imported("mora_repro.nothing")
    assert gc.isenabled()
