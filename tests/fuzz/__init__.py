"""Bad input: how it is generated, what is checked, and a second parser built on the standard library."""

import pytest

pytest.register_assert_rewrite("fuzz.checks")
