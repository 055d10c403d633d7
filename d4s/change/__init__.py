"""How weights change: the closed form, and the only writer of weights."""
