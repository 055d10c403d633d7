"""Why editing makes a model decline, and what the D4S paper says of it."""
