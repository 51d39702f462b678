"""Names the clauses of a contract, so that a failure says which clause is broken."""

from contextlib import contextmanager


@contextmanager
def clause(text: str):
    """Add the text as a note to any exception that is raised within this context."""
    try:
        yield
    except BaseException as error:  # pytest's own failures are no subclasses of Exception
        error.add_note(f"broken clause: {text}")
        raise
