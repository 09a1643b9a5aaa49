"""Policy above the seam: which pages to share with which, in what order; it has no I/O and no clock of its own."""
