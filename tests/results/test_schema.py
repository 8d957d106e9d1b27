"""docs/record.schema.json is that of the code, and the repository's records are of it."""

import json

import jsonschema
import pytest
from tiny import ROOT

from mora_repro.results.schema import PLACE, text


def test_the_published_schema_is_that_of_the_code():
    assert PLACE.read_text() == text(), "run: make docs"


def test_records_are_of_the_schema_and_another_field_is_not():
    validator = jsonschema.Draft202012Validator(json.loads(PLACE.read_text()))
    paths = sorted((ROOT / "results" / "runs").glob("*.json"))[::20]
    assert paths
    for path in paths:
        validator.validate(json.loads(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(json.loads(paths[0].read_text()) | {"loss": 1})
