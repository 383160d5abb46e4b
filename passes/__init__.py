"""Passes, one a file, named by their verbs: find (model, data → program), legalize, fold (program → patch)."""
