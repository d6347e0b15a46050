"""What a model knows, against what it says: probes, their transfer, alarms, and what labels are worth."""
