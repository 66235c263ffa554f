"""The harness: what fastadapt costs and saves, measured beside PEFT and beside the frozen model alone.

`python -m bench` runs the main job.  Every row is verified before it is timed, names the clock it was read from, and
is appended to a JSON-lines file from which alone the report is drawn.
"""
