"""The benchmarks: cbwcore beside its floor and its peers, in one run.

`rounds` interleaves the cases, `results` is what they find, `setting` is where they run; one module a subject has the
cases, `sections` lists them, `report` writes it all down. ``cbwcore bench`` and ``pytest benchmarks/`` run the same.
"""
