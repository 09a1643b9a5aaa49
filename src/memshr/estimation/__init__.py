"""Estimates: what sharing would save, before anybody switches it on."""
