"""`fastadapt plan`: what a training step of a method needs, counted without a GPU and without weights."""
