"""Backup images: what is written (raw, qcow2), its manifest and digest, chains of them, restore and verify."""
