"""Language models: load, name the sites, read, edit, stream, generate."""
