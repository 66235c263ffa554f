"""Where fastadapt meets other libraries: one file for each, which alone imports it."""
