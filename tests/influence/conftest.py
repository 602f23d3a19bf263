import pytest
from influence_cases import CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()
