"""Features: sparse dictionaries of activations, trained, measured, explained and scored."""
