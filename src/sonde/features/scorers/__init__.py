"""Tests of explanations that a language model answers; those that need none are in `local_scores`."""
