"""The commands of ``sage-diffusion``, one module each.  They import heavy things only when run."""
