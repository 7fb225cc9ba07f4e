import inspect

from megalith.base import errors


def test_every_error_is_in_the_tree_and_in_the_drawing() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert classes
    for cls in classes:
        assert issubclass(cls, errors.MegalithError)
        assert cls.__name__ in (errors.__doc__ or "")


def test_an_error_reads_as_one_paragraph() -> None:
    error = errors.DoesNotFit("It needs 9 GiB and 4 GiB are free.", "Use --context 2048.")
    assert str(error) == "It needs 9 GiB and 4 GiB are free. Use --context 2048."
