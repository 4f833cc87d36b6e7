"""What the ComfyUI nodes say of a run."""

from sage_diffusion.attend.summary import LayerSummary, SessionSummary
from sage_diffusion.integrations.comfy.report import RunReport, merged

QUANTIZED = {("int4/int8", "reference"): 4}


def test_devices_are_merged_without_loss():
    raised = LayerSummary("b", QUANTIZED, {}, (3,), ("relative L1 0.50 at step 0",), 0.5)
    first = SessionSummary((LayerSummary("a", QUANTIZED, {}), raised), {"gluon sm_89: no": 2})
    other = LayerSummary("b", QUANTIZED, {"too long": 1}, (1,), (), 0.7)
    found = merged([first, SessionSummary((other,), {"gluon sm_89: no": 1})])
    a, b = found.layers
    assert (a.calls, a.drift, a.stepped_up) == (4, None, ())
    assert (b.calls, b.drift, b.non_finite) == (9, 0.7, (1, 3))
    assert b.stepped_up == ("relative L1 0.50 at step 0",)
    assert found.compilation_failures == {"gluon sm_89: no": 3}
    assert merged([first]).to_dict() == first.to_dict()


def test_the_report_names_layers_that_were_stepped_up():
    layer = LayerSummary("b", QUANTIZED, {}, (), ("relative L1 0.50 at step 0",), 0.5)
    text = str(RunReport(SessionSummary((layer,)), "fast", "Flux", 4))
    assert "b stepped up: relative L1 0.50 at step 0" in text
