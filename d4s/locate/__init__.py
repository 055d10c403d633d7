"""Where an edit goes and toward what: key statistics, keys and targets."""
