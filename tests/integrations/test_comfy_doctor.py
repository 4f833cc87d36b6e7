"""What a machine can run, in plain text."""

from sage_diffusion.attend.backends import answers
from sage_diffusion.integrations.comfy.doctor import diagnosis


def test_the_doctor_answers_for_every_spec():
    found = answers("cpu")
    assert found["int4/fp8-fast"].refusals["reference"] is None
    assert "CUDA" in found["int8/fp16"].refusals["triton"]
    text = diagnosis("cpu", mask="bool")
    assert "int8/fp16       reference" in text
    assert "preset fast: int8/int8 from 128 tokens, int4/fp8-fast from 128 tokens (4-bit" in text
    assert "slower than ordinary attention" in text
