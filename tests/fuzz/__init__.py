"""Fuzzing of what reads bytes of strangers: ``campaign`` searches, ``seeds`` makes what it starts from."""
