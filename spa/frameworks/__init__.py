"""The agreement of the two doors of a framework: its importer and its exporter meet here, and nowhere else.

A pruned model goes back into its framework only where the exporter reads what the importer wrote: names of variables,
layouts of parameters, the order of gates. Each file holds one framework's side of that agreement.

Arrows: depends on :mod:`spa.model` and :mod:`spa.running`; ``importers/``, ``exporters/`` and the top of ``spa/``
depend on it. No file imports its framework before a function of it is called.
"""
