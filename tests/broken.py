"""A backend that makes NaN of finite numbers, for tests of what is done about it."""

import pytest

from sage_diffusion.attend import backends

#: Times this, a finite V comes out as NaN.
HUGE = 1e30


@pytest.fixture
def made_nan(monkeypatch):
    """The twin, but NaN wherever V has huge numbers."""
    load = backends.load

    def loads(chosen):
        run = load(chosen)

        def broken(call, spec, return_lse):
            out, lse = run(call, spec, return_lse)
            return (out * float("nan") if call.v.abs().max() > 1e20 else out), lse

        return broken

    monkeypatch.setattr(backends, "load", loads)
