"""minisd against diffusers: time and peak memory, with the same weights. `python -m benchmarks` prints the table.

cases.py      what is compared, and the goal of each: two functions that do the same thing, one for each library
peers.py      the networks, ours and diffusers', with the same weights
measure.py    how time and memory are measured, and what a busy machine does to that
"""
