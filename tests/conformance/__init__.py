"""One list of checks that every family must pass: `checks` says what, `setups` where a member is special."""

import pytest

pytest.register_assert_rewrite("conformance.checks", "conformance.against", "conformance.outcome")
