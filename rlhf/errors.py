"""The two errors a user can meet. Commands print their message alone; everything else is a defect of ours."""


class InputError(ValueError):
    """Bad input: a setting, a data row, a tokenizer, a model, a reward function. Names it, its value and the remedy."""


class TrainingError(RuntimeError):
    """A run that must not go on (a non-finite loss or gradient, an inconsistent model). Says at which step and where."""
