"""What funcopt raises: each error is also the builtin that a user would expect."""


class FuncoptError(Exception):
    """Base of every error that funcopt raises on purpose."""


class HyperparameterError(FuncoptError, ValueError):
    """A hyperparameter's value is out of range, or does not fit the parameters."""


class UnknownHyperparameterError(FuncoptError, TypeError):
    """A hyperparameter was named that the optimizer does not have."""


class HyperparameterTypeError(FuncoptError, TypeError):
    """A hyperparameter is of a kind that is never guessed, as a bare callable is."""


class StructureError(FuncoptError, ValueError):
    """A tree does not have the structure, or a leaf not the shape, that is needed."""


class LeafError(FuncoptError, TypeError):
    """A leaf is no tensor, or a tensor of a dtype, layout or device not accepted."""


class GradientLostError(FuncoptError, RuntimeError):
    """A gradient that the caller asked to follow would be dropped without a word."""


class MetaParameterError(FuncoptError, ValueError):
    """A meta-gradient was asked for of what an estimator cannot see."""


class ExecutionError(FuncoptError, RuntimeError):
    """An execution was asked for by name that cannot run this step."""


class CompileError(FuncoptError, RuntimeError):
    """A function was to be compiled that cannot be, or the compiler failed."""


class RemoteTaskError(FuncoptError, RuntimeError):
    """Another process that shares the tasks has failed; the message is its own."""


class CheckpointError(FuncoptError, ValueError, KeyError):
    """A checkpoint is another optimizer's, or of other parameters."""

    __str__ = Exception.__str__  # a KeyError shows its message with quotes around
