"""Floor 0: streaming moments, linear algebra and metrics with intervals. Import the module you need."""
