"""A cluster for the tests that need one; they skip, with the reason, where none can be started."""

import pytest
from cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if why := why_not():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster
