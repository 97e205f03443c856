"""`axolotl psft-doctor`: what is wrong with a run, before it costs anything.

The command is command.py, its page page.py with memory.py. A run imports files.py and
rows.py alone.
"""
