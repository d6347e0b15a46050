"""Studies: a typed config and a function that turns a question into a run. One module per study."""
