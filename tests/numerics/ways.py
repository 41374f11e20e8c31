"""The two ways of `diffq.numerics`: by NumPy on a CPU, and by torch's operations elsewhere."""

import pytest


def both_ways(module):
    """A fixture with which each test of a file runs in both ways of a module."""

    @pytest.fixture(params=["numpy", "torch"], autouse=True, scope="module")
    def way(request):
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "torch":
                patch.setattr(module, "in_numpy", lambda tensor: False)
            yield

    return way
