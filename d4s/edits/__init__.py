"""What is to be written into a model: edits, the questions that test them, and the formats they come in."""

from d4s.edits.edit import Edit, Kind, Question, check_batch, check_sequence, without_contradictions

__all__ = ["Edit", "Kind", "Question", "check_batch", "check_sequence", "without_contradictions"]
