"""Contents of pages as numbers: fingerprints, classes of equal ones, and what domains have in common."""
