"""Single operations under pytest-benchmark: `pytest bench/micro`, with its --benchmark-save and --benchmark-compare."""
