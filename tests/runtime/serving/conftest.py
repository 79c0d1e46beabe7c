"""The model that the server's tests share."""

import pytest
from serving import train_by_heart


@pytest.fixture(scope="package")
def weights(tmp_path_factory):
    """Weights of a tiny model that knows `serving.chats` by heart."""
    return train_by_heart(tmp_path_factory.mktemp("by_heart"))
