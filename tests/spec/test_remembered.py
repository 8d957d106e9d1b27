"""Specs are composed once, and again where conf/ or a file that they name has changed."""

import pytest

from mora_repro.spec import RunSpec, compose_config, remembered
from mora_repro.spec.run_spec import sha256_of


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process, with an empty cache; returns the overrides that are composed from here on."""
    composed = []

    def compose(overrides):
        composed.append(overrides)
        return compose_config(overrides)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remembered, "compose_config", compose)
    remembered._place.cache_clear()
    remembered._known.cache_clear()
    yield composed
    remembered._place.cache_clear()
    remembered._known.cache_clear()


OVERRIDES = ["method=lora", "task=uuid", "r=4", "scale=mini"]


def test_another_process_finds_what_one_has_composed(fresh):
    spec = remembered.spec_of(OVERRIDES)
    assert spec == RunSpec.from_config(compose_config(OVERRIDES))
    remembered._known.cache_clear()
    found = remembered.spec_of(OVERRIDES)
    assert found == spec and found.id == spec.id and fresh == [OVERRIDES]


def test_a_torn_line_is_composed_again(fresh):
    remembered.spec_of(OVERRIDES)
    place = remembered._place()
    place.write_text(place.read_text()[:-100])
    remembered._known.cache_clear()
    assert remembered.spec_of(OVERRIDES).r == 4 and len(fresh) == 2


def test_a_spec_that_names_a_file_follows_its_content(fresh, tmp_path):
    texts = tmp_path / "texts.txt"
    overrides = ["method=fft", "task=pretrain", "scale=mini", f"task.data={texts}"]
    ids = {remembered.spec_of(overrides).id}  # it is not there yet
    for text in ("one\n", "two\n"):
        texts.write_text(text)
        sha256_of.cache_clear()
        ids.add(remembered.spec_of(overrides).id)
    assert len(ids) == 3


def test_a_cache_that_can_not_be_written_is_done_without(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert remembered.spec_of(OVERRIDES).r == 4
