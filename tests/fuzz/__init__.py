"""Fuzzing of the image readers: ``images`` is the harness, ``seeds`` makes what it starts from."""
