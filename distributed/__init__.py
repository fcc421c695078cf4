"""What makes one run out of many processes: devices, shards, votes, checkpoints, watch."""

import warnings

# What Accelerate's import says in a notebook without ipywidgets, of a bar that nobody shows.
warnings.filterwarnings("ignore", message="IProgress not found")
