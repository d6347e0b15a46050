"""What training does to networks: how circuits form, and what is left of skills and of starting points."""
