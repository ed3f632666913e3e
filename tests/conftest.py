from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)

# The shapes in the annotations are executed: a wrong one fails the test that calls it.
jaxtyping.install_import_hook("atomtune.sparse", "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    # Raised by dynamo itself on any autograd.Function, and swallowed there unless warnings are errors.
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For `torch.compile`, which cannot trace the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
