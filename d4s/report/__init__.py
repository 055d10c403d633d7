"""The face of a run: a page of what was edited and what came of it, and the view while it is under way."""
