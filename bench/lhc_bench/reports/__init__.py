"""Trainings told and timed: runs read, reports, ablations, the demo."""
