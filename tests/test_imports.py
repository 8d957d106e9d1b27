"""Imports without the garbage collector: once, and it is on again."""

import gc
import sys

import pytest

from mora_repro import imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that notes whether the collector is on while it is imported."""
    (tmp_path / "imported_here.py").write_text("import gc\nCOLLECTED = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    yield "imported_here"
    sys.modules.pop("imported_here", None)
    gc.unfreeze()


def test_the_first_import_alone_sets_what_is_there_aside_and_the_collector_is_on_again(module):
    made = imported(module)
    assert not made.COLLECTED and gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()  # a run in the same process must not set the last run's model aside
    assert imported(module) is made and gc.get_freeze_count() == 0


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError):
        imported("mora_repro.nothing")
    gc.unfreeze()
    assert gc.isenabled()
