"""What surrounds the loop: plan, schedule, learner, checkpoints, logbook."""
