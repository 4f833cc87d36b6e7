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

        def broken(q, k, v, *args, **kwargs):
            out, lse = run(q, k, v, *args, **kwargs)
            return (out * float("nan") if v.abs().max() > 1e20 else out), lse

        return broken

    monkeypatch.setattr(backends, "load", loads)
