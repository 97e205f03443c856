"""`axolotl psft-doctor`: what is wrong with a run, before it costs anything.

files.py and rows.py are part of every run, which imports them alone.
"""
