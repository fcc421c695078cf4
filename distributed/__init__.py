"""What makes one run out of many processes: devices, shards, votes, checkpoints, watch."""
