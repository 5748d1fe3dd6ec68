"""Control flow, sequences and optionals: barriers. What flows into them, or is read inside them, stays whole."""

from spa.rules import unsupported

for key in ["If", "Loop", "Scan", "SequenceMap"]:
    unsupported(key, "channels are not traced through its subgraphs")

for key in [
    *["ConcatFromSequence", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert"],
    *["SequenceLength", "SplitToSequence", "SequenceAt", "Optional", "OptionalGetElement", "OptionalHasElement"],
]:
    unsupported(key, "channels are not traced through sequences and optionals")
