"""Are this package's kernels right and fast on the card that is here?

``sage-diffusion verify`` runs every quantizer and attention kernel that the card can run against
its twin (:mod:`.checks`), times them (:mod:`.speed`) and leaves a verdict per kernel that
``backend="auto"`` heeds (:mod:`sage_diffusion.attend.verdicts`).  It needs neither diffusers nor
the tests.
"""
