"""The cbwcore command."""
