"""Made-up records, and a predictor trained from them once."""

import pytest

from predictor.model import LoadModel
from predictor.records import Records
from predictor.training import train
from tests.predictor.steps import HORIZON, records


@pytest.fixture(scope="session")
def recording() -> Records:
    return records(900, seed=1)


@pytest.fixture(scope="session")
def other_day() -> Records:
    return records(900, seed=2)


@pytest.fixture(scope="session")
def model(recording: Records) -> LoadModel:
    return train([recording], horizons=[HORIZON], seed=3)
