"""What a model does: metrics of edits, and downstream tasks."""
