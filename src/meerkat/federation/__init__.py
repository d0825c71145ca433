"""A real federation: coordinator, sites, and what travels between them."""
