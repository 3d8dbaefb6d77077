"""Descriptions of states to save beside them: a checkpoint that does not fit raises an error that names the field.

A library such as Orbax saves arrays. It does not know what they mean: it restores into another optimizer whose fields
have the same names, and casts where dtypes differ. `describe` returns what to save as JSON beside the arrays, `check`
compares that with a state, and `migrate` converts the state of an older version or of another optimizer.
"""

from .description import check as check
from .description import describe as describe
from .entries import CheckpointError as CheckpointError
from .entries import fields as fields
from .migration import from_fields as from_fields
from .migration import migrate as migrate
from .rules import rules_of as rules_of
