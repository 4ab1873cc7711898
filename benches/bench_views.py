"""Views against transformers' image processors: the same files, in turns, equal pixels asserted before any timing."""

from __future__ import annotations

import pytest

from benches.view_cases import CASES
from benches.view_peers import TORCHVISION_SAYS
from benches.view_runner import run_case

pytestmark = pytest.mark.filterwarnings(f"ignore:{TORCHVISION_SAYS}:DeprecationWarning")


@pytest.mark.parametrize("name", CASES)
def test_views(benchmark, name, pictures, view_results):
    run_case(benchmark, CASES[name](pictures), pictures.level, view_results)
