"""What a model knows, against what it says: states of contrast pairs, probes, transfer, alarms, and what labels are worth."""
