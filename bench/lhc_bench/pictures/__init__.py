"""Pictures of results files."""
