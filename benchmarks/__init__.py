"""minisd against diffusers: time and peak memory, with the same weights. `python -m benchmarks` prints the table.

cases.py      what is compared, and the goal of each: two functions that do the same thing, one for each library
peers.py      the networks, ours and diffusers', with the same weights
scale.py      Stable Diffusion v1's UNet in training on a GPU        host.py    what a step costs beside the networks
gpu.py        everything for a GPU in one command: the model that ships, and the tables
steps.py      how many steps are enough, with which sampler, and how much guidance
measure.py    how time and memory are measured, and what a busy machine does to that
"""
