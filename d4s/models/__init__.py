"""What edits are written into: models, their anatomy, and what they say."""
