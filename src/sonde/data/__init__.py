"""Text, contrast pairs and generated tasks: seeded, and with a known answer where there is one."""
