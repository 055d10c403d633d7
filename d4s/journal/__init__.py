"""What was done to a model, kept such that nothing is lost: the log, undoing, merging, patches."""
