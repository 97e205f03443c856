"""Stand-ins for what a machine without an accelerator lacks.

For tests, the quickstart, a laptop. A run on a GPU imports nothing of this room.
"""
