"""Small networks of other people's kinds, for tests that need more than one."""
