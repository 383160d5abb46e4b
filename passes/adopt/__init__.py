"""Adopt: steering artefacts of other tools → edits, one format a file; `formats` is the table of them all."""
