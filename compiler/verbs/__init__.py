"""The commands as plain functions, one a file: what the command line does, for use from Python.

    from austeer.compiler.verbs.build import build

Each takes plain values, raises the errors of `austeer.compiler.errors`, and returns a frozen report whose
`plain()` is what `--json` prints. They sit on top of compiler, passes and targets; only the command line
imports them.
"""
